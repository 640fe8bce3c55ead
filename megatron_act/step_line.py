"""The lines that a person reads while a run trains: one a logged step, one an evaluation.

    step  1,200/48,000 | loss 2.8134 | lr 2.90e-04 | 412 k tok/s | 398 TFLOP/s/GPU | MFU 40.2 % |
        alpha_p 0.712..1.93 alpha_n 0.654..1.20 | grad 0.312 | ETA 3 d 04 h                       (on one line)
    evaluation at step 1,200 | validation | loss 2.7913 | perplexity 16.3

Every figure is that of the JSONL's record (``telemetry``), rounded: scalars are the smallest and largest of all layers,
tokens per second those of all GPUs. What a run has not (MFU without a peak, scalars of an activation without any, time
left before its second step) is left out.
"""

import math
from typing import Any


def step_line(record: dict[str, Any], steps: int, gpus: int) -> str:
    """The line of a step.

    Args:
        record: of event ``step``.
        steps: of the whole run.
        gpus: ranks of the whole run.
    """
    total = f"{steps:,}"
    rate, norm, left = record["learning_rate"], record["grad_norm"], record["eta_seconds"]
    parts = [
        f"step {record['iteration']:>{len(total)},}/{total}",
        _loss(record["loss"]),
        rate is not None and f"lr {rate:.2e}",
        f"{scaled(record['tokens_per_second_per_gpu'] * gpus)}tok/s",
        f"{short(record['tflops_per_gpu'])} TFLOP/s/GPU",
        record["mfu"] is not None and f"MFU {100 * record['mfu']:.1f} %",
        _ranges(record["scalars"]),
        norm is not None and f"grad {short(norm)}",
        _skipped(record),
        left is not None and f"ETA {duration(left)}",
    ]
    return " | ".join(part for part in parts if part)


def evaluation_line(record: dict[str, Any]) -> str:
    """The line of an evaluation, whose record is of event ``evaluation``."""
    loss = record["loss"]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    place = f"evaluation at step {record['iteration']:,} | {record['split']}"
    return f"{place} | {_loss(loss)} | perplexity {short(perplexity)}"


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"loss {loss:.4f}"


def _ranges(scalars: dict[str, list[float]]) -> str:
    """By scalar, whichever experts have it: ``expert_3.alpha_p`` is an ``alpha_p``."""
    values: dict[str, list[float]] = {}
    for name, layers in scalars.items():
        values.setdefault(name.rpartition(".")[2], []).extend(layers)
    return " ".join(f"{name} {short(min(found))}..{short(max(found))}" for name, found in values.items())


def _skipped(record: dict[str, Any]) -> str:
    """Steps since the last record whose update was not made."""
    skipped, nan = record["skipped_steps"], record["nan_steps"]
    return f"{skipped} skipped{f' ({nan} not finite)' if nan else ''}" if skipped else ""


def short(value: float) -> str:
    """Three significant digits, or all before the point: ``0.312``, ``41.2``, ``9890``, ``2.13e-05``."""
    return f"{value:.0f}" if 99.95 <= abs(value) < math.inf else f"{value:#.3g}"


def scaled(value: float) -> str:
    """``412 k``, ``3.21 M``: a unit follows."""
    for unit, size in (("M ", 1e6), ("k ", 1e3)):
        if value >= 0.9995 * size:
            return f"{short(value / size)} {unit}"
    return f"{short(value)} "


def duration(seconds: float) -> str:
    """The two largest units: ``3 d 04 h``, ``5 h 07 min``, ``12 min``, ``45 s``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days} d {hours % 24:02d} h"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min"
