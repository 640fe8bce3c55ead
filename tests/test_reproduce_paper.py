"""The paper's runs: the plan's figures by hand, every command of the dry run, and one command as it is run."""

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_act import reproduce_paper
from megatron_act.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "reproduce_paper.sh"
PARAMETERS = {"paper-1.1b": 1_132_537_344, "paper-3b": 3_020_048_384}
ALONE = ["--nodes", "1", "--gpus-per-node", "1"]


def script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **environment}
    return subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, env=env, timeout=300)


def plan(capsys, *words: str) -> tuple[list[list[str]], str]:
    """A dry run in this process: every training command's words, and all that was printed."""
    assert reproduce_paper.main(["--dry-run", *words]) == 0
    output = capsys.readouterr().out
    lines = [line.strip() for line in output.splitlines() if "torch.distributed.run" in line]
    return [shlex.split(line) for line in lines], output


def after(words: list[str], flag: str, count: int = 1) -> list[str]:
    start = words.index(flag) + 1
    return words[start : start + count]


def test_dry_run_prints_every_command_and_runs_none(tmp_path):
    done = script("--dry-run", "--output", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    commands = [shlex.split(line) for line in done.stdout.splitlines() if "torch.distributed.run" in line]
    configs = [Path(after(words, "--config")[0]) for words in commands]
    models = [f"{model}-{name}.yaml" for model in ("paper-1.1b", "paper-3b") for name in ("swiglu", "relu2", "xielu")]
    assert [path.name for path in configs] == models
    assert all(path.is_file() for path in configs)
    assert "preprocess_fineweb_edu.py --hub-config sample-100BT" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_commands_are_the_papers(capsys):
    """What is no hyper-parameter comes from the command line; the rest is the config's (test_configs.py)."""
    words = ("--activation", "xielu", "--train", "a", "b", "--valid", "v", "--tokenizer", "t", "--output", "out")
    commands, output = plan(capsys, *words, "--", "--overlap-grad-reduce")
    assert "preprocess_fineweb_edu" not in output  # the data is there
    for command, nodes, name in zip(commands, ("11", "32"), ("paper-1.1b", "paper-3b"), strict=True):
        assert command[0] == "CUDA_DEVICE_MAX_CONNECTIONS=1"
        assert after(command, "-m", 1) == ["torch.distributed.run"]
        assert after(command, "--nnodes", 3) == [nodes, "--nproc-per-node", "8"]
        assert after(command, "--rdzv-backend", 3) == ["c10d", "--rdzv-endpoint", "HOST:PORT"]
        assert after(command, "--micro-batch-size") == ["5"]
        assert after(command, "--train-data-path", 4) == ["a", "b", "--valid-data-path", "v"]
        checkpoint = f"out/{name}-xielu-seed42/checkpoint"
        assert after(command, "--save", 3) == [checkpoint, "--load", checkpoint]
        assert command[-1] == "--overlap-grad-reduce"
        assert "--activation-init" not in command and "--seed" not in command


def test_other_machines_seeds_and_initial_values(capsys):
    words = ("--model", "paper-1.1b", "--seed", "1", "2", "--nodes", "1", "--gpus-per-node", "4")
    commands, output = plan(capsys, *words, "--micro-batch-size", "10", "--xielu-init", "early")
    seeds = [after(words, "--seed")[0] for words in commands]
    assert seeds == ["1"] * 3 + ["2"] * 3
    assert all("--standalone" in words and "--rdzv-endpoint" not in words for words in commands)
    assert "4 GPUs (1 x 4), TP 1, DP 4, micro-batches 10 x 11 a step" in output
    early = [words for words in commands if "--activation-init" in words]
    assert [after(words, "--config")[0][-10:-5] for words in early] == ["xielu", "xielu"]
    assert after(early[0], "--activation-init", 2) == ["alpha_p=0.257973", "alpha_n=0.604688"]
    assert after(early[0], "--save")[0].endswith("paper-1.1b-xielu-early-seed1/checkpoint")


@pytest.mark.parametrize(
    ("model", "flops_per_token", "tokens", "hours", "checkpoints"),
    [
        # 6 FLOPs a matmul parameter; 6 for each of 4096 x layers x hidden size (half of the square)
        ("paper-1.1b", 6 * 1_132_462_080 + 6 * 4096 * 24 * 1536, 126_156_800_000, "682", 7),
        ("paper-3b", 6 * 2_717_908_992 + 6 * 4096 * 36 * 2048, 125_829_120_000, "1,600", 5),  # without the embedding
    ],
)  # fmt: skip
def test_estimates_by_hand(capsys, model, flops_per_token, tokens, hours, checkpoints):
    _, output = plan(capsys, "--model", model, "--activation", "xielu", "--mfu", "0.4")
    total = flops_per_token * tokens
    assert f"{total / (0.4 * 989.4e12) / 3600:,.0f}" == hours
    assert f"  {total:.3g} FLOPs: {hours} GPU-hours" in output
    size = 14 * PARAMETERS[model]
    assert f"{checkpoints} checkpoints of {size / 1e9:.1f} GB" in output
    disk = 4 * tokens + checkpoints * size
    assert output.splitlines()[-1].startswith(f"1 runs: {hours} GPU-hours at 40% of 989.4 TFLOP/s, an estimate; ")
    assert f"disk {disk / 1e12:.2f} TB: tokens {4 * tokens / 1e9:,.0f} GB, checkpoints" in output
    _, halved = plan(capsys, "--model", model, "--activation", "xielu", "--mfu", "0.8", "--save-interval", "1000000")
    assert f"{total / (0.8 * 989.4e12) / 3600:,.0f} GPU-hours, " in halved
    assert f"1 checkpoints of {size / 1e9:.1f} GB" in halved


BAD = [
    ("", "--train: expected a value, got none: give it, or --dry-run"),
    ("--train a --valid b --tokenizer t", "--rendezvous: expected a value, got none"),
    ("--train a --valid b --tokenizer t --rendezvous h:1", "a.idx: expected token files, got none: run tools/prepro"),
    ("--dry-run --model paper-2b", "--model: expected one of 125m, "),
    ("--dry-run --model apertus-8b", "apertus-8b: expected --train-iters in "),
    ("--dry-run --activation silu", "paper-1.1b-silu.yaml: expected a config, got none: write it with tools/compute"),
    ("--dry-run --nodes 2", "paper-1.1b: expected 1, 2, 4, 8, 11, 22, 44, 88 GPUs for 88 micro-batches of 5 sequences"),
    ("--dry-run --model paper-3b --nodes 1 --gpus-per-node 3", "paper-3b: expected a multiple of 2 GPUs"),
    ("--dry-run --micro-batch-size 3", "--micro-batch-size: expected a divisor of the batch of 440, got 3"),
    ("--dry-run --micro-batch-size -1", "--micro-batch-size: expected a divisor of the batch of 440, got -1"),
    ("--dry-run --nodes 0", "--nodes: expected an integer of at least 1, got 0"),
    ("--dry-run --gpus-per-node 0", "--gpus-per-node: expected an integer of at least 1, got 0"),
    ("--dry-run --save-interval 0", "--save-interval: expected an integer of at least 1, got 0"),
    ("--dry-run --mfu 1.5", "--mfu: expected a share of the peak, above 0 and at most 1, got 1.5"),
    ("--dry-run --peak-tflops 0", "--peak-tflops: expected TFLOP/s above 0, got 0"),
    ("--dry-run --frobnicate", "unrecognized arguments: --frobnicate (see --help)"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_refused_before_anything_runs(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        reproduce_paper.main(words.split())
    assert message in str(error.value)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_script_ends_with_2_and_one_line(tmp_path):
    for done in (script("--dry-run", "--nodes", "0"), script(PYTHON=str(tmp_path / "python"))):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    from megatron_act.data import sample_path
    from megatron_act.data.bpe import train_bpe
    from megatron_act.data.preprocess import preprocess
    from megatron_act.data.source import iter_texts

    folder = tmp_path_factory.mktemp("data")
    train_bpe(itertools.islice(iter_texts([sample_path()]), 300), 512, folder / "tokenizer")
    preprocess([sample_path()], folder / "tokenizer", folder / "text", workers=1)
    return ["--train", str(folder / "text"), "--valid", str(folder / "text"), "--tokenizer", str(folder / "tokenizer")]


def test_a_run_as_the_script_starts_it(data, tmp_path):
    """The same script with the smallest model on a CPU: two steps, a checkpoint of 14 bytes a parameter, and on."""
    words = ["--model", "tiny", "--activation", "xielu", *ALONE, *data]
    words += [
        "--output",
        str(tmp_path),
        "--xielu-init",
        "early",
        "--",
        "--cpu",
        "--bf16",
        "--use-distributed-optimizer",
    ]
    words += [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--log-interval",
        "1",
        "--eval-iters",
        "0",
        "--num-workers",
        "0",
    ]
    folder = tmp_path / "tiny-xielu-early-seed42"
    first = script(*words, "--train-iters", "2", "--exit-interval", "2")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in steps if record["event"] == "step"]
    assert [record["iteration"] for record in steps] == [1, 2]
    assert steps[0]["scalars"]["alpha_p"] == pytest.approx([0.257973] * 4, abs=2e-3)  # after one step
    saved = folder / "checkpoint" / "iter_0000002"
    parameters = 2_098_560 - 2 * (4096 - 512) * 128  # the tokenizer's vocabulary
    size = sum(file.stat().st_size for file in saved.iterdir())
    assert 14 * parameters <= size < 14 * parameters * 1.02 + 200_000

    (folder / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("300")
    again = script(*words)
    assert again.returncode == 0
    assert again.stdout.splitlines()[-1] == "tiny-xielu-early-seed42: finished already, kept"


def test_a_run_that_fails_ends_with_1_and_starts_no_other(data, tmp_path, monkeypatch, capsys):
    started = []

    def command(run, inputs):
        started.append(run.name)
        return [sys.executable, "-c", "raise SystemExit(3)"]

    monkeypatch.setattr(reproduce_paper.Run, "command", command)
    words = ["--model", "tiny", "--activation", "relu2", "xielu", *ALONE, *data, "--output", str(tmp_path)]
    assert reproduce_paper.main(words) == 1
    message = "error: tiny-relu2-seed42: its command ended with exit code 3; its output above says why\n"
    assert capsys.readouterr().err == message
    assert started == ["tiny-relu2-seed42", "tiny-xielu-seed42", "tiny-relu2-seed42"]  # shown, shown, run
