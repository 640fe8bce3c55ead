"""The two matmuls around an activation, forward and backward: the activation's share of the MLP's time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_act.benchmark.cases import Case
from megatron_act.benchmark.table import OURS, Row
from megatron_act.benchmark.timing import Buffer, Work, measure, sampler


def shares(cases: list[Case], rows: list[Row], device: str) -> list[dict[str, Any]]:
    """One entry per case with a known MLP and timed in both directions: microseconds, share, the slowest part."""
    done: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        done.setdefault((row["activation"], row["shape"]), []).append(row)
    matmuls: dict[tuple[int, int, int, bool], dict[str, float]] = {}
    found = []
    for case in cases:
        by_op = {row["op"]: row["median_us"] for row in done.get((case.activation, case.label), [])}
        if case.shape.hidden and {"forward", "backward"} <= by_op.keys():
            key = (case.shape.rows, case.cols, case.shape.hidden, case.gated)
            if key not in matmuls:
                matmuls[key] = matmul_us(case, device)
            found.append(_entry(case, matmuls[key], by_op["forward"] + by_op["backward"]))
    return found


def matmul_us(case: Case, device: str) -> dict[str, float]:
    """Microseconds of fc1 and of fc2 on one rank: the product, the gradients of its input and of its weight."""
    hidden, width = case.shape.hidden, case.cols
    sizes = {"fc1": (hidden, width * (2 if case.gated else 1)), "fc2": (width, hidden)}
    samplers = {}
    for name, (inputs, outputs) in sizes.items():
        weight, buffer = _linear(case.shape.rows, inputs, outputs, case.dtype, device)
        samplers[name] = sampler(_both_ways(weight), [buffer], device)
    return {name: timing.median_us for name, timing in measure(samplers, device).items()}


def _linear(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Buffer]:
    like: dict[str, Any] = {"device": device, "dtype": dtype, "generator": torch.Generator(device).manual_seed(1)}
    x = torch.randn(rows, inputs, requires_grad=True, **like)
    weight = (torch.randn(outputs, inputs, **like) * inputs**-0.5).requires_grad_()
    return weight, (x, torch.randn(rows, outputs, **like))


def _both_ways(weight: Tensor) -> Work:
    def launch(state: Buffer) -> Any:
        y = F.linear(state[0], weight)
        return y, torch.autograd.grad(y, [state[0], weight], state[1])

    return Work(lambda x, grad: (x, grad), launch)


def _entry(case: Case, matmuls: dict[str, float], activation_us: float) -> dict[str, Any]:
    parts = {**matmuls, "activation": activation_us}
    return {
        "activation": case.activation, "shape": case.label, "hidden": case.shape.hidden,
        "fc1_us": matmuls["fc1"], "fc2_us": matmuls["fc2"], f"{OURS}_us": activation_us,
        "share_percent": 100 * activation_us / sum(parts.values()), "slowest": max(parts, key=lambda p: parts[p]),
    }  # fmt: skip
