"""bf16 training: the scalars stay fp32, undecayed, in a group of their own, and survive a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from training_support import MODEL_FLAGS, SAVE, Train, torchrun

from megatron_act.checkpoint.reader import MegatronCheckpoint

WORKERS = Path(__file__).parent / "workers"
TP2 = ["--activation", "xielu", "--bf16", "--tensor-model-parallel-size", "2"]

pytestmark = pytest.mark.distributed


def test_bf16_keeps_the_scalars_fp32_undecayed_and_moving(data_flags: list[str]) -> None:
    flags = ["--cpu", *MODEL_FLAGS, *data_flags, "--activation", "xielu", "--train-iters", "3", "--bf16"]
    small_steps = ["--lr", "1e-4", "--min-lr", "1e-4", "--weight-decay", "1.0"]
    done = torchrun(str(WORKERS / "bf16_run.py"), *flags, *small_steps, ranks=1)
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))[7:])
    assert report["scalar_dtypes"] == ["torch.float32"]
    assert report["weight_dtypes"] == ["torch.bfloat16"]
    assert report["weight_decay"] == [0.0]  # one group, of the scalars alone
    moves = [abs(b - a) for a, b in zip(report["start"], report["end"], strict=True)]
    # three Adam steps of at most 1e-4: a bf16 scalar near 0.2 could not move at all (spacing 1e-3)
    assert len(moves) == 8 and all(1e-6 < move < 3.5e-4 for move in moves)


def test_a_resumed_bf16_run_equals_the_uninterrupted_one_bit_for_bit(forked_train: Train, tmp_path: Path) -> None:
    whole = forked_train(*TP2, "--train-iters", "6", "--save-interval", "3", ranks=2)
    assert whole.code == 0, whole.log[-3000:]
    (tmp_path / "iter_0000003").symlink_to(whole.checkpoint / "iter_0000003")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = forked_train(*TP2, "--train-iters", "6", "--load", str(tmp_path), ranks=2)
    assert resumed.code == 0, resumed.log[-3000:]
    assert [step["iteration"] for step in resumed.steps] == [4, 5, 6]
    for ours, reference in zip(resumed.steps, whole.steps[3:], strict=True):
        assert (ours["loss"], ours["scalars"]) == (reference["loss"], reference["scalars"])


def test_the_distributed_optimizer_saves_fp32_scalars(forked_train: Train) -> None:
    run = forked_train(*TP2, "--use-distributed-optimizer", "--train-iters", "2", *SAVE, ranks=2)
    assert run.code == 0, run.log[-3000:]
    checkpoint = MegatronCheckpoint(run.checkpoint)
    stored = checkpoint.tensor("decoder.layers.mlp.activation_func.alpha_p")
    assert stored.dtype == torch.float32 and tuple(stored.shape) == (4, 1)
    effective = torch.nn.functional.softplus(stored.double()).flatten().tolist()
    assert effective == pytest.approx(run.steps[-1]["scalars"]["alpha_p"], abs=1e-7)
    assert len(set(effective)) == 4
