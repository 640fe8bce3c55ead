"""xIELU (Huang and Schlag, arXiv 2411.13010): the integral of an expanded ELU, a quadratic joined to an exponential.

    x > 0 : f = a_p x^2 + beta x              f' = 2 a_p x + beta         df/da_p = x^2
    x <= 0: f = a_n (e^x - 1 - x) + beta x    f' = a_n (e^x - 1) + beta   df/da_n = h(x) = e^x - 1 - x
    a_p = softplus(alpha_p),  a_n = beta + softplus(alpha_n),  beta = 0.5

f(-inf) = f(+inf) = +inf. At x = 0 the slope is beta, the true derivative; code that evaluates e^min(x, -1e-6) has
beta - a_n there. h is the whole alpha_n gradient and behaves like x^2/2: it has its own series near 0.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_act.kernels.device_math import exp_neg, h_series
from megatron_act.kernels.spec import BETA, Activation, Param

SERIES_FROM = -0.5  # h by its series above, by expm1(x) - x below
TERMS = 14  # (0.5)^14 / 16! < 1e-17: float64 precision


@triton.jit
def xielu_fwd(x, p):
    """y in fp32; p = (a_p, a_n)."""
    a_p, a_n = p
    near = x * (a_n * (x * h_series(x)) + 0.5)
    far = a_n * exp_neg(-x) - ((a_n - 0.5) * x + a_n)  # not h: +inf, not NaN, at -inf
    return tl.where(x > 0, x * (a_p * x + 0.5), tl.where(x > -1.0, near, far))


@triton.jit
def xielu_bwd(x, g, p):
    """(dx, (da_p, da_n)) in fp32."""
    a_p, a_n = p
    square = x * x
    t = exp_neg(-x)
    near = square * h_series(x)
    h = tl.where(x > -1.0, near, t - (x + 1.0))
    slope = tl.where(x > -1.0, a_n * (x + near) + 0.5, a_n * t - (a_n - 0.5))
    slope = tl.where(x > 0, 2.0 * a_p * x + 0.5, slope)
    return g * slope, (tl.where(x > 0, (g * x) * x, 0.0), tl.where(x > 0, 0.0, g * h))


def h(x: Tensor) -> Tensor:
    """expm1(x) - x for x <= 0 without cancellation, in x's precision."""
    q = x.clamp(min=SERIES_FROM)
    series = torch.full_like(q, 1.0)
    for k in range(TERMS + 2, 2, -1):
        series = 1.0 + q / k * series
    return torch.where(x > SERIES_FROM, 0.5 * q * q * series, torch.expm1(x) - x)


def torch_fwd(x: Tensor, a_p: Tensor, a_n: Tensor) -> Tensor:
    """y; a_p, a_n: 0-d tensors."""
    negative = a_n * torch.expm1(x.clamp(max=0.0)) - (a_n - BETA) * x
    return torch.where(x > 0, x * (a_p * x + BETA), negative)


def torch_bwd(x: Tensor, g: Tensor, a_p: Tensor, a_n: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(dx, (g df/da_p, g df/da_n)), elementwise."""
    low, high = x.clamp(max=0.0), x.clamp(min=0.0)
    dx = g * torch.where(x > 0, 2.0 * a_p * x, a_n * torch.expm1(low)).add(BETA)
    return dx, (g * high * high, g * h(low))


XIELU = Activation(
    name="xielu",
    params=(Param("alpha_p", 0.8, "softplus"), Param("alpha_n", 0.8, "softplus", offset=BETA)),
    fwd=xielu_fwd,
    bwd=xielu_bwd,
    torch_fwd=torch_fwd,
    torch_bwd=torch_bwd,
)
ACTIVATIONS = (XIELU,)
