"""Whole FP8 runs: the entry point, Megatron, Transformer Engine's Python, and torch in place of its kernels (te_cpu).

With the activation's FP8 result and gradient a run has the losses of the same run without, bit for bit; and FP8 ends
where bf16 ends, within the scatter of seeds, unless the scaling is broken.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_support import Train, continuing

from megatron_act import te

WIDE = ["--hidden-size", "64", "--ffn-hidden-size", "192", "--bf16", "--transformer-impl", "transformer_engine"]
WIDE += ["--activation", "xielu"]
OUTPUT = ["--activation-fp8-output"]
BOTH = [*OUTPUT, "--activation-fp8-grad"]
RECIPES = {"delayed": BOTH, "tensorwise": OUTPUT, "blockwise": BOTH}


def fp8(recipe: str) -> list[str]:
    return ["--fp8-format", "e4m3" if recipe == "blockwise" else "hybrid", "--fp8-recipe", recipe]


LAYOUTS = {
    "one rank": (1, []),
    "first and last layer bf16": (1, ["--first-last-layers-bf16"]),
    "full recompute": (
        1,
        ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
    ),
    "MLP recompute": (1, ["--recompute-granularity", "selective", "--recompute-modules", "mlp"]),
    "TP 2, sequence parallel": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "PP 2": (2, ["--pipeline-model-parallel-size", "2", "--micro-batch-size", "2"]),
}
CASES = [
    *(("one rank", recipe) for recipe in RECIPES),
    ("first and last layer bf16", "tensorwise"),
    *(("full recompute", recipe) for recipe in ("delayed", "blockwise")),
    ("MLP recompute", "delayed"),
    ("TP 2, sequence parallel", "delayed"),
    ("PP 2", "delayed"),
]


@pytest.mark.parametrize(("layout", "recipe"), CASES)
def test_losses_are_bit_for_bit_those_of_a_bf16_activation(engine_train: Train, layout: str, recipe: str) -> None:
    ranks, flags = LAYOUTS[layout]
    words = [*WIDE, *fp8(recipe), *flags, "--train-iters", "4"]
    runs = [engine_train(*words, *more, ranks=ranks) for more in ([], RECIPES[recipe])]
    for run in runs:
        assert run.code == 0, run.log[-3000:]
    assert len(runs[0].losses) == 4 and runs[0].losses == runs[1].losses
    assert [step["grad_norm"] for step in runs[0].steps] == [step["grad_norm"] for step in runs[1].steps]
    assert "stays bf16" not in runs[1].log


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_op_fuser_trains(engine_train: Train, ranks: int) -> None:
    """Losses and scalars are those of the unfused layers, with tensor parallelism bit for bit too."""
    words = [*WIDE, *fp8("tensorwise"), "--train-iters", "4", "--tensor-model-parallel-size", str(ranks)]
    unfused, fused = (engine_train(*words, *more, ranks=ranks) for more in ([], ["--use-transformer-engine-op-fuser"]))
    assert unfused.code == fused.code == 0, fused.log[-3000:]
    assert fused.losses == unfused.losses
    assert fused.steps[-1]["scalars"] == unfused.steps[-1]["scalars"] != unfused.steps[0]["scalars"]


def test_the_op_fuser_is_refused_with_delayed_scaling(engine_train: Train) -> None:
    """Megatron saves none of its operations' scales: a resumed run would start with others, in silence."""
    refused = engine_train(*WIDE, *fp8("delayed"), "--use-transformer-engine-op-fuser", "--train-iters", "1")
    assert refused.code == 2 and "--fp8-recipe delayed: Megatron saves no scales" in refused.log


TRUSTED = ["environment_of", {"NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1"}]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_a_resumed_run_goes_on_with_its_scales(engine_train: Train, recipe: str, tmp_path: Path) -> None:
    """Losses of the uninterrupted run, though fc2 has no quantizer in the resumed run's first call.

    Transformer Engine pickles delayed scaling's state and loads it only with its variable set: said at the start.
    """
    words = [*WIDE, *fp8(recipe), *RECIPES[recipe], "--train-iters", "4", "--save-interval", "2"]
    whole = engine_train(*words)
    assert whole.code == 0, whole.log[-3000:]
    assert (te.UNPICKLE in whole.log) == (recipe == "delayed")
    again = [*words, *continuing(whole, 2, tmp_path)]
    if recipe == "delayed":
        refused = engine_train(*again)
        assert refused.code != 0 and te.UNPICKLE in refused.log and not refused.steps
    resumed = engine_train(*again, prepare=TRUSTED)
    assert resumed.code == 0, resumed.log[-3000:]
    assert resumed.losses == whole.losses[2:]


STEPS, LAST = 200, 50
SEEDS = (1, 2, 3)
PARITY = [*WIDE, "--num-layers", "2", "--lr", "3e-3", "--min-lr", "3e-3", "--train-iters", str(STEPS)]


@pytest.fixture(scope="module")
def finals(engine_train: Train) -> Callable[..., list[float]]:
    """Mean loss of the last steps, by seed, of a run with the given flags."""

    def run(*flags: str, seeds: tuple[int, ...] = SEEDS, prepare: Any = None) -> list[float]:
        found = []
        for seed in seeds:
            done = engine_train(*PARITY, *flags, "--seed", str(seed), prepare=prepare)
            assert done.code == 0 and len(done.losses) == STEPS, done.log[-3000:]
            found.append(statistics.mean(done.losses[-LAST:]))
        return found

    return run


@pytest.fixture(scope="module")
def bf16(finals: Callable[..., list[float]]) -> list[float]:
    return finals()


def test_fp8_ends_where_bf16_ends(finals: Callable[..., list[float]], bf16: list[float]) -> None:
    """Delayed scaling, e5m2 gradients, FP8 result, gradient and kept pre-activation: within two sigma of the seeds."""
    found = finals(*fp8("delayed"), *BOTH, "--activation-fp8-input-store")
    sigma = statistics.stdev(bf16)
    difference = statistics.mean(found) - statistics.mean(bf16)
    print(f"bf16 {bf16} FP8 {found} sigma {sigma:.4f} difference {difference:+.4f}")
    assert abs(difference) <= 2 * sigma


@pytest.mark.parametrize("factor", [2.0**-18, 2.0**8], ids=["vanishing", "saturating"])
def test_broken_scaling_does_not(finals: Callable[..., list[float]], bf16: list[float], factor: float) -> None:
    """The same comparison fails where the activation is scaled wrongly, else it would prove nothing."""
    prepare = ["broken_scaling", {"factor": factor}]
    found = finals(*fp8("delayed"), *BOTH, seeds=SEEDS[:1], prepare=prepare)
    sigma = statistics.stdev(bf16)
    print(f"factor {factor}: {found} against {bf16}, sigma {sigma:.4f}")
    assert found[0] - statistics.mean(bf16) > 2 * sigma
