"""The entry point: --spec from a foreign one, --config, the frozen flags."""

import argparse
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
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
def test_config_file_trains_and_the_command_line_wins(train: Train, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("MODEL_ARGS:\n  --activation: crrelu\n  --train-iters: 7\n  --activation-init: [eps=0.3]\n")
    board = ["--tensorboard-dir", str(tmp_path / "board"), "--check-for-spiky-loss"]
    run = train("--config", str(config), "--train-iters", "2", "--lr", "0", "--min-lr", "0", *board)
    assert run.code == 0, run.log[-3000:]
    assert run.records[0]["activation"] == "crrelu"
    assert [step["iteration"] for step in run.steps] == [1, 2]
    assert run.steps[-1]["scalars"] == {"eps": pytest.approx([0.3] * 4, abs=1e-7)}
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {f"activation/eps/layer_{layer}" for layer in (1, 2, 3, 4)} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("activation/eps/layer_3")] == pytest.approx([0.3, 0.3])


def test_our_flags_are_frozen() -> None:
    """A new flag is a decision: change this list with it."""
    parser = arguments.add_arguments(argparse.ArgumentParser(add_help=False))
    assert sorted(parser._option_string_actions) == [
        "--activation",
        "--activation-backend",
        "--activation-init",
        "--activation-init-missing",
        "--activation-per-expert",
        "--config",
        "--cpu",
        "--metrics-jsonl",
        "--recompute-activation-function",
    ]
