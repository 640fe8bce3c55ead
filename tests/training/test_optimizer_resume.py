"""A resumed run is the uninterrupted one, bit for bit: losses, scalars and, at its end, the whole checkpoint."""

from pathlib import Path

import pytest
from checkpoint_values import all_values, differences
from training_support import EP2, MOE, Train, continuing

pytestmark = pytest.mark.distributed

SAVED, STEPS = 2, 4
XIELU = ["--activation", "xielu"]
SHARDED = ["--use-distributed-optimizer"]
OPTIMIZERS = {
    "plain bf16": [*XIELU, "--bf16", "--tensor-model-parallel-size", "2"],
    "plain, another one for experts": [*MOE, *EP2],
    "distributed": [*XIELU, *SHARDED],
    "distributed bf16": [*XIELU, *SHARDED, "--bf16"],
    "distributed bf16, reshardable": [*XIELU, *SHARDED, "--bf16", "--dist-ckpt-optim-fully-reshardable"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_in_the_same_checkpoint(name: str, forked_train: Train, tmp_path: Path) -> None:
    flags = [*OPTIMIZERS[name], "--train-iters", str(STEPS), "--save-interval", str(SAVED)]
    whole = forked_train(*flags, ranks=2)
    assert whole.code == 0, whole.log[-3000:]
    resumed = forked_train(*flags, *continuing(whole, SAVED, tmp_path), ranks=2)
    assert resumed.code == 0, resumed.log[-3000:]
    assert [step["iteration"] for step in resumed.steps] == list(range(SAVED + 1, STEPS + 1))
    for ours, reference in zip(resumed.steps, whole.steps[SAVED:], strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (reference["loss"], reference["grad_norm"])
        assert ours["scalars"] == reference["scalars"]
    last = f"iter_{STEPS:07d}"
    found, expected = all_values(resumed.checkpoint / last), all_values(whole.checkpoint / last)
    assert sum("exp_avg_sq" in key for key in expected) >= 1
    assert differences(found, expected) == []
    assert differences(found, all_values(whole.checkpoint / f"iter_{SAVED:07d}")) != []
