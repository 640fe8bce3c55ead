"""A run that is killed while it saves, again and again, ends bit for bit as the run that never was."""

from pathlib import Path

import pytest
from checkpoint_values import all_values, differences
from training_support import Run, Train

pytestmark = pytest.mark.distributed

STEPS = 5
FLAGS = ["--activation", "xielu", "--bf16", "--use-distributed-optimizer", "--micro-batch-size", "2"]
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]  # the random state counts too
COMMAND = [*FLAGS, *DROPOUT, "--train-iters", str(STEPS), "--save-interval", "1"]
SIGKILL = -9
RANKS = 2
# In which save a run dies, and at which point of it; each starts where the one before has left off.
DEATHS = [(1, "shards"), (2, "shards"), (3, "complete"), (4, "tracker")]


@pytest.fixture(scope="module")
def whole(forked_train: Train) -> Run:
    run = forked_train(*COMMAND, ranks=RANKS)
    assert run.code == 0, run.log[-3000:]
    return run


@pytest.fixture(scope="module")
def left(forked_train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Run]:
    """What the folder held after each death, and the run that ends."""
    folder = tmp_path_factory.mktemp("killed")
    command = [*COMMAND, "--load", str(folder / "checkpoint")]
    found = []
    for iteration, point in DEATHS:
        run = forked_train(
            *command, ranks=RANKS, folder=folder, prepare=["killed_save", {"point": point, "iteration": iteration}]
        )
        assert run.code == SIGKILL, run.log[-3000:]
        found.append(contents(run.checkpoint))
    last = forked_train(*command, ranks=RANKS, folder=folder)
    assert last.code == 0, last.log[-3000:]
    return found, last


def contents(checkpoint: Path) -> dict[str, object]:
    """The tracker's text and each checkpoint's files."""
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    files = {folder.name: sorted(file.name for file in folder.iterdir()) for folder in checkpoint.glob("iter_*")}
    return {"tracker": tracker.read_text() if tracker.exists() else None, **files}


SHARDS = ["__0_0.distcp", "__1_0.distcp"]
COMPLETE = [".metadata", *SHARDS, "metadata.json"]


def test_a_death_leaves_what_megatron_had_written(left: tuple[list[dict], Run]) -> None:
    first, second, third, fourth = left[0]
    assert first == {"tracker": None, "iter_0000001": SHARDS}
    assert second == {"tracker": "1", "iter_0000001": COMPLETE, "iter_0000002": SHARDS}
    assert third["tracker"] == "2" and third["iter_0000003"] == COMPLETE
    assert fourth["tracker"] == "" and fourth["iter_0000004"] == COMPLETE


def test_each_run_starts_from_the_last_complete_checkpoint(left: tuple[list[dict], Run]) -> None:
    _, last = left
    steps = [record.get("iteration", record["event"]) for record in last.records]
    assert steps == ["start", 1, "start", 1, 2, "start", 2, 3, "start", 3, 4, "start", 5]
    assert "was empty, as after a run that ended while it saved: set to 4, completed last" in last.log


def test_every_step_is_the_unbroken_runs(whole: Run, left: tuple[list[dict], Run]) -> None:
    expected = {step["iteration"]: step for step in whole.steps}
    assert len(expected) == STEPS
    for step in left[1].steps:
        for key in ("loss", "grad_norm", "scalars"):
            assert step[key] == expected[step["iteration"]][key], (step["iteration"], key)


@pytest.mark.parametrize("iteration", range(1, STEPS + 1))
def test_every_checkpoint_is_the_unbroken_runs(whole: Run, left: tuple[list[dict], Run], iteration: int) -> None:
    """Weights, scalars, moments, step counts, schedule and random states, bit for bit."""
    folder = f"iter_{iteration:07d}"
    ours, expected = (all_values(run.checkpoint / folder) for run in (left[1], whole))
    assert any("exp_avg_sq" in key for key in expected)
    assert differences(ours, expected) == []
