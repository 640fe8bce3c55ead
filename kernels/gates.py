"""x times a gate that rises from 0 to 1 symmetrically: gate(x) + gate(-x) = 1. Device and torch forms, a = |x|.

    x gate(x) = max(0, x) - w(a)       w(a) = a gate(-a)       slope: D for x <= 0, 1 - D for x > 0, with D = dw/da
    x s(x) = a - 2 w(a)                s = 2 gate - 1: what an expanded gate is multiplied by

    logistic: gate = 1 / (1 + e^-x)    gaussian: gate = Phi(x)    cauchy: gate = arctan(x)/pi + 1/2

Each device function returns (w, D, n) where n = x s(x) for small a, in a form that does not cancel there, and each
has its threshold in ``NEAR``. w and D are finite at a = inf.
"""
# mypy: ignore-errors

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_act.kernels.device_math import atan_series, erf_series, exp_neg, mills, tanh_series


@triton.jit
def logistic(x):
    """(w, D, near) of the logistic gate; near holds for a^2 <= 0.5."""
    a = tl.minimum(tl.abs(x), 200.0)  # e^-200 = 0; keeps inf * 0 out
    t = exp_neg(a)
    r = 1.0 / (1.0 + t)
    return a * (t * r), (t * r) * (1.0 - a * r), a * a * tanh_series(a * a)


@triton.jit
def gaussian(x):
    """(w, D, near) of the gaussian gate; near holds for a^2 <= 0.5."""
    a = tl.minimum(tl.abs(x), 40.0)
    z = a * a
    t = exp_neg(0.5 * z)
    q = mills(a)
    return a * (t * q), t * (q - a * 0.3989422804014327), z * erf_series(z)


@triton.jit
def cauchy(x):
    """(w, D, near) of the arctan gate; near holds for a <= 1."""
    a = tl.abs(x)
    r = 1.0 / a
    m = tl.minimum(a, r)
    z = m * m
    p = atan_series(z) * 0.3183098861837907
    b = tl.minimum(a * a, 1.0) * p  # a atan(m) / pi
    small = a <= 1.0
    c = m * 0.3183098861837907 / (1.0 + z)  # a / (pi (1 + a^2))
    w = tl.where(small, 0.5 * a - b, b)
    return w, tl.where(small, 0.5 - m * p, m * p) - c, 2.0 * b


def logistic_torch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(w, D, x s(x)) for every x."""
    a = x.abs()
    c = a.clamp(max=800.0)  # e^-800 = 0 in float64
    low, high = torch.sigmoid(-c), torch.sigmoid(c)
    return c * low, low * (1.0 - c * high), a * torch.tanh(0.5 * a)


def gaussian_torch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(w, D, x s(x)) for every x; erfc does not cancel."""
    a = x.abs()
    c = a.clamp(max=40.0)  # Phi(-40) = 0 in float64
    low = 0.5 * torch.erfc(c * math.sqrt(0.5))
    density = torch.exp(-0.5 * c * c) / math.sqrt(2.0 * math.pi)
    return c * low, low - c * density, a * torch.erf(a * math.sqrt(0.5))


def cauchy_torch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(w, D, x s(x)) for every x."""
    a = x.abs()
    c = a.clamp(max=1e30)  # w -> 1/pi
    low = torch.atan2(torch.ones_like(c), c) / math.pi
    slope = torch.where(c < 8.0, low - c / (math.pi * (1.0 + c * c)), _cauchy_far_slope(c.clamp(min=8.0)))
    return c * low, slope, a * (1.0 - 2.0 * low).clamp(min=0.0).where(a > 1.0, torch.atan(a) * (2.0 / math.pi))


def _cauchy_far_slope(c: Tensor) -> Tensor:
    """(atan m - m / (1 + m^2)) / pi = sum over k of (-1)^(k+1) 2k/(2k+1) m^(2k+1) / pi with m = 1/c, for c >= 8."""
    m = 1.0 / c
    z = m * m
    series = torch.zeros_like(m)
    for k in range(9, 0, -1):  # 8^-18 < 1e-16
        series = 2.0 * k / (2.0 * k + 1.0) - z * series
    return m * z * series / math.pi
