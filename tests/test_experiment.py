"""Experiments without training: YAML to command lines, a real run's files to figures, table and page."""

import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_act.errors import UserError
from megatron_act.experiment import layout as layouts
from megatron_act.experiment import records, results, runner, table
from megatron_act.experiment.arms import load_experiment, parse_experiment, to_words
from megatron_act.experiment.layout import Layout
from megatron_act.experiment.progress import Progress, Tail
from megatron_act.experiment.report import write_report

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = Path(__file__).parent / "data" / "experiment"  # by tools/compare.py: 2 arms x 2 seeds, 20 steps
CPU = Layout("cpu", 2, 2, 1, False, "a CPU")
BASE = {
    "--num-layers": 2,
    "--hidden-size": 32,
    "--num-attention-heads": 2,
    "--seq-length": 32,
    "--vocab-size": 128,
    "--train-iters": 20,
    "--lr": 0.01,
    "--disable-bias-linear": True,
    "--add-qkv-bias": False,
    "--position-embedding-type": "rope",
    "--untie-embeddings-and-output-weights": True,
    "--mock-data": True,
    "--tokenizer-type": "NullTokenizer",
}
CONTENT = {
    "name": "small",
    "base": BASE,
    "baseline": {"activation": "swiglu", "ffn_hidden_size": 64},
    "arms": ["swiglu", "xielu"],
}
COMMON = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --vocab-size 128 --train-iters 20 "
    "--lr 0.01 --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights --mock-data "
    "--tokenizer-type NullTokenizer "
)
LAYOUT = "--log-interval 1 --num-workers 0 --eval-interval 21 --seed 1234 --cpu --tensor-model-parallel-size 2"


def words_of(content: dict, folder: Path = ROOT, layout: Layout = CPU) -> list[str]:
    experiment = parse_experiment(content, folder)
    return [" ".join(run.words) for run in experiment.runs(experiment.layout(layout))]


def test_arms_become_exact_command_lines() -> None:
    assert words_of({**CONTENT, "arms": ["swiglu", "relu2", "xielu"]}) == [
        f"{COMMON}--swiglu --ffn-hidden-size 64 {LAYOUT}",
        f"{COMMON}--activation relu2 --ffn-hidden-size 96 {LAYOUT}",
        f"{COMMON}--activation xielu --ffn-hidden-size 96 {LAYOUT}",
    ]


def test_an_arms_own_flags_win() -> None:
    arm = {"name": "hot", "activation": "crrelu", "flags": {"--lr": 0.02, "--activation-init": ["eps=0.1"]}}
    (words,) = words_of({**CONTENT, "arms": [arm]})
    expected = COMMON.replace("--lr 0.01", "--lr 0.02")
    assert words == f"{expected}--activation-init eps=0.1 --activation crrelu --ffn-hidden-size 96 {LAYOUT}"


def test_seeds_repeat_every_arm() -> None:
    experiment = parse_experiment({**CONTENT, "seeds": [3, 5]}, ROOT)
    runs = experiment.runs(CPU)
    assert [run.folder for run in runs] == ["swiglu-seed3", "xielu-seed3", "swiglu-seed5", "xielu-seed5"]
    assert [run.words[run.words.index("--seed") + 1] for run in runs] == ["3", "3", "5", "5"]


def test_width_is_solved_at_the_layouts_tensor_parallel_size() -> None:
    content = {**CONTENT, "baseline": {"activation": "swiglu", "ffn_hidden_size": 60}, "align": 16, "arms": ["xielu"]}
    experiment = parse_experiment(content, ROOT)
    match = experiment.match(experiment.arms[0], CPU)
    assert match.target.ffn_hidden_size == 96  # 90 to a multiple of 2 x 16
    assert not match.exact
    matmul, excess = 2 * (32 * 96 + 32 * 32) + 3 * 2 * 32 * 60 + 256 * 32, 2 * 2 * 32 * 6
    assert match.residual_parameters_percent == pytest.approx(100 * excess / matmul)


def test_layout_decides_device_and_precision() -> None:
    gpu = Layout("cuda", 2, 2, 8, False, "GPU x 2")
    content = {**CONTENT, "base": {**BASE, "--bf16": False, "--cpu": True, "--tensor-model-parallel-size": 4}}
    (words, _) = words_of(content, layout=gpu)
    assert words.endswith(
        "--seed 1234 --bf16 --tensor-model-parallel-size 2 --transformer-impl local --no-rope-fusion "
        "--no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion"
    )
    assert "--cpu" not in words and "--tensor-model-parallel-size 4" not in words


def test_data_and_tokenizer_become_absolute_words(tmp_path: Path) -> None:
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "unk_token": "a"}}
    tokenizer["model"]["vocab"] = {"a": 0, "b": 1, "c": 2}
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("t.idx", "v.idx"):
        (tmp_path / name).write_bytes(b"")
    base = {key: value for key, value in BASE.items() if key not in ("--mock-data", "--tokenizer-type")}
    content = {**CONTENT, "base": base, "data": {"train": ["t"], "valid": ["v"]}, "tokenizer": "tok"}
    experiment = parse_experiment(content, tmp_path)
    words = " ".join(experiment.runs(CPU)[0].words)
    assert f"--train-data-path {tmp_path}/t --valid-data-path {tmp_path}/v --seed" in words
    assert f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path}/tok" in words
    assert "--vocab-size" not in words
    assert experiment.match(experiment.arms[0], CPU).target.vocab_size == 256  # 3 tokens, padded to 128 x 2 ranks


def test_base_config_is_read_and_base_wins(tmp_path: Path) -> None:
    flags = {**BASE, "--swiglu": True, "--ffn-hidden-size": 64}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"MODEL_ARGS": flags}))
    content = {"name": "n", "base_config": "m.yaml", "base": {"--lr": 0.5}, "arms": ["xielu"]}
    (words,) = words_of(content, tmp_path)
    assert "--lr 0.5 " in words and words.endswith(f"--activation xielu --ffn-hidden-size 96 {LAYOUT}")
    assert "--swiglu" not in words


def test_words_of_each_kind_of_value() -> None:
    flags = {"--a": True, "--b": False, "--c": None, "--d": 1.5e-3, "--e": [1, "x=2"]}
    assert to_words(flags) == ["--a", "--d", "0.0015", "--e", "1", "x=2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["xielo"]}, "arms: expected activations among .*, got 'xielo'; did you mean xielu?"),
        ({"arms": []}, "arms: expected a list with at least one entry, got \\[\\]"),
        ({"arms": ["xielu", "xielu"]}, "arms: expected distinct names, got xielu, xielu: add name:"),
        ({"arms": [{"name": "../x", "activation": "xielu"}]}, "arms.name: expected letters, .*, got '../x'"),
        ({"arm": ["xielu"]}, "the file: expected keys .*, got 'arm'; did you mean arms?"),
        ({"base": {"num-layers": 2}}, "base: expected '--flag: value' pairs, got"),
        ({"base": {**BASE, "--save": "x"}}, "base: expected no --save, got 'x'"),
        ({"base": {**BASE, "--train-iters": "many"}}, "--train-iters: expected a whole number, got 'many'"),
        ({"base": {**BASE, "--mock-data": False}}, "data: expected .*, got nothing"),
        ({"baseline": {"activation": "swiglu"}}, "baseline.ffn_hidden_size: expected a whole number, got None"),
        ({"baseline": "swiglu"}, "baseline: expected a mapping with activation, ffn_hidden_size, got 'swiglu'"),
        ({"data": ["absent"]}, "data: expected .*absent.idx, got no such file"),
        ({"layout": {"ranks": "two"}}, "layout.ranks: expected a whole number, got 'two'"),
        ({"seeds": [1.5]}, "seeds: expected a whole number, got 1.5"),
        ({"name": None}, "name: expected text, got None"),
    ],
)
def test_bad_yaml_names_key_expected_and_got(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        parse_experiment({**CONTENT, **change}, ROOT)


def test_a_layout_that_the_model_cannot_have_is_refused() -> None:
    experiment = parse_experiment({**CONTENT, "layout": {"ranks": 3, "tensor_parallel": 3}}, ROOT)
    with pytest.raises(UserError, match=r"--ffn-hidden-size: expected a multiple .* 3, got 64"):
        experiment.runs(experiment.layout(CPU))
    experiment = parse_experiment({**CONTENT, "layout": {"ranks": 3, "tensor_parallel": 2}}, ROOT)
    with pytest.raises(UserError, match="expected ranks as a multiple of tensor_parallel, got 3 and 2"):
        experiment.layout(CPU)


@pytest.mark.parametrize("text", [None, "a: [", "just text"])
def test_bad_files_end_with_code_2_and_one_line(tmp_path: Path, text: str | None) -> None:
    path, output = tmp_path / "e.yaml", tmp_path / "out"
    if text is not None:
        path.write_text(text)
    tool = [sys.executable, "tools/compare.py", str(path), "--output", str(output)]
    done = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: ") and done.stderr.count("\n") == 1
    assert not output.exists()


def test_layout_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(layouts, "usable_cores", lambda: 8)
    found = layouts.detect()
    assert (found.device, found.ranks, found.tensor_parallel, found.threads_per_rank) == ("cpu", 2, 2, 4)
    assert found.flags() == ["--cpu", "--tensor-model-parallel-size", "2"]
    assert str(found).endswith(": 2 ranks x 4 threads each, tensor parallel 2, fp32, gloo, local layers")


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 1), (2, 2), (8, 2)])
def test_layout_by_number_of_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int, ranks: int) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(layouts, "_has_transformer_engine", lambda: True)
    found = layouts.detect()
    assert (found.device, found.ranks, found.tensor_parallel) == ("cuda", ranks, ranks)
    expected = ["--bf16", "--tensor-model-parallel-size", str(ranks), "--transformer-impl", "transformer_engine"]
    assert found.flags() == expected
    with pytest.raises(UserError, match=f"expected at most {gpus} ranks .* got 9"):
        layouts.detect(ranks=9)


def lines_of(run: str) -> list[dict]:
    return [json.loads(line) for line in (FIXTURE / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def test_results_are_the_runs_figures() -> None:
    found = results.collect(FIXTURE)
    xielu = next(arm for arm in found["arms"] if arm["name"] == "xielu")
    runs = [lines_of(f"xielu-seed{seed}") for seed in (1, 2)]
    train = [
        statistics.mean(
            line["loss"] for line in lines[-30:] if line.get("iteration", 0) in (19, 20) and line["event"] == "step"
        )
        for lines in runs
    ]
    valid = [[line["loss"] for line in lines if line.get("split") == "validation"][-1] for lines in runs]
    assert xielu["final_train_loss"]["mean"] == pytest.approx(sum(train) / 2, rel=1e-12)
    assert xielu["final_train_loss"]["sd"] == pytest.approx(abs(train[0] - train[1]) / math.sqrt(2), rel=1e-9)
    assert xielu["validation_loss"]["mean"] == pytest.approx(sum(valid) / 2, rel=1e-12)
    assert xielu["validation_perplexity"]["mean"] == pytest.approx(sum(map(math.exp, valid)) / 2, rel=1e-12)
    assert (xielu["tokens"], xielu["ffn_hidden_size"]) == (20 * 4 * 32, 96)
    # 2 layers x (attention 4 h^2 + MLP 2 h F) + embedding and output, norms, 4 scalars
    without = 2 * (4 * 32**2 + 2 * 32 * 96) + 2 * (2 * 32 + 2 * 16) + 32 + 4
    assert xielu["parameters_without_embeddings"] == without
    assert xielu["parameters"] == xielu["parameters_built"] == without + 2 * 256 * 32
    flops = 3 * 2 * (2 * (4 * 32**2 + 2 * 32 * 96) + 256 * 32) + 3 * 2 * (4 * 32 * 32) // 2
    assert xielu["flops_per_token"] == flops
    assert xielu["total_flops"] == flops * 2560
    assert xielu["scalars_initial"] == {"alpha_p": [0.8, 0.8], "alpha_n": [0.8, 0.8]}
    last = [[line for line in lines if line["event"] == "step"][-1]["scalars"]["alpha_p"] for lines in runs]
    assert xielu["scalars_final"]["alpha_p"] == pytest.approx([(a + b) / 2 for a, b in zip(*last, strict=True)])
    assert found["note"] == "2 seeds: mean ± standard deviation"


def test_arms_are_matched() -> None:
    swiglu, xielu = results.collect(FIXTURE)["arms"]
    assert swiglu["flops_per_token"] == xielu["flops_per_token"]
    assert xielu["parameters"] - swiglu["parameters"] == 4  # two scalars in each of two layers
    assert results.collect(FIXTURE)["match"]["xielu"]["exact"] is True


def test_speed_ignores_evaluations() -> None:
    steps = [{"event": "step", "iteration": i, "tokens": 100 * i, "loss": 1.0, "scalars": {}} for i in range(1, 6)]
    for step, seconds in zip(steps, (0.0, 0.1, 0.2, 9.2, 9.3), strict=True):  # an evaluation took 9 s
        step["seconds"] = seconds
    assert results.tokens_per_second(results.read_curve(steps)) == pytest.approx(1000.0)


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "one")
    description = json.loads((tmp_path / "one" / "experiment.json").read_text())
    description["runs"] = [run for run in description["runs"] if run["seed"] == 1]
    (tmp_path / "one" / "experiment.json").write_text(json.dumps(description))
    text = table.terminal_table(results.collect(tmp_path / "one"))
    assert text.endswith("\n1 seed: no interval, no winner claimed")
    assert "±" not in text


def test_table_shows_mean_and_deviation() -> None:
    assert table.with_spread({"mean": 4.5, "sd": None}, 4) == "4.5000"
    assert table.with_spread({"mean": 4.5, "sd": 0.0123}, 4) == "4.5000 ± 0.0123"
    assert table.with_spread({"mean": None, "sd": None}, 4) == "-"
    found = results.collect(FIXTURE)
    loss = found["arms"][1]["final_train_loss"]
    assert f"{loss['mean']:.4f} ± {loss['sd']:.4f}" in table.terminal_table(found)
    rows = table.markdown(table.HEADINGS, table.result_rows(found)).splitlines()
    assert rows[0].startswith("| arm | MLP width |") and rows[2].startswith("| swiglu | 64 |") and len(rows) == 4


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not nest."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    folder = tmp_path_factory.mktemp("report") / "out"
    shutil.copytree(FIXTURE, folder)
    export = {"family": "ApertusForCausalLM", "max_logit_difference": 2.5e-6, "generated": "<b>Rome & sons"}
    (folder / "export.json").write_text(json.dumps({"arms": {"xielu": export}}))
    path = write_report(folder)
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return path, page


def test_report_holds_every_figure_and_nothing_external(report: tuple[Path, Page]) -> None:
    path, page = report
    html = path.read_text(encoding="utf-8")
    figures = [attributes["id"] for tag, attributes in page.tags if tag == "figure"]
    assert figures == ["loss_tokens", "loss_flops", "scalars", "activations", "activation_changes"]
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(figures)
    for name in figures:
        assert (path.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe", "object")]
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key.endswith(("src", "href"))]
    assert links and all(value.startswith("#") for value in links)  # glyph and clip references inside a figure
    assert set(re.findall(r'https?://[^"<> ]+', html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in html and "url(h" not in html
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in html and "currentColor" in html and "#24292f" not in html


def test_report_says_what_was_measured(report: tuple[Path, Page]) -> None:
    path, page = report
    text = " ".join(page.text)
    found = json.loads((path.parent / "results.json").read_text())
    for arm in found["arms"]:
        assert f"{arm['validation_loss']['mean']:.4f} ± {arm['validation_loss']['sd']:.4f}" in text
        assert f"{arm['parameters']:,} / {arm['parameters_built']:,}" in text
    for run in found["runs"]:
        assert run["command"] in text and " --metrics-jsonl " in run["command"]
        assert run["versions"]["megatron_core"] in text
    assert "ApertusForCausalLM" in text and "2.50e-06" in text and "<b>Rome & sons" in text
    assert "2 seeds: mean ± standard deviation." in text


def test_report_names_unfinished_runs(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "out")
    metrics = tmp_path / "out" / "runs" / "xielu-seed2" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:8]))
    (metrics.parent / "run.json").unlink()
    text = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "2 seeds: mean ± standard deviation. Not finished: xielu (seed 2)." in text


def test_curves_are_the_reference_at_the_learned_scalars() -> None:
    from megatron_act.experiment.figures import activation_values

    x = np.array([-2.0, 0.0, 1.5])
    arm = {"activation": "xielu"}
    y = activation_values(arm, x, {"alpha_p": [0.0, 1.1], "alpha_n": [0.0, 0.7]}, layer=1)
    expected = [0.7 * (math.expm1(-2.0) + 2.0) + 0.5 * -2.0, 0.0, 1.1 * 1.5**2 + 0.5 * 1.5]
    assert y == pytest.approx(expected, rel=1e-12)
    gate = activation_values({"activation": "swiglu"}, x, {}, layer=0)
    assert gate == pytest.approx([value / (1 + math.exp(-value)) for value in x], rel=1e-12)


def test_smoothing_keeps_lines_straight_and_constants_exact() -> None:
    from megatron_act.experiment.figures import smooth

    line = [float(i) for i in range(200)]
    assert smooth(line)[4:-4] == pytest.approx(line[4:-4])  # reach 4 on both sides
    assert smooth(line)[0] == pytest.approx(2.0)  # mean of 0..4
    assert smooth([7.0] * 50) == pytest.approx([7.0] * 50)


def test_a_folder_without_an_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected an experiment's folder, got no experiment\.json"):
        write_report(tmp_path)


def test_finished_means_same_words_and_same_data(tmp_path: Path) -> None:
    (run, _) = parse_experiment(CONTENT, ROOT).runs(CPU)
    folder = records.run_folder(tmp_path, run)
    folder.clear()
    shutil.copy(FIXTURE / "runs" / "swiglu-seed1" / "metrics.jsonl", folder.metrics)
    folder.checkpoint.mkdir()
    (folder.checkpoint / "latest_checkpointed_iteration.txt").write_text("20")
    assert not records.is_finished(folder, run)  # never marked: it was killed
    records.write_record(folder, run, ["python"], 1.0)
    assert records.is_finished(folder, run)
    (other, _) = parse_experiment({**CONTENT, "base": {**BASE, "--lr": 0.02}}, ROOT).runs(CPU)
    assert not records.is_finished(folder, other)
    (folder.checkpoint / "latest_checkpointed_iteration.txt").write_text("10")
    assert not records.is_finished(folder, run)


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    (tmp_path / "data.idx").write_bytes(b"index")
    (tmp_path / "data.bin").write_bytes(b"tokens")
    before = records.fingerprint(str(prefix))
    os.utime(tmp_path / "data.bin", (1, 1))
    assert records.fingerprint(str(prefix)) == before
    (tmp_path / "data.bin").write_bytes(b"tokenS")
    assert records.fingerprint(str(prefix)) != before
    assert records.fingerprint("--lr") is None


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("noise\nerror: --lr: bad\nTraceback\nValueError: later\n", "error: --lr: bad"),
        ("[rank1]: RuntimeError: Connection closed by peer\n[rank0]: ValueError: real\n", "ValueError: real"),
        (
            "x\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n y Signal 9 (SIGKILL) received\n",
            "y Signal 9 (SIGKILL) received",
        ),
        ("only\nwords\n", "words"),
        ("", ""),
    ],
)
def test_the_log_line_that_says_why(log: str, line: str) -> None:
    assert runner.error_line(log) == line


def test_failure_is_bad_input_only_where_the_run_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("error: --lr: expected a number\n")
    error = runner.failure("xielu", log, 1)
    assert isinstance(error, UserError) and str(error) == f"xielu: --lr: expected a number (log: {log})"
    log.write_text("error: unexpected RuntimeError: no memory\n")
    assert isinstance(runner.failure("xielu", log, 1), runner.RunFailed)
    log.write_text("")
    assert str(runner.failure("xielu", log, -9)) == f"xielu: ended by SIGKILL (log: {log})"


def test_progress_without_a_terminal_prints_tenths() -> None:
    stream = io.StringIO()
    progress = Progress("xielu", 100, stream)
    for iteration in range(5, 101, 5):
        progress.update([{"event": "step", "iteration": iteration, "loss": 3.0}])
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"xielu: {n}% ({n}/100)" for n in range(10, 101, 10)]
    assert lines[0].startswith("xielu: 10% (10/100), loss 3.000, about ")
    assert lines[-1] == "xielu: 100% (100/100), loss 3.000"


def test_progress_on_a_terminal_is_a_bar_with_loss_even_without_a_width() -> None:
    master, slave = os.openpty()  # its width is 0
    with os.fdopen(slave, "w") as stream:
        progress = Progress("xielu", 100, stream)
        progress.update([{"event": "step", "iteration": 50, "loss": 2.5}])
        progress.bar.refresh()
        progress.close()
        stream.flush()
        text = os.read(master, 1 << 16).decode()
    os.close(master)
    assert re.search(r"xielu  50%\|█+. +\| 50/100 \[\d\d:\d\d<\d\d:\d\d, loss 2\.500\]", text)


def test_tail_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"a": 1}\n{"a":')
    assert tail.read() == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert tail.read() == [{"a": 2}]


def test_the_written_example_is_valid(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(yaml.safe_dump({**CONTENT, "seeds": [7]}))
    assert load_experiment(tmp_path / "e.yaml").seeds == (7,)
