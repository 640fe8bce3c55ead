"""Experiments without training: YAML to command lines, what is finished, progress, failures."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_act.errors import UserError
from megatron_act.experiment import jobs, records
from megatron_act.experiment import layout as layouts
from megatron_act.experiment.layout import Layout
from megatron_act.experiment.parse import load_experiment, parse_experiment
from megatron_act.experiment.progress import Progress, Tail
from megatron_act.model_args import to_words

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = Path(__file__).parent / "data" / "experiment"  # by tools/compare.py: see test_experiment_report.py
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
LAYOUT = "--eval-interval 21 --log-interval 1 --num-workers 0 --seed 1234 --cpu --tensor-model-parallel-size 2"


def words_of(content: dict, folder: Path = ROOT, layout: Layout = CPU) -> list[str]:
    experiment = parse_experiment(content, folder)
    return [" ".join(run.words) for run in experiment.runs(experiment.layout(layout))]


def test_arms_become_exact_command_lines() -> None:
    assert [sorted(words.split()) for words in words_of({**CONTENT, "arms": ["swiglu", "relu2", "xielu"]})] == [
        sorted(f"{COMMON}{mlp} {LAYOUT}".split())
        for mlp in (
            "--swiglu --ffn-hidden-size 64",
            "--activation relu2 --ffn-hidden-size 96",
            "--activation xielu --ffn-hidden-size 96",
        )
    ]


def test_an_arms_own_flags_win() -> None:
    arm = {"name": "hot", "activation": "crrelu", "flags": {"--lr": 0.02, "--activation-init": ["eps=0.1"]}}
    (words,) = words_of({**CONTENT, "arms": [arm]})
    expected = COMMON.replace("--lr 0.01", "--lr 0.02")
    mlp = "--activation-init eps=0.1 --activation crrelu --ffn-hidden-size 96"
    assert sorted(words.split()) == sorted(f"{expected}{mlp} {LAYOUT}".split())


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
    assert f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path}/tok --full-validation" in words
    assert "--vocab-size" not in words
    assert experiment.match(experiment.arms[0], CPU).target.vocab_size == 256  # 3 tokens, padded to 128 x 2 ranks


def test_base_config_is_read_and_base_wins(tmp_path: Path) -> None:
    flags = {**BASE, "--swiglu": True, "--ffn-hidden-size": 64}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"MODEL_ARGS": flags}))
    content = {"name": "n", "base_config": "m.yaml", "base": {"--lr": 0.5}, "arms": ["xielu"]}
    (words,) = words_of(content, tmp_path)
    assert "--lr 0.5 " in words and "--activation xielu " in words and "--ffn-hidden-size 96 " in words
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
        (
            {"base": {**BASE, "--train-iters": "many"}},
            "--train-iters: expected a whole number of at least 1, got 'many'",
        ),
        (
            {"arms": [{"activation": "xielu", "flags": {"--train-iters": 9}}]},
            "arms.flags: expected no --train-iters, got",
        ),
        ({"base": {**BASE, "--mock-data": False}}, "data: expected .*, got nothing"),
        ({"baseline": {"activation": "swiglu"}}, "baseline.ffn_hidden_size: expected a whole number, got None"),
        ({"baseline": "swiglu"}, "baseline: expected a mapping with activation, ffn_hidden_size, got 'swiglu'"),
        ({"data": ["absent"]}, "data: expected .*absent.idx, got no such file"),
        ({"layout": {"ranks": "two"}}, "layout.ranks: expected a whole number of at least 1, got 'two'"),
        ({"layout": {"device": "tpu"}}, "layout.device: expected cpu or cuda, got 'tpu'"),
        ({"equal": ["time"]}, "equal: expected tokens, flops, seconds, got 'time'"),
        ({"learning_rates": [1e-3]}, "tuning_seeds: expected a list with at least one entry, got None"),
        (
            {"learning_rates": ["1e-3"], "tuning_seeds": [9]},
            "learning_rates: expected numbers above 0, got '1e-3': YAML",
        ),
        ({"learning_rates": [1e-3], "tuning_seeds": [1234]}, "tuning_seeds: expected none of seeds, got 1234"),
        ({"schedule": {"kind": "linear"}}, "schedule.kind: expected wsd or cosine, got 'linear'"),
        ({"schedule": {"kind": "wsd", "warmup": 2}}, "schedule.warmup: expected a share in \\[0, 1\\), got 2"),
        ({"schedule": {"kind": "cosine", "decay": 0.2}}, "schedule.decay: expected none with cosine, got 0.2"),
        ({"evaluations": 0}, "evaluations: expected a whole number of at least 1, got 0"),
        ({"slurm": ["a"]}, "slurm: expected sbatch options as name: value"),
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
    assert found.flags() == [*expected, "--no-gradient-accumulation-fusion"]  # apex's kernel is not there
    with pytest.raises(UserError, match=f"expected at most {gpus} ranks .* got 9"):
        layouts.detect(ranks=9)


def test_finished_means_same_words_and_same_data(tmp_path: Path) -> None:
    (run, _) = parse_experiment(CONTENT, ROOT).runs(CPU)
    folder = records.run_folder(tmp_path, run)
    folder.clear()
    shutil.copy(FIXTURE / "runs" / "swiglu-lr0.01-seed1" / "metrics.jsonl", folder.metrics)
    folder.checkpoint.mkdir()
    (folder.checkpoint / "latest_checkpointed_iteration.txt").write_text("20")
    assert not records.is_finished(folder, run)  # never marked: it was killed
    records.write_record(folder, run, ["python"], 1.0, "here")
    assert records.is_finished(folder, run) and json.loads(folder.record.read_text())["layout"] == "here"
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
    assert jobs.error_line(log) == line


def test_failure_is_bad_input_only_where_the_run_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("error: --lr: expected a number\n")
    error = jobs.failure("xielu", log, 1)
    assert isinstance(error, UserError) and str(error) == f"xielu: --lr: expected a number (log: {log})"
    log.write_text("error: unexpected RuntimeError: no memory\n")
    assert isinstance(jobs.failure("xielu", log, 1), jobs.RunFailed)
    log.write_text("")
    assert str(jobs.failure("xielu", log, -9)) == f"xielu: ended by SIGKILL (log: {log})"


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
