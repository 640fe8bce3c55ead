"""The entry point: --spec from a foreign one, --config, bf16, the frozen flags."""

import argparse
import json
import re
from pathlib import Path

import pytest
from training_support import MODEL_FLAGS, Train, torchrun

from megatron_act import arguments
from megatron_act.cpu_backend import FLAGS

WORKERS = Path(__file__).parent / "workers"


def logged_losses(log: str) -> list[str]:
    """The losses as Megatron prints them (its second line averages the first two steps)."""
    return re.findall(r"lm loss: (\S+)", log)


@pytest.mark.distributed
def test_spec_from_a_megatron_lm_entry_trains_the_same_model(train: Train, data_flags: list[str]) -> None:
    ours = train("--activation", "xielu", "--train-iters", "5", "--tensor-model-parallel-size", "2", ranks=2)
    assert ours.code == 0, ours.log[-3000:]
    spec = ["--spec", "megatron_act.specs", "xielu", "--train-iters", "5", "--tensor-model-parallel-size", "2"]
    script = [str(WORKERS / "on_cpu.py"), str(WORKERS / "megatron_lm_entry.py")]
    theirs = torchrun(*script, *FLAGS, *MODEL_FLAGS, *data_flags, *spec, ranks=2)
    assert theirs.returncode == 0, theirs.stdout[-3000:]
    assert len(logged_losses(ours.log)) == 5
    assert logged_losses(theirs.stdout) == logged_losses(ours.log)


@pytest.mark.distributed
def test_bf16_keeps_the_scalars_fp32_undecayed_and_moving(data_flags: list[str]) -> None:
    flags = ["--cpu", *MODEL_FLAGS, *data_flags, "--activation", "xielu", "--train-iters", "3", "--bf16"]
    small_steps = ["--lr", "1e-4", "--min-lr", "1e-4", "--weight-decay", "1.0"]
    done = torchrun(str(WORKERS / "bf16_run.py"), *flags, *small_steps, ranks=1)
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))[7:])
    assert report["scalar_dtypes"] == ["torch.float32"]
    assert report["weight_dtypes"] == ["torch.bfloat16"]
    assert report["weight_decay"] and set(report["weight_decay"]) == {0.0}
    moves = [abs(b - a) for a, b in zip(report["start"], report["end"], strict=True)]
    # three Adam steps of at most 1e-4: a bf16 scalar near 0.2 could not move at all (spacing 1e-3)
    assert len(moves) == 8 and all(1e-6 < move < 3.5e-4 for move in moves)


@pytest.mark.distributed
def test_config_file_trains_and_the_command_line_wins(train: Train, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("MODEL_ARGS:\n  --activation: crrelu\n  --train-iters: 7\n  --activation-init: [eps=0.3]\n")
    run = train("--config", str(config), "--train-iters", "2", "--lr", "0", "--min-lr", "0")
    assert run.code == 0, run.log[-3000:]
    assert run.records[0]["activation"] == "crrelu"
    assert [step["iteration"] for step in run.steps] == [1, 2]
    assert run.steps[-1]["scalars"] == {"eps": pytest.approx([0.3] * 4, abs=1e-7)}


def test_our_flags_are_frozen() -> None:
    """A new flag is a decision: change this list with it."""
    parser = arguments.add_arguments(argparse.ArgumentParser(add_help=False))
    assert sorted(parser._option_string_actions) == [
        "--activation",
        "--activation-backend",
        "--activation-init",
        "--config",
        "--cpu",
        "--metrics-jsonl",
    ]
