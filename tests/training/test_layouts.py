"""The same training whatever the layout: loss curves, scalars, and resuming under another one."""

import itertools
from pathlib import Path

import pytest
from training_support import Run, Train

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4  # nats, fp32
STEPS = 20
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
}


@pytest.fixture(scope="module")
def runs(forked_train: Train, initial: Path) -> dict[str, Run]:
    start = ["--load", str(initial), "--finetune", "--no-load-optim", "--no-load-rng"]
    save = ["--save-interval", "10"]
    done = {
        name: forked_train("--activation", "xielu", "--train-iters", str(STEPS), *start, *save, *flags, ranks=ranks)
        for name, (ranks, flags) in LAYOUTS.items()
    }
    assert {name: run.code for name, run in done.items()} == dict.fromkeys(LAYOUTS, 0), done["pp2"].log[-3000:]
    return done


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_losses_equal_one_rank(runs: dict[str, Run], layout: str) -> None:
    assert len(runs["tp1"].losses) == STEPS
    assert runs[layout].losses == pytest.approx(runs["tp1"].losses, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_scalar_moved_and_by_its_own_amount(runs: dict[str, Run], layout: str) -> None:
    last = runs[layout].steps[-1]["scalars"]
    for values in (last["alpha_p"], last["alpha_n"]):
        assert len(values) == 4
        assert min(abs(value - 0.8) for value in values) > 100 * TOLERANCE
        ordered = sorted(values)
        assert min(b - a for a, b in itertools.pairwise(ordered)) > TOLERANCE


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_scalars_and_gradient_norm_equal_one_rank(runs: dict[str, Run], layout: str) -> None:
    for ours, reference in zip(runs[layout].steps, runs["tp1"].steps, strict=True):
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
        for name, values in reference["scalars"].items():
            assert ours["scalars"][name] == pytest.approx(values, rel=0, abs=TOLERANCE)


def test_resuming_under_another_layout_continues_the_run(
    runs: dict[str, Run], forked_train: Train, tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    (source / "iter_0000010").symlink_to(runs["tp2"].checkpoint / "iter_0000010")
    (source / "latest_checkpointed_iteration.txt").write_text("10")
    resumed = forked_train(
        "--activation", "xielu", "--train-iters", str(STEPS), "--load", str(source), *LAYOUTS["pp2"][1], ranks=2
    )
    assert resumed.code == 0, resumed.log[-3000:]
    assert [step["iteration"] for step in resumed.steps] == list(range(11, STEPS + 1))
    assert resumed.losses == pytest.approx(runs["tp2"].losses[10:], rel=0, abs=TOLERANCE)
