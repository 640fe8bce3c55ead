"""The resharding matrix: saved under each layout, resumed with optimizer state under each other, a run goes on.

CI runs a sample; every ordered pair: python -m pytest tests/training/test_resharding.py --full-matrix
"""

import itertools
import json
import re
from pathlib import Path

import pytest
from training_support import EP2, MODEL_FLAGS, MOE, Run, Train, continuing, torchrun

from megatron_act.cpu_backend import FLAGS

pytestmark = pytest.mark.distributed

WORKERS = Path(__file__).parent / "workers"
SAVED, STEPS = 3, 6
# Nats, effective values; fp32. Moments that are off by 1 % are 4e-4, 2e-4 and 1e-5 off, a step count by one 1e-2.
TOLERANCES = {"loss": 2e-6, "grad_norm": 1e-6, "scalars": 1e-7}
BF16 = {"loss": 1e-3, "grad_norm": 1e-3, "scalars": 1e-4}  # activations are rounded by 4e-3 of their size

SHARDED = ["--use-distributed-optimizer"]
RESHARDABLE = [*SHARDED, "--dist-ckpt-optim-fully-reshardable"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1"]
PP2 = ["--pipeline-model-parallel-size", "2"]
# Ranks and flags. Megatron trains experts with a second optimizer in ep2, tp2 and tp2pp2, where they are spread out.
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "tp2pp2": (4, [*TP2, *PP2]),
    "ep2": (2, EP2),
    "dp2": (2, RESHARDABLE),
}
OTHERS = {"dp1": (1, RESHARDABLE), "ep2dp2": (2, [*EP2, *RESHARDABLE])}
# Each layout as source and as target, each kind of crossing.
SAMPLE = [
    ("tp1", "ep2"),  # one optimizer to two
    ("ep2", "tp1"),  # and back
    ("ep2", "dp2"),  # two plain ones to one distributed
    ("dp2", "tp2"),  # and back
    ("tp1", "dp2"),  # plain to distributed
    ("tp2", "pp2"),
    ("pp2", "tp2pp2"),
    ("tp2pp2", "tp1"),
]
BEYOND = [("dp2", "dp1"), ("tp2", "ep2dp2")]  # fewer data-parallel ranks; two plain optimizers to two distributed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "source" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full-matrix")
        pairs = list(itertools.permutations(LAYOUTS, 2)) if full else SAMPLE
        metafunc.parametrize(("source", "target"), [*pairs, *BEYOND])


def trained(train: Train, ranks: int, *flags: str) -> Run:
    run = train(*flags, "--train-iters", str(STEPS), ranks=ranks)
    assert run.code == 0, run.log[-3000:]
    return run


@pytest.fixture(scope="module")
def sources(forked_train: Train) -> dict[str, Run]:
    """Under each layout a run of six steps with a checkpoint after the third; pipelines start from other weights."""
    saving = ["--save-interval", str(SAVED)]
    return {name: trained(forked_train, ranks, *MOE, *flags, *saving) for name, (ranks, flags) in LAYOUTS.items()}


def largest_differences(run: Run, reference: Run) -> dict[str, float]:
    """Of all steps of ``run``, from the same steps of ``reference``; of gradient norms relative ones."""
    expected = {step["iteration"]: step for step in reference.steps}
    pairs = [(step, expected[step["iteration"]]) for step in run.steps]
    assert all(ours["scalars"].keys() == theirs["scalars"].keys() for ours, theirs in pairs)
    scalars = [
        abs(a - b)
        for ours, theirs in pairs
        for name, values in theirs["scalars"].items()
        for a, b in zip(ours["scalars"][name], values, strict=True)
    ]
    return {
        "loss": max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs),
        "grad_norm": max(abs(ours["grad_norm"] / theirs["grad_norm"] - 1) for ours, theirs in pairs),
        "scalars": max(scalars),
    }


def assert_goes_on(run: Run, reference: Run, first: int, tolerances: dict[str, float]) -> None:
    assert [step["iteration"] for step in run.steps] == list(range(first, STEPS + 1))
    found = largest_differences(run, reference)
    print("differences", json.dumps(found))
    assert {key: value for key, value in found.items() if not value <= tolerances[key]} == {}


def test_resuming_continues_the_run(
    source: str, target: str, sources: dict[str, Run], forked_train: Train, tmp_path: Path
) -> None:
    ranks, flags = {**LAYOUTS, **OTHERS}[target]
    resumed = trained(forked_train, ranks, *MOE, *flags, *continuing(sources[source], SAVED, tmp_path))
    assert_goes_on(resumed, sources[source], SAVED + 1, TOLERANCES)


def test_a_run_through_spec_takes_the_state_too(sources: dict[str, Run], data_flags: list[str], tmp_path: Path) -> None:
    """From Megatron-LM's own entry point: one optimizer's state into two."""
    activation, spec = ["--activation", "xielu"], ["--spec", "megatron_act.specs", "xielu"]
    assert MOE[:2] == activation
    flags = [*FLAGS, *MODEL_FLAGS, *data_flags, *MOE[2:], *spec, *EP2, "--train-iters", str(STEPS)]
    script = [str(WORKERS / "on_cpu.py"), str(WORKERS / "megatron_lm_entry.py")]
    done = torchrun(*script, *flags, *continuing(sources["tp1"], SAVED, tmp_path), ranks=2)
    assert done.returncode == 0, done.stdout[-3000:]
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", done.stdout)]
    first, second, third = [step["loss"] for step in sources["tp1"].steps[SAVED:]]
    # Megatron prints seven digits, and in its second line the mean of the first two steps
    assert losses == pytest.approx([first, (first + second) / 2, third], rel=0, abs=TOLERANCES["loss"])


@pytest.fixture(scope="module")
def bucketed(forked_train: Train) -> Run:
    """Two distributed optimizers in their default format, which stores the memory of their buffers."""
    return trained(forked_train, 2, *MOE, *EP2, *SHARDED, "--save-interval", str(SAVED))


@pytest.mark.parametrize("target", ["tp1", "dp2", "tp2"])
def test_the_distributed_optimizers_default_format_is_refused_in_another_layout(
    bucketed: Run, forked_train: Train, tmp_path: Path, target: str
) -> None:
    ranks, flags = LAYOUTS[target]
    saving = ["--save-interval", "1", "--train-iters", str(STEPS)]
    run = forked_train(*MOE, *flags, *continuing(bucketed, SAVED, tmp_path), *saving, ranks=ranks)
    assert run.code == 2
    (line,) = [line for line in run.log.splitlines() if line.startswith("error: ")]
    for words in ("--load", "dp_reshardable", "--use-distributed-optimizer --expert-model-parallel-size 2", "no-load"):
        assert words in line
    assert "--dist-ckpt-optim-fully-reshardable" in line and "Traceback" not in run.log
    assert [*run.checkpoint.glob("iter_*")] == []


def test_the_remedy_that_the_refusal_names_works(bucketed: Run, forked_train: Train, tmp_path: Path) -> None:
    """One step in the layout that saved it, now reshardable; then without expert parallelism and plain."""
    once = ["--save-interval", "1", "--exit-interval", str(SAVED + 1)]
    flags = [*EP2, *RESHARDABLE, *continuing(bucketed, SAVED, tmp_path / "bucketed"), *once]
    converted = trained(forked_train, 2, *MOE, *flags)
    assert [step["iteration"] for step in converted.steps] == [SAVED + 1]
    resumed = trained(forked_train, 1, *MOE, *continuing(converted, SAVED + 1, tmp_path / "converted"))
    assert_goes_on(resumed, bucketed, SAVED + 2, TOLERANCES)


# One layer's two scalars, 64 elements apart, shared out to four ranks: two of them get no parameter of this buffer.
SMALL = ["--activation", "xielu", "--num-layers", "1", "--bf16", "--micro-batch-size", "2", *SHARDED]


@pytest.fixture(scope="module")
def small(forked_train: Train) -> Run:
    return trained(forked_train, 4, *SMALL, "--save-interval", str(SAVED))


@pytest.mark.parametrize(("ranks", "tolerances"), [(4, dict.fromkeys(BF16, 0.0)), (1, BF16)])
def test_scalars_in_a_buffer_with_empty_shares_are_saved(
    small: Run, forked_train: Train, tmp_path: Path, ranks: int, tolerances: dict[str, float]
) -> None:
    resumed = trained(forked_train, ranks, *SMALL, *continuing(small, SAVED, tmp_path))
    assert_goes_on(resumed, small, SAVED + 1, tolerances)
