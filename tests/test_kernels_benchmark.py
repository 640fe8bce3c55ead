"""tools/benchmark_kernels.py: what it writes, what it compares with, how it times, and what bad input is told."""

import csv
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import DEVICE, needs_gpu, shifted_params

from megatron_act.benchmark import baselines, cases, competitors, mlp, table, timing
from megatron_act.kernels import api as kernels

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import benchmark_kernels

ELEMENTS = 96 * 64
ITEM = 2 if DEVICE == "cuda" else 4  # bytes of the default dtype
METHOD = timing.GRAPH if DEVICE == "cuda" else timing.CLOCK


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A real run, torch.compile included."""
    where = tmp_path_factory.mktemp("benchmark") / "deep" / "out"
    threads = torch.get_num_threads()
    arguments = ["--only", "kernels", "--output", str(where), "--activations", "crrelu", "swiglu", "--shapes", "96x64"]
    assert benchmark_kernels.main(arguments) == 0
    torch.set_num_threads(threads)
    return where


def read(folder):
    return json.loads((folder / "kernels.json").read_text())


def test_rows_are_consistent(folder):
    rows = read(folder)["rows"]
    assert {(r["activation"], r["op"]): r["bytes_per_element"] for r in rows} == {
        ("crrelu", "forward"): 2 * ITEM, ("crrelu", "backward"): 3 * ITEM, ("crrelu", "backward+value"): 4 * ITEM,
        ("swiglu", "forward"): 3 * ITEM, ("swiglu", "backward"): 5 * ITEM, ("swiglu", "backward+value"): 6 * ITEM,
    }  # fmt: skip
    for row in rows:
        assert row["shape"] == "96x64" and row["method"] == METHOD
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_per_element"] * ELEMENTS / row["median_us"] / 1e3, rel=1e-3)
        assert set(row["others"]) >= {"torch eager", "torch.compile"}
        for other in row["others"].values():
            assert other["over_ours"] == pytest.approx(other["median_us"] / row["median_us"], rel=1e-3)


def test_the_four_files_agree(folder):
    result = read(folder)
    assert sorted(path.name for path in folder.iterdir()) == [f"kernels.{s}" for s in ("csv", "json", "md", "png")]
    with (folder / "kernels.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["ours median_us"]) for line in lines] == [row["median_us"] for row in result["rows"]]
    got = [float(line["torch.compile over_ours"]) for line in lines]
    assert got == [row["others"]["torch.compile"]["over_ours"] for row in result["rows"]]
    page = (folder / "kernels.md").read_text()
    for row in result["rows"]:
        assert f"| {row['activation']} | {row['op']} | 96x64 | {row['bytes_per_element']} |" in page
    assert (folder / "kernels.png").read_bytes()[:4] == b"\x89PNG"
    assert result["notes"] == []


def test_the_header_says_what_ran_where(folder):
    header = read(folder)["header"]
    assert {"torch", "triton", "Python", "commit", "command", "date", "copy", "compared with"} <= header.keys()
    assert header["command"].startswith("python tools/benchmark_kernels.py --only kernels")
    if DEVICE == "cpu":
        assert header["run"].startswith("CPU, no GPU")
    else:
        assert header["run"] == "GPU" and header["GPU"] == torch.cuda.get_device_name()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--activations", "xeilu"], "did you mean 'xielu'"),
        (["--shapes", "3"], "expected ROWSxCOLUMNS"),
        (["--shapes", "0x8"], "expected ROWSxCOLUMNS"),
        (["--minutes", "0"], "expected more than 0"),
        (["--minutes", "1e-9"], "give more"),
        (["--only", "fp8"], "for FP8 expected more than 64 tokens"),
        (["--only", "fp8", "--shapes", "200x8"], "for FP8 expected multiples of 128, got 200x8"),
        (["--only", "fp8", "--activations", "xielu", "swiglu"], "expected no gate for FP8 rows, got swiglu"),
    ],
)
def test_bad_input(arguments, part, tmp_path, capsys):
    assert benchmark_kernels.main(["--output", str(tmp_path / "out"), "--shapes", "9x8", *arguments]) == 2
    *progress, message = capsys.readouterr().err.splitlines()
    assert part in message and message.startswith("error: ")
    assert all(line.startswith("benchmark: ") for line in progress)
    assert not (tmp_path / "out").exists()


def test_a_file_as_folder_is_refused_before_anything_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_kernels, "measured", lambda *_: pytest.fail("timed"))
    (tmp_path / "out").write_text("mine")
    assert benchmark_kernels.main(["--output", str(tmp_path / "out")]) == 2
    assert "expected a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", kernels.names())
def test_the_plain_formula_is_ours_with_a_backward_pass_by_autograd(name):
    """Eager, and traced as torch.compile traces it: the registry's in-place steps would stop both."""
    x = torch.randn(48, 32, device=DEVICE, requires_grad=True)
    grad, raw = torch.randn_like(x), shifted_params(name)
    want = torch.autograd.grad(kernels.apply(name, x, raw, backend="reference"), [x, *raw], grad)
    plain = baselines.eager(name, False, x, raw)
    traced = torch.compile(plain, backend="aot_eager", dynamic=False, fullgraph=True)
    for function in (plain, traced):
        y = function(x, *raw)
        torch.testing.assert_close(y, kernels.apply(name, x, raw, backend="reference"), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(y, [x, *raw], grad), want, rtol=1e-4, atol=1e-4)
    half = x.detach().bfloat16()
    y = baselines.eager(name, False, half, raw)(half, *raw)
    torch.testing.assert_close(y, kernels.apply(name, half, raw, backend="reference"), rtol=1e-2, atol=1e-6)


def test_a_gated_plain_formula():
    x = torch.randn(48, 64, device=DEVICE, requires_grad=True)
    want = kernels.apply("silu", x, gated=True, backend="reference")
    torch.testing.assert_close(baselines.eager("silu", True, x, [])(x), want)


def test_cases_cover_the_registry():
    chosen = cases.select(None, cases.GPU_SHAPES, torch.bfloat16)
    assert {case.activation for case in chosen} == {*kernels.names(), "swiglu"}
    count = {case.activation: sum(c.activation == case.activation for c in chosen) for case in chosen}
    assert count == {name: 6 if name in cases.FULL else 1 for name in count}
    labels = [case.label for case in chosen if case.activation == "swiglu"]
    assert labels == ["4096x14336", "4096x7168", "20480x6144", "20480x4096", "1x14336", "64x14336"]
    assert {case.ops for case in chosen if case.shape.decode} == {("forward",)}


def test_the_shape_of_the_quickstart():
    assert cases.quickstart_shape(2) == cases.Shape(2048, 384, 256, hidden=128)


LIGER_SWIGLU = """
class LigerSiLUMulFunction:
    @staticmethod
    def apply(a, b):
        return a * a.sigmoid() * b
"""
LIGER_RELU2 = """
class LigerReLUSquaredFunction:
    @staticmethod
    def apply(x):
        return x.relu().square()
"""
TE_OPS = """
def SReLU():
    return lambda x: x.relu() ** 2
def SwiGLU():
    return lambda x: x.chunk(2, -1)[0].sigmoid() * x.chunk(2, -1)[0] * x.chunk(2, -1)[1]
"""


class FakeXielu:
    """The interface of the extension's class: three dimensions, scalars in x's dtype."""

    def forward(self, x, alpha_p, alpha_n, beta, eps, vector):
        assert x.ndim == 3 and alpha_p.dtype == alpha_n.dtype == x.dtype and (beta, vector) == (0.5, True)
        a_p, a_n = torch.nn.functional.softplus(alpha_p), beta + torch.nn.functional.softplus(alpha_n)
        low = torch.expm1(x.clamp(max=eps)) - x
        return torch.where(x > 0, a_p * x * x + beta * x, low * a_n + beta * x)


def loaded():
    names = ("liger_kernel", "transformer_engine", "xielu")
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}


@pytest.fixture
def import_from(monkeypatch):
    """Makes a folder's packages importable; afterwards this process knows what it knew before."""
    before = loaded()

    def forget():
        for name in loaded():
            del sys.modules[name]

    def put(folder):
        monkeypatch.syspath_prepend(folder)
        forget()

    yield put
    forget()
    sys.modules.update(before)


@pytest.fixture
def libraries(tmp_path, monkeypatch, import_from):
    """Stand-ins for the three libraries, importable."""
    contents = {
        "liger_kernel/ops/swiglu": LIGER_SWIGLU, "liger_kernel/ops/relu_squared": LIGER_RELU2,
        "transformer_engine/pytorch/ops": TE_OPS, "xielu/ops": "",
    }  # fmt: skip
    for name, text in contents.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(torch.classes, "xielu", SimpleNamespace(XIELU=FakeXielu), raising=False)
    import_from(tmp_path)
    return competitors.find()


def test_every_library_is_called_as_its_users_call_it(libraries):
    assert (libraries.absent, libraries.broken) == ([], [])
    assert {name: sorted(had) for name, had in libraries.functions.items()} == {
        "Liger": ["relu2", "swiglu"], "Transformer Engine": ["relu2", "swiglu"], "xIELU CUDA": ["xielu"],
    }  # fmt: skip
    x = torch.randn(16, 32, device=DEVICE)
    for had in libraries.functions.values():
        for name, function in had.items():
            base = cases.GATED.get(name, name)
            raw = shifted_params(base)
            want = kernels.apply(base, x, raw, gated=name in cases.GATED)
            torch.testing.assert_close(function(x, *raw), want, rtol=1e-4, atol=1e-5)


def test_libraries_that_are_not_there_or_do_not_load(tmp_path, import_from):
    (tmp_path / "xielu").mkdir()
    (tmp_path / "xielu" / "ops.py").write_text("raise OSError('libcudart.so.11: not found')")
    import_from(tmp_path)
    found = competitors.find()
    assert found.broken == ["xIELU CUDA (OSError: libcudart.so.11: not found)"]
    if DEVICE == "cpu":
        assert (found.functions, found.absent) == ({}, ["Liger", "Transformer Engine"])


def run_table(functions, name="relu2", text="96x64"):
    chosen = cases.select([name], [cases.parse_shape(text)], torch.float32)
    return table.run(chosen, {other: {name: f} for other, f in functions.items()}, DEVICE, gb_per_s=10.0)


def test_a_competitor_that_fails_or_computes_something_else_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(table, "compiled", lambda function: function)

    def broken(x):
        raise RuntimeError("no kernel image")

    done = run_table({"Good": lambda x: x.relu() ** 2, "Broken": broken, "Other": lambda x: x.relu()})
    assert [set(row["others"]) for row in done.rows] == [{"torch eager", "torch.compile", "Good"}] * 3
    assert done.notes[0] == "Broken, relu2 96x64: RuntimeError: no kernel image"
    assert done.notes[1].startswith("Other, relu2 96x64: left out, its values differ by ")
    assert len(done.notes) == 2


def test_our_own_failure_is_raised(monkeypatch):
    monkeypatch.setattr(table, "compiled", lambda function: function)
    monkeypatch.setattr(kernels, "backward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_table({})


def test_a_step_of_generation_is_compared_with_a_plain_operation(monkeypatch):
    monkeypatch.setattr(table, "compiled", lambda function: function)
    (row,) = run_table({}, "xielu", "64x32").rows
    assert row["op"] == "forward" and list(row["others"])[-1] == "torch.relu"


def test_what_was_not_reached_in_time_is_named():
    chosen = cases.select(["relu2"], [cases.parse_shape("96x64")], torch.float32)
    done = table.run(chosen, {}, DEVICE, 10.0, deadline=time.monotonic() - 1)
    assert (done.rows, done.left_out) == ([], ["relu2 96x64"])


def test_the_share_of_the_mlp():
    case = cases.Case("relu2", cases.Shape(96, 64, 48, hidden=32), torch.float32, ("forward", "backward"))
    times = {"forward": 2e5, "backward": 3e5}
    rows = [{"activation": "relu2", "shape": "96x64", "op": op, "median_us": us} for op, us in times.items()]
    (entry,) = mlp.shares([case], rows, DEVICE)
    assert entry["ours_us"] == 5e5 and entry["slowest"] == "activation"
    assert entry["share_percent"] == pytest.approx(100 * 5e5 / (5e5 + entry["fc1_us"] + entry["fc2_us"]))
    assert mlp.shares([case], rows[:1], DEVICE) == []  # no backward pass was timed


def test_the_clock_goes_over_all_buffers_and_leaves_preparation_out():
    seen = []
    work = timing.Work(lambda x, grad: time.sleep(0.02) or x, lambda x: seen.append(x) or time.sleep(0.002))
    clock = timing.Clock(work, [("a", None), ("b", None)])
    clock.now = time.perf_counter  # sleeping takes no thread's time
    samples = [clock.sample() for _ in range(4)]
    assert seen == ["a", "b", "a", "b"]
    assert 2000 <= min(samples) < 20000


def test_percentiles(monkeypatch):
    monkeypatch.setitem(timing.ROUNDS, "cpu", 20)
    values = iter([*[9e9] * timing.WARM_UP, *range(20, 0, -1)])
    found = timing.measure({"a": SimpleNamespace(method="clock", sample=lambda: next(values))}, "cpu")
    assert found == {"a": timing.Timing(11, 5, 17, "clock")}


@pytest.mark.gpu
@needs_gpu
def test_a_graph_on_the_gpu_computes_and_times_all_buffers():
    x = torch.randn(4, 1 << 24, device="cuda", requires_grad=True)
    buffers = [(row, torch.ones_like(row)) for row in x.detach().unbind()]
    replay = timing.sampler(table.work("forward", torch.relu, []), buffers, "cuda")
    assert isinstance(replay, timing.Replay)
    us = sorted(replay.sample() for _ in range(9))[4]
    assert 100 < 2 * 4 * (1 << 24) / us / 1e3 < 20_000  # GB/s
    assert all(torch.equal(got, row.relu()) for got, (row, _) in zip(replay.results, buffers, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_backward_pass_is_captured_for_us_and_for_torch():
    case = cases.select(["xielu"], [cases.parse_shape("512x1024")], torch.bfloat16)[0]
    inputs = table.make_inputs(case, "cuda")
    for function in table.functions(case, {}, inputs).values():
        replay = timing.sampler(table.work("backward", function, inputs.raw), inputs.buffers, "cuda")
        assert isinstance(replay, timing.Replay) and replay.sample() > 0
        want = kernels.backward("xielu", inputs.buffers[-1][1], inputs.buffers[-1][0], inputs.raw)
        got = replay.results[-1]
        torch.testing.assert_close(got[0], want.dx, rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(got[1], want.dparams[0], rtol=1e-2, atol=1.0)


@pytest.mark.gpu
@needs_gpu
def test_what_cannot_be_captured_is_timed_by_events_and_the_next_is_captured_again():
    buffers = [(torch.ones(1 << 20, device="cuda"), torch.ones(1, device="cuda"))]
    uncapturable = timing.Work(lambda x, grad: x, lambda x: x * x.sum().item())
    events = timing.sampler(uncapturable, buffers, "cuda")
    assert events.method == timing.EVENTS and events.sample() > 0
    assert timing.sampler(table.work("forward", torch.relu, []), buffers, "cuda").method == timing.GRAPH
