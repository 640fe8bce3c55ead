"""The FP8 parts of tools/benchmark_kernels.py: their rows, who is compared with, and both on the emulated engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import needs_gpu

from megatron_act import fp8_bytes, te
from megatron_act.benchmark import fp8_mlp, fp8_report, fp8_rows, fp8_ways, readme, timing
from megatron_act.benchmark.cases import Shape
from megatron_act.benchmark.fp8_ways import OWN, QUANTIZER, TORCH, Case
from megatron_act.kernels import fp8, fp8_ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import benchmark_kernels

ROOT = Path(__file__).resolve().parents[1]
SHAPE = Shape(128, 256, 256)
EXPECTED = {  # recipe and direction: bytes per element of ours, of bf16 and a quantizer
    ("delayed", "forward"): (4, 8), ("delayed", "backward"): (6, 10), ("tensorwise", "forward"): (6, 10),
    ("blockwise", "forward"): (4.0625, 8.0625), ("blockwise", "backward"): (6.0625, 10.0625),
    ("mxfp8", "forward"): (4.0625, 8.0625), ("mxfp8", "backward"): (6.0625, 10.0625),
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Two rounds, since times mean nothing here, and no Transformer Engine."""
    monkeypatch.setattr(te, "problem", lambda: "expected Transformer Engine, got none: install it")
    monkeypatch.setitem(timing.ROUNDS, "cpu", 2)
    monkeypatch.setitem(timing.ROTATED_BYTES, "cpu", 1)


def run(tmp_path, *arguments):
    threads = torch.get_num_threads()
    try:
        return benchmark_kernels.main(["--output", str(tmp_path / "out"), "--shapes", "128x256", *arguments])
    finally:
        torch.set_num_threads(threads)


def read(tmp_path, stem):
    return json.loads((tmp_path / "out" / f"{stem}.json").read_text())


def test_rows_are_consistent(tmp_path, quick):
    assert run(tmp_path, "--only", "fp8", "--activations", "xielu") == 0
    result = read(tmp_path, "fp8")
    assert {(r["recipe"], r["op"]): r["bytes_per_element"] for r in result["rows"]} == {
        key: pytest.approx(ours, rel=1e-4) for key, (ours, _) in EXPECTED.items()
    }
    for row in result["rows"]:
        moved, unfused = EXPECTED[row["recipe"], row["op"]]
        assert row["gb_per_s"] == pytest.approx(moved * 128 * 256 / row["median_us"] / 1e3, rel=1e-3)
        assert row["byte_ratio"] == pytest.approx(unfused / moved, rel=1e-4)
        (other,) = row["others"].values()
        assert list(row["others"]) == [TORCH] and other["bytes_per_element"] == pytest.approx(unfused, rel=1e-4)
        assert other["over_ours"] == pytest.approx(other["median_us"] / row["median_us"], rel=1e-3)
        assert row["percent_of_byte_ratio"] == pytest.approx(100 * other["over_ours"] / row["byte_ratio"], rel=1e-3)
    assert result["notes"] == [] and result["header"]["Transformer Engine"].startswith("expected Transformer Engine")
    page = (tmp_path / "out" / "fp8.md").read_text()
    assert all(f"| {recipe} | xielu | {op} | 128x256 |" in page for recipe, op in EXPECTED)


def test_a_run_without_only_leaves_out_what_cannot_run(tmp_path, quick, capsys):
    assert run(tmp_path, "--activations", "relu2") == 0
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.json")) == ["fp8", "kernels"]
    assert "benchmark: left out: the MLP under FP8: expected Transformer Engine" in capsys.readouterr().err
    assert run(tmp_path, "--only", "mlp") == 2
    assert "error: the MLP under FP8: expected Transformer Engine, got none" in capsys.readouterr().err


def test_the_first_activation_takes_every_shape():
    shapes = [Shape(1, 256, 256), SHAPE, Shape(256, 256, 256)]
    chosen = fp8_rows.select(None, shapes, "cpu")
    labels = {name: list(dict.fromkeys(c.label for c in chosen if c.activation == name)) for name in ("xielu", "relu2")}
    assert labels == {"xielu": ["128x256", "256x256"], "relu2": ["128x256"]}
    assert {(c.recipe, c.op) for c in chosen} == set(EXPECTED)


def case(recipe, op="forward", transposed=True):
    return Case("xielu", SHAPE, recipe, op, transposed)


@pytest.mark.parametrize("recipe", fp8_bytes.SCALE)
def test_casts_in_torch_are_the_specification(recipe):
    """Both halves; TORCH is a fair opponent only if it computes the same."""
    y = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = fp8_ways.plain_quantizer(case(recipe), "cpu")(y)
    scale = fp8.scale_of(y.float().abs().amax().reshape(1), False) if recipe == "tensorwise" else torch.tensor([8.0])
    want = fp8.quantize(y.float(), case(recipe).kernel, scale)
    assert torch.equal(made[0], want.data)
    second = made[2].t() if recipe == "mxfp8" else made[2]
    assert torch.equal(second, want.columnwise)
    if recipe in fp8_ways.BLOCKS:
        inverse = want.scale_inv.T if recipe == "blockwise" else 1.0 / fp8.e8m0_scale(want.scale_inv.int())
        assert torch.equal(made[1], inverse[: y.shape[0], : made[1].shape[1]])


def test_only_one_half_where_no_copy_is_needed():
    for recipe, halves in (("delayed", 1), ("tensorwise", 1), ("blockwise", 2)):
        made = fp8_ways.plain_quantizer(case(recipe, transposed=False), "cpu")(torch.randn(128, 256).bfloat16())
        assert sum(part.dtype == torch.uint8 for part in made) == halves
        assert case(recipe, transposed=False).columnwise == (halves == 2)


def test_who_computes_something_else_is_left_out_and_named(quick, monkeypatch):
    def wrong(case, device):
        return lambda y: (torch.zeros(y.shape, dtype=torch.uint8),)

    monkeypatch.setattr(fp8_ways, "plain_quantizer", wrong)
    done = fp8_rows.run([case("delayed")], "cpu", 10.0)
    assert done.rows[0]["others"] == {} and done.rows[0]["percent_of_byte_ratio"] is None
    assert done.notes[0].startswith(f"{TORCH}, xielu forward delayed 128x256: left out, ")


def test_a_failure_of_ours_is_named_and_the_exit_code(tmp_path, quick, monkeypatch):
    real = fp8_ops.forward

    def broken(name, x, params, out, **options):
        if out.recipe == "mxfp8":
            raise RuntimeError("no kernel image")
        return real(name, x, params, out, **options)

    monkeypatch.setattr(fp8_ops, "forward", broken)
    assert run(tmp_path, "--only", "fp8", "--activations", "xielu") == 1
    assert read(tmp_path, "fp8")["notes"] == ["failed: xielu forward mxfp8 128x256: RuntimeError: no kernel image"]
    assert ("mxfp8", "forward") not in {(r["recipe"], r["op"]) for r in read(tmp_path, "fp8")["rows"]}


EMULATED = """
import sys
sys.path[:0] = [f"{sys.argv[1]}/{name}" for name in ("tests", "tools", "")]
from te_cpu import loader
loader.install(tuple(map(int, sys.argv[2].split("."))))
from megatron_act import cpu_backend
cpu_backend.install()
import benchmark_kernels
from megatron_act.benchmark import cases, fp8_mlp, fp8_rows, timing
timing.ROUNDS["cpu"], timing.WARM_UP, timing.ROTATED_BYTES["cpu"], fp8_mlp.STEPS = 2, 1, 1, 1
fp8_rows.MOST_DIFFERING = 0.0 if "xielu" in sys.argv else 0.1
benchmark_kernels._shapes = lambda *_: [cases.Shape(128, 384, 256, hidden=128)]
sys.exit(benchmark_kernels.main(sys.argv[3:]))
"""


def emulated(tmp_path, capability, *arguments):
    """The tool in a process with Transformer Engine's own Python, whose kernels torch computes."""
    words = [sys.executable, "-c", EMULATED, str(ROOT), capability, "--output", str(tmp_path / "out"), "--debug"]
    done = subprocess.run([*words, *arguments], text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_rows_next_to_the_engine_on_hopper(tmp_path):
    """Its quantizers make the same bits from a bf16 activation; its own activations round once, hence not those."""
    emulated(tmp_path, "9.0", "--only", "fp8", "--shapes", "128x384", "--activations", "xielu")
    result = read(tmp_path, "fp8")
    assert result["notes"] == [] and result["header"]["Transformer Engine"] == "2.20.2"
    assert {(r["recipe"], r["op"]): list(r["others"]) for r in result["rows"]} == {key: [QUANTIZER] for key in EXPECTED}


def test_rows_of_an_activation_that_the_engine_has(tmp_path):
    emulated(tmp_path, "9.0", "--only", "fp8", "--shapes", "128x384", "--activations", "relu2")
    result = read(tmp_path, "fp8")
    assert result["notes"] == []
    for row in result["rows"]:
        assert list(row["others"]) == [QUANTIZER, OWN]
        expected = {"delayed": 0, "tensorwise": 2, "blockwise": 4, "mxfp8": 0}[row["recipe"]]
        assert row["others"][OWN]["bytes_per_element"] - row["bytes_per_element"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("capability", "recipes"),
    [("9.0", ["delayed", "tensorwise", "blockwise"]), ("10.0", ["delayed", "tensorwise", "blockwise", "mxfp8"])],
)
def test_the_mlp_next_to_the_engine(tmp_path, capability, recipes):
    """Ours is given the quantizers that it asks for, or its row would be a failure."""
    emulated(tmp_path, capability, "--only", "mlp")
    result = read(tmp_path, "mlp")
    assert result["notes"] == []
    plain, output, both, fuser = fp8_mlp.OURS
    assert list(dict.fromkeys(row["recipe"] for row in result["rows"])) == recipes
    for recipe in recipes:
        rows = {row["mlp"]: row for row in result["rows"] if row["recipe"] == recipe}
        assert set(rows) == {plain, output, fuser, *fp8_mlp.BASELINES, *([] if recipe == "tensorwise" else [both])}
        for row in rows.values():
            assert row["shape"] == "128x128x384" and row["width"] == (256 if "SwiGLU" in row["mlp"] else 384)
            assert row["tflops"] == pytest.approx(12 * 128 * 128 * 384 / row["median_us"] / 1e6, rel=1e-3)
            for name in fp8_mlp.BASELINES:
                assert row["over"][name] == pytest.approx(rows[name]["median_us"] / row["median_us"], rel=1e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recipe", fp8_bytes.SCALE)
def test_rows_on_a_gpu_are_replayed(recipe):
    """Ours and who is compared with, in both directions; ``notes`` would name who computed something else."""
    cases = fp8_rows.select(["relu2"], [Shape(512, 1024, 1024)], "cuda")
    done = fp8_rows.run([each for each in cases if each.recipe == recipe], "cuda", 1000.0)
    assert (done.notes, done.failed) == ([], [])
    for row in done.rows:
        assert row["method"] == timing.GRAPH and row["others"]


def times(us):
    return {"median_us": us, "p20_us": us - 1, "p80_us": us + 1, "method": "graph"}


def fp8_result():
    other = {**times(195.0), "bytes_per_element": 8.0, "over_ours": 1.95}
    row = {
        "op": "forward", "activation": "xielu", "recipe": "delayed", "shape": "4096x21504", "bytes_per_element": 4.0,
        **times(100.0), "gb_per_s": 3000.0, "percent_of_copy": 95.0, "byte_ratio": 2.0, "percent_of_byte_ratio": 97.5,
        "others": {QUANTIZER: other},
    }  # fmt: skip
    second = {**row, "activation": "relu2", "percent_of_byte_ratio": 80.0}
    return {"header": {"GPU": "Some GPU"}, "rows": [row, second, {**row, "shape": "1x1"}], "notes": ["a: b"]}


def mlp_result():
    row = {"mlp": "xIELU, FP8 result", "recipe": "delayed", "shape": "4096x4096x21504", "width": 21504}
    row |= {**times(5000.0), "tflops": 865.4, "over": {fp8_mlp.RELU2: 1.01}}
    return {"header": {"GPU": "Some GPU", "Transformer Engine": "2.20.2"}, "rows": [row], "notes": []}


def test_tables():
    page = fp8_report.rows_page(fp8_result())
    assert "| delayed | xielu | forward | 4096x21504 | 4 | 100.0 (99.0 to 101.0) | 3,000.0 | 95.0 | 1.95x" in page
    assert "| 2.00x | 98 % |" in page and "- a: b" in page
    assert f"Over {QUANTIZER}: 2 of 3 rows reach 90 % of their byte ratio." in page
    row = "| delayed | 4096x4096x21504 | xIELU, FP8 result | 21504 | 5.00 (5.00 to 5.00) | 865 | 1.01x |  |  |  |"
    assert row in fp8_report.mlp_page(mlp_result())


def test_the_readme_has_the_table_of_bytes():
    text = (ROOT / "README.md").read_text()
    assert readme.with_bytes(text) == text, "run: python -m megatron_act.benchmark.readme"


def test_the_readme_shows_fp8_results():
    shared = {"command": "bash tests/gpu/run.sh --only te", "commit": "abc123", "date": "2026-01-02 03:04 UTC"}
    results = {
        "te-bandwidth": {**shared, "figures": fp8_result()},
        "te-mlp": {**shared, "exit_code": 1, "tests": {"passed": [], "failed": {"te-mlp": "no"}, "skipped": {}}},
    }
    text = readme.section(results)
    assert "Activation and FP8: `bash tests/gpu/run.sh --only te` on Some GPU, " in text
    assert (
        "| delayed | relu2 | forward | 4096x21504 |" in text and "1x1" not in text and "Not in the table: a: b." in text
    )
    assert "The MLP under FP8" not in text and "te-mlp: 0 passed, 1 failed" in text
    text = readme.section({"te-mlp": {**shared, "figures": mlp_result()}})
    assert "The MLP under FP8, forward and backward: " in text and "Transformer Engine 2.20.2, commit abc123" in text
