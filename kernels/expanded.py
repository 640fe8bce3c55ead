"""xSiLU, xGELU, xATLU (Huang, arXiv 2405.20768): a gate expanded from (0, 1) to (-alpha, 1 + alpha).

    f = x (gate(x) (1 + 2 alpha) - alpha)          df/dalpha = x s(x), s = 2 gate - 1
      = c |x| - (1 + 2 alpha) w(|x|)               c = 1 + alpha for x > 0, alpha for x <= 0   (``gates.py``)
    f' = c - (1 + 2 alpha) D for x > 0, (1 + 2 alpha) D - alpha for x <= 0

gate: logistic (xSiLU), gaussian (xGELU), arctan (xATLU). alpha is unconstrained, initially 0: SiLU, GELU, ATLU.
At +-inf f is c inf, or the limit of -(1 + 2 alpha) w where c = 0.

Kernel error in |v| + 0.1 |x|, fp32, over [-80, 80], every ex2 and rsqrt off by the most a GPU may be
(tests/test_kernels_precision.py): y / slope / integrand: xsilu 4.0e-7 / 4.2e-7 / 2.9e-7,
xgelu 4.9e-7 / 5.5e-7 / 2.1e-7, xatlu 1.8e-7 / 6.1e-7 / 1.4e-7.
"""
# mypy: disallow-untyped-defs=False

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_act.kernels.device_math import clip_low
from megatron_act.kernels.gates import CAUCHY, GAUSSIAN, LOGISTIC, TorchGate, cauchy, gaussian, logistic
from megatron_act.kernels.spec import Activation, Param


@triton.jit
def value(x, w, alpha):
    """f from w: alpha |x| + max(0, x) - (1 + 2 alpha) w; what a limit multiplies by 0 is kept finite."""
    size = tl.minimum(tl.abs(x), tl.where((alpha == 0) | (alpha == -1), 3e38, float("inf")))
    high = tl.minimum(clip_low(x), tl.where(alpha == -1, 3e38, float("inf")))
    return alpha * size + high - (1.0 + 2.0 * alpha) * w


@triton.jit
def slope(x, d, alpha):
    """f' from D."""
    k = 1.0 + 2.0 * alpha
    return tl.where(x > 0, 1.0 + alpha - k * d, k * d - alpha)


@triton.jit
def xsilu_fwd(x, p):
    """y in fp32; p = (alpha,)."""
    w, _, _ = logistic(x)
    return value(x, w, p[0])


@triton.jit
def xsilu_bwd(x, g, p):
    """(dx, (dalpha,)) in fp32."""
    _, d, xs = logistic(x)
    return g * slope(x, d, p[0]), (g * xs,)


@triton.jit
def xgelu_fwd(x, p):
    """y in fp32; p = (alpha,)."""
    w, _, _ = gaussian(x)
    return value(x, w, p[0])


@triton.jit
def xgelu_bwd(x, g, p):
    """(dx, (dalpha,)) in fp32."""
    _, d, xs = gaussian(x)
    return g * slope(x, d, p[0]), (g * xs,)


@triton.jit
def xatlu_fwd(x, p):
    """y in fp32; p = (alpha,)."""
    w, _, _ = cauchy(x)
    return value(x, w, p[0])


@triton.jit
def xatlu_bwd(x, g, p):
    """(dx, (dalpha,)) in fp32."""
    _, d, xs = cauchy(x)
    return g * slope(x, d, p[0]), (g * xs,)


def _activation(name: str, fwd, bwd, gate: TorchGate) -> Activation:
    def torch_fwd(x: Tensor, alpha: Tensor) -> Tensor:
        free = torch.full_like(alpha, math.inf)  # x is cut only where the gate's limit is 0: there inf * 0 would be NaN
        low, high = torch.where(alpha == 0, 1e30, free), torch.where(alpha == -1, 1e30, free)
        x = x.clamp(-low, high)
        return x * ((1.0 + 2.0 * alpha) * gate.gate(x) - alpha)

    def torch_bwd(x: Tensor, g: Tensor, alpha: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return g * ((1.0 + 2.0 * alpha) * gate.slope(x) - alpha), (g * gate.x_spread(x),)

    return Activation(name, (Param("alpha", 0.0),), fwd, bwd, torch_fwd, torch_bwd)


ACTIVATIONS = (
    _activation("xsilu", xsilu_fwd, xsilu_bwd, LOGISTIC),
    _activation("xgelu", xgelu_fwd, xgelu_bwd, GAUSSIAN),
    _activation("xatlu", xatlu_fwd, xatlu_bwd, CAUCHY),
)
