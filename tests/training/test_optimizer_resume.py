"""The distributed optimizer on CPU: a resumed run is the uninterrupted one, bit for bit."""

from pathlib import Path

import pytest
from training_support import Train

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_two_data_parallel_ranks_resume_bit_for_bit(train: Train, tmp_path: Path, precision: list[str]) -> None:
    flags = ["--activation", "xielu", "--use-distributed-optimizer", *precision, "--train-iters", "5"]
    whole = train(*flags, "--save-interval", "2", ranks=2)
    assert whole.code == 0, whole.log[-3000:]
    (tmp_path / "iter_0000002").symlink_to(whole.checkpoint / "iter_0000002")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(*flags, "--load", str(tmp_path), ranks=2)
    assert resumed.code == 0, resumed.log[-3000:]
    assert [step["iteration"] for step in resumed.steps] == [3, 4, 5]
    for ours, reference in zip(resumed.steps, whole.steps[2:], strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (reference["loss"], reference["grad_norm"])
        assert ours["scalars"] == reference["scalars"]
