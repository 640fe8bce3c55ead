"""A run's JSONL as columns, and the figures that follow from them."""

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

FINAL_SHARE = 0.1  # of the logged steps: their mean is the final training loss

Lines = list[dict[str, Any]]
ByStep = dict[str, list[list[float]]]  # by name: [step][layer]


@dataclass(frozen=True)
class Curve:
    """A run's logged steps: equally long lists, one entry per step.

    Attributes:
        iterations: training steps done.
        tokens: tokens trained on.
        losses: training loss in nats per token (None where the step was skipped).
        seconds: wall time since the first step, evaluations included.
        train_seconds: time spent on training steps, by Megatron's timer.
        grad_norms: of all gradients, before clipping.
        scalars: effective values, ``scalars[name][step][layer]``.
        scalar_gradients: of the raw scalars, likewise.
        fractions: ``negative_fraction`` and ``zero_fraction`` of pre-activations, likewise.
        validation: ``[tokens, loss]`` of each evaluation.
    """

    iterations: list[int]
    tokens: list[int]
    losses: list[float | None]
    seconds: list[float]
    train_seconds: list[float]
    grad_norms: list[float | None]
    scalars: ByStep
    scalar_gradients: ByStep
    fractions: ByStep
    validation: list[list[float]]


def steps_of(lines: Lines) -> Lines:
    """The step lines; of an iteration that a resumed run repeated, the last one."""
    return list({line["iteration"]: line for line in lines if line["event"] == "step"}.values())


def read_curve(lines: Lines) -> Curve:
    """The columns of a JSONL."""
    steps = steps_of(lines)
    return Curve(
        iterations=[step["iteration"] for step in steps],
        tokens=[step["tokens"] for step in steps],
        losses=[step["loss"] for step in steps],
        seconds=[step["seconds"] for step in steps],
        train_seconds=_train_seconds(steps),
        grad_norms=[step["grad_norm"] for step in steps],
        scalars=_by_name(steps, [step["scalars"] for step in steps]),
        scalar_gradients=_by_name(steps, [step["scalar_gradients"] for step in steps]),
        fractions=_by_name(steps, [_fractions(step) for step in steps]),
        validation=[[line["tokens"], line["loss"]] for line in _validations(lines)],
    )


def _by_name(steps: Lines, values: list[dict[str, list[float]]]) -> ByStep:
    return {name: [value[name] for value in values] for name in (values[0] if steps else {})}


def _fractions(step: dict[str, Any]) -> dict[str, list[float]]:
    return {name: step[name] for name in ("negative_fraction", "zero_fraction") if name in step}


def _train_seconds(steps: Lines) -> list[float]:
    """A record's ``step_seconds`` is the mean since the one before; the first also stands for the steps before it."""
    total, done, found = 0.0, 0, []
    for step in steps:
        total += step["step_seconds"] * (step["iteration"] - done)
        done = step["iteration"]
        found.append(total)
    return found


def _validations(lines: Lines) -> Lines:
    return [line for line in lines if line["event"] == "evaluation" and line["split"] == "validation"]


def final_loss(curve: Curve) -> float | None:
    """Mean training loss of the last tenth of the logged steps (at least one), in nats per token; None if diverged."""
    losses = [loss for loss in curve.losses if loss is not None]
    mean = statistics.fmean(losses[-max(1, math.ceil(FINAL_SHARE * len(losses))) :]) if losses else math.nan
    return mean if math.isfinite(mean) else None


def validation_loss(curve: Curve) -> float | None:
    """The last validation loss, in nats per token; None where nothing was evaluated, or where it is not finite."""
    loss = curve.validation[-1][1] if curve.validation else math.nan
    return loss if math.isfinite(loss) else None


def tokens_per_second(curve: Curve) -> float | None:
    """Median speed between logged steps: evaluations and checkpoints in between do not count."""
    points = list(zip(curve.tokens, curve.train_seconds, strict=True))
    speeds = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(points) if b[1] > a[1]]
    return statistics.median(speeds) if speeds else None


def peak_memory(lines: Lines) -> int | None:
    """Bytes: the last record's peak."""
    steps = steps_of(lines)
    return steps[-1]["peak_memory_bytes"] if steps else None


def telemetry_share(lines: Lines) -> float | None:
    """Share of the training time that telemetry took, median over records (the first, with its start-up, left out)."""
    shares = [
        step["telemetry_seconds"] / (step["step_seconds"] * (step["iteration"] - before["iteration"]))
        for before, step in pairwise(steps_of(lines))
    ]
    return statistics.median(shares) if shares else None
