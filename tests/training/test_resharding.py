"""The resharding matrix: saved under each layout, resumed under each other, the losses are the unbroken run's."""

import itertools
from pathlib import Path

import pytest
from training_support import Run, Train

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4  # nats and effective scalars, fp32
SAVED, STEPS = 3, 6
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "tp2pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
}


def xielu(train: Train, layout: str, *flags: str) -> Run:
    ranks, parallel = LAYOUTS[layout]
    run = train("--activation", "xielu", "--train-iters", str(STEPS), *parallel, *flags, ranks=ranks)
    assert run.code == 0, run.log[-3000:]
    return run


@pytest.fixture(scope="module")
def saved(train: Train) -> dict[str, Run]:
    """Under each layout a run of six steps with a checkpoint after the third; pipelines start from other weights."""
    return {layout: xielu(train, layout, "--save-interval", str(SAVED)) for layout in LAYOUTS}


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(LAYOUTS, 2)))
def test_resuming_continues_the_run(
    source: str, target: str, saved: dict[str, Run], train: Train, tmp_path: Path
) -> None:
    (tmp_path / "iter_0000003").symlink_to(saved[source].checkpoint / "iter_0000003")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    resumed = xielu(train, target, "--load", str(tmp_path))
    expected = saved[source].steps[SAVED:]
    assert [step["iteration"] for step in resumed.steps] == [step["iteration"] for step in expected] == [4, 5, 6]
    assert resumed.losses == pytest.approx([step["loss"] for step in expected], rel=0, abs=TOLERANCE)
    for ours, theirs in zip(resumed.steps, expected, strict=True):
        for name, values in theirs["scalars"].items():
            assert ours["scalars"][name] == pytest.approx(values, rel=0, abs=TOLERANCE)
