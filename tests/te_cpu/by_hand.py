"""What FP8 arithmetic should give: plain loops over blocks and torch's own casts, no code shared with the stand-in."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CASTS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
WHOLE = (1 << 30, 1 << 30)


def exact(quotient: float) -> float:
    return quotient


def power_of_2(quotient: float) -> float:
    """Rounded down to one."""
    return 2.0 ** (math.frexp(quotient)[1] - 1)


def quantized(y: Tensor, form: str, block: tuple[int, int], rounding: Callable[[float], float] = exact) -> Tensor:
    """``y`` (fp32 [R, C]) after a cast to FP8 and back, each block scaled by rounding(largest number / amax)."""
    dtype, top = CASTS[form]
    result = torch.empty_like(y)
    for i in range(0, y.shape[0], block[0]):
        for j in range(0, y.shape[1], block[1]):
            part = y[i : i + block[0], j : j + block[1]]
            scale = torch.tensor(rounding(top / part.abs().max().item()), dtype=torch.float32)
            result[i : i + block[0], j : j + block[1]] = cast(part, dtype, top, scale)
    return result


def cast(y: Tensor, dtype: torch.dtype, top: float, scale: Tensor) -> Tensor:
    return (y * scale).clamp(-top, top).to(dtype).float() * (1.0 / scale)


@dataclass(frozen=True)
class Scheme:
    """How a recipe scales: blocks of activations and gradients along a row and along a column, blocks of weights."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    weight_rows: tuple[int, int]
    weight_columns: tuple[int, int]
    rounding: Callable[[float], float] = power_of_2


SCHEMES = {
    "tensorwise": Scheme(WHOLE, WHOLE, WHOLE, WHOLE, exact),
    "blockwise": Scheme((1, 128), (128, 1), (128, 128), (128, 128)),
    "mxfp8": Scheme((1, 32), (32, 1), (1, 32), (32, 1)),
}
SCHEMES["delayed"] = SCHEMES["tensorwise"]  # where the scale is already that of the data


def linear(x: Tensor, weight: Tensor, grad: Tensor, recipe: str, grad_form: str) -> tuple[Tensor, Tensor, Tensor]:
    """(y = x w^T, dx = dy w, dw = dy^T x) in fp32, each operand quantized along the dimension that is summed over."""
    scheme = SCHEMES[recipe]
    turn = scheme.rounding
    y = quantized(x, "e4m3", scheme.rows, turn) @ quantized(weight, "e4m3", scheme.weight_rows, turn).T
    dx = quantized(grad, grad_form, scheme.rows, turn) @ quantized(weight, "e4m3", scheme.weight_columns, turn)
    dw = quantized(grad, grad_form, scheme.columns, turn).T @ quantized(x, "e4m3", scheme.columns, turn)
    return y, dx, dw
