"""Every parallel layout gives the losses, gradient norms and scalars of one rank, with gradient clipping active."""

from pathlib import Path

import pytest
from training_support import Run, Train

pytestmark = pytest.mark.distributed

TOLERANCE = {"loss": 1e-4, "grad_norm": 1e-4, "alpha_p": 1e-5, "alpha_n": 1e-5}  # nats; fp32
STEPS = 8
CLIP = 0.2  # below every gradient norm of these steps
# Adam divides a gradient's size away; with this epsilon its step is nearly proportional to the gradient
PROPORTIONAL = ["--adam-eps", "0.1", "--lr", "0.5", "--min-lr", "0.5", "--weight-decay", "0.01"]
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce"]
LAYOUTS = {
    "tp2": (2, TP2),
    "tp2 sequence parallel": (2, [*TP2, "--sequence-parallel"]),
    "dp2 accumulated": (2, ["--micro-batch-size", "2"]),
    "dp2 sharded optimizer": (2, [*SHARDED, "--overlap-param-gather", "--calculate-per-token-loss"]),
    "pp2 interleaved": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "tp2 pp2": (4, [*TP2, *PP2]),
    "tp2 dp2": (4, [*TP2, "--sequence-parallel", *SHARDED, "--calculate-per-token-loss"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "tp2 cp2": (4, [*TP2, "--sequence-parallel", "--context-parallel-size", "2"]),
}


@pytest.fixture(scope="module")
def start(initial: Path) -> list[str]:
    """Flags that start from one checkpoint."""
    load = ["--load", str(initial), "--finetune", "--no-load-optim", "--no-load-rng"]
    return [*load, *PROPORTIONAL, "--clip-grad", str(CLIP), "--train-iters", str(STEPS)]


@pytest.fixture(scope="module")
def one_rank(forked_train: Train, start: list[str]) -> Run:
    run = forked_train("--activation", "xielu", *start)
    assert run.code == 0, run.log[-2000:]
    return run


def beyond_tolerance(found: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in found.items() if not value < TOLERANCE[key]}


def difference(run: Run, reference: Run) -> dict[str, float]:
    """Largest absolute difference over all steps of loss, gradient norm and every scalar."""
    assert len(run.steps) == len(reference.steps) == STEPS, run.log[-3000:]
    pairs = list(zip(run.steps, reference.steps, strict=True))
    found = {key: max(abs(a[key] - b[key]) for a, b in pairs) for key in ("loss", "grad_norm")}
    for name in reference.steps[0]["scalars"]:
        layers = [zip(a["scalars"][name], b["scalars"][name], strict=True) for a, b in pairs]
        found[name] = max(abs(x - y) for layer in layers for x, y in layer)
    return found


def test_the_reference_clips_and_moves_every_scalar(one_rank: Run) -> None:
    assert min(step["grad_norm"] for step in one_rank.steps) > CLIP
    assert one_rank.losses[-1] < one_rank.losses[0] - 0.01
    last = one_rank.steps[-1]["scalars"]
    assert min(abs(value - 0.8) for values in last.values() for value in values) > 40 * TOLERANCE["alpha_n"]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layout_equals_one_rank(layout: str, forked_train: Train, start: list[str], one_rank: Run) -> None:
    ranks, flags = LAYOUTS[layout]
    prepare = ["context_parallel", {}] if "cp2" in layout else None
    run = forked_train("--activation", "xielu", *start, *flags, ranks=ranks, prepare=prepare)
    assert run.code == 0, run.log[-3000:]
    found = difference(run, one_rank)
    print(layout, found)
    assert beyond_tolerance(found) == {}


def test_one_sum_per_step_equals_sums_in_the_backward_pass(
    forked_train: Train, start: list[str], one_rank: Run
) -> None:
    """Two micro-batches a step; the two ways add the same fp32 numbers in another order."""
    ways = (None, ["reductions", {"variant": "backward"}])
    runs = [forked_train("--activation", "xielu", *start, *TP2, ranks=2, prepare=way) for way in ways]
    assert [run.code for run in runs] == [0, 0], runs[1].log[-3000:]
    assert max(difference(*runs).values()) < 2e-6
    assert beyond_tolerance(difference(runs[1], one_rank)) == {}
