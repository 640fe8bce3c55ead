"""x times a gate that rises from 0 to 1 symmetrically: gate(x) + gate(-x) = 1. Device and torch forms.

    logistic: gate = 1 / (1 + e^-x)    gaussian: gate = Phi(x)    cauchy: gate = arctan(x)/pi + 1/2

Device, with a = |x|: x gate(x) = max(0, x) - w and its slope is D for x <= 0, 1 - D for x > 0, where w = a gate(-a) and
D = dw/da. Each function returns (w, D, x s(x)) with s = 2 gate - 1; for small a, where a - 2 w would cancel, the last
has its own series. w and D are finite at a = inf. What an activation does not take is not compiled.

Torch: a gate is a value, so that an activation takes only what it needs. No torch.where on the way: on a CPU it costs
as much as five exponentials.
"""
# mypy: ignore-errors

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_act.kernels.device_math import (
    atan_series,
    erf_series,
    exp_half,
    exp_of,
    mills,
    normal_tail,
    reciprocal,
    tanh_series,
)


@triton.jit
def logistic(x):
    """(w, D, x s) of the logistic gate."""
    a = tl.minimum(tl.abs(x), 200.0)  # e^-200 = 0; keeps inf * 0 out
    t = exp_of(-a)
    r = reciprocal(1.0 + t)
    spread = tl.where(a <= 0.7, a * tanh_series(a * a), 1.0 - 2.0 * (t * r))
    return a * (t * r), (t * r) * (1.0 - a * r), tl.abs(x) * spread


@triton.jit
def gaussian(x):
    """(w, D, x s) of the gaussian gate. D's two terms share one ex2: its error does not grow where they cancel."""
    a = tl.minimum(tl.abs(x), 40.0)
    z = a * a
    q = mills(a)
    t = exp_half(z)
    spread = tl.where(z <= 0.49, a * erf_series(z), 1.0 - 2.0 * (t * q))
    return a * normal_tail(a), t * (q - a * 0.3989422804014327), tl.abs(x) * spread


@triton.jit
def cauchy(x):
    """(w, D, x s) of the arctan gate. A squared rsqrt costs a third of a division; its 4 ulp scale D, no more."""
    a = tl.abs(x)
    root = tl.rsqrt(a)
    m = tl.minimum(a, root * root)  # min(a, 1/a)
    z = m * m
    p = atan_series(z)
    b = tl.minimum(a * a, 1.0) * p  # a atan(m) / pi, since a (1/a) = 1
    small = a <= 1.0
    c = (m * 0.3183098861837907) * reciprocal(1.0 + z)  # a / (pi (1 + a^2))
    w = tl.where(small, 0.5 * a - b, b)
    return w, tl.where(small, 0.5 - m * p, m * p) - c, tl.where(small, 2.0 * b, a - 2.0 * b)


@dataclass(frozen=True)
class TorchGate:
    """A gate on tensors: ``gate(x)``, ``x_slope(x) = x gate'(x)`` and ``x_spread(x) = x (2 gate(x) - 1)``."""

    gate: Callable[[Tensor], Tensor]
    x_slope: Callable[[Tensor], Tensor]
    x_spread: Callable[[Tensor], Tensor]

    def slope(self, x: Tensor) -> Tensor:
        """d(x gate(x))/dx."""
        return self.gate(x) + self.x_slope(x)


def _logistic_x_slope(x: Tensor) -> Tensor:
    c = x.clamp(-800.0, 800.0)  # e^-800 = 0 in float64; keeps inf * 0 out
    return c * torch.sigmoid(c) * torch.sigmoid(-c)


def _logistic_x_spread(x: Tensor) -> Tensor:
    a = x.abs()
    return -a * torch.expm1(-a) * torch.sigmoid(a)  # a tanh(a/2), three times faster on a CPU


LOGISTIC = TorchGate(torch.sigmoid, _logistic_x_slope, _logistic_x_spread)


def _gaussian_gate(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))  # erfc does not cancel for x << 0


def _gaussian_x_slope(x: Tensor) -> Tensor:
    c = x.clamp(-40.0, 40.0)  # e^-800
    return c * torch.exp(-0.5 * c * c) * (1.0 / math.sqrt(2.0 * math.pi))


GAUSSIAN = TorchGate(_gaussian_gate, _gaussian_x_slope, lambda x: x * torch.erf(x * math.sqrt(0.5)))


def _cauchy_gate(x: Tensor) -> Tensor:
    return torch.atan2(x.new_ones(()), -x) * (1.0 / math.pi)


class _Cauchy(TorchGate):
    def slope(self, x: Tensor) -> Tensor:
        """gate and x gate' cancel for x << 0: sum of (-1)^(k+1) 2k/(2k+1) m^(2k+1) / pi over k >= 1, m = -1/x.

        Only float64 has the digits for it to matter.
        """
        if x.dtype != torch.float64:
            return super().slope(x)
        m = -1.0 / x.clamp(max=-8.0)
        z = m * m
        series = torch.zeros_like(m)
        for k in range(9, 0, -1):  # 8^-18 < 1e-16
            series = 2.0 * k / (2.0 * k + 1.0) - z * series
        near = x.clamp(min=-8.0)
        return torch.where(x < -8.0, m * z * series * (1.0 / math.pi), self.gate(near) + self.x_slope(near))


def _cauchy_x_slope(x: Tensor) -> Tensor:
    c = x.clamp(-1e18, 1e18)  # c^2 stays finite in float32
    return c / (math.pi * (1.0 + c * c))


CAUCHY = _Cauchy(_cauchy_gate, _cauchy_x_slope, lambda x: x * (torch.atan(x) * (2.0 / math.pi)))
TANH_SCALE = 2.0 * math.sqrt(2.0 / math.pi)


def _tanh_gate(x: Tensor) -> Tensor:
    return torch.sigmoid(TANH_SCALE * (x + 0.044715 * x**3))


def _tanh_x_slope(x: Tensor) -> Tensor:
    c = x.clamp(-40.0, 40.0)
    return c * (TANH_SCALE * (1.0 + 0.134145 * c * c)) * _tanh_gate(c) * _tanh_gate(-c)


TANH = TorchGate(_tanh_gate, _tanh_x_slope, lambda x: x * (2.0 * _tanh_gate(x) - 1.0))
