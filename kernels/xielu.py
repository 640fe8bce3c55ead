"""xIELU (Huang and Schlag, arXiv 2411.13010): the integral of an expanded ELU, a quadratic joined to an exponential.

    x > 0 : f = a_p x^2 + beta x              f' = 2 a_p x + beta         df/da_p = x^2
    x <= 0: f = a_n (e^x - 1 - x) + beta x    f' = a_n (e^x - 1) + beta   df/da_n = h(x) = e^x - 1 - x
    a_p = softplus(alpha_p),  a_n = beta + softplus(alpha_n),  beta = 0.5

f(-inf) = f(+inf) = +inf. At x = 0 the slope is beta, the true derivative; code that evaluates e^min(x, -1e-6) has
beta - a_n there. h is the whole alpha_n gradient and behaves like x^2/2: it has its own series near 0.

Kernel error in |v| + 0.1 |x|, fp32, over [-80, 80], every ex2 and rsqrt off by the most a GPU may be
(tests/test_kernels_precision.py): y 3.4e-7, slope 8.0e-7, integrands 2.2e-7.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_act.kernels.device_math import clip_low, exp_of, h_series
from megatron_act.kernels.spec import BETA, Activation, Param, finite

TERMS = 14  # of the series of h: 0.5^14 / 16! < 1e-17


@triton.jit
def xielu_fwd(x, p):
    """y in fp32; p = (a_p, a_n - beta). Both branches are added, each 0 on the other's side: no predicate is held."""
    a_p, spread = p
    a_n = spread + 0.5
    low, high = tl.minimum(x, 0.0), clip_low(x)
    near = low * ((a_n * low) * h_series(low) + 0.5)
    far = a_n * exp_of(low) - (spread * low + a_n)  # not h: +inf, not NaN, at -inf
    return high * (a_p * high + 0.5) + tl.where(low > -1.0, near, far)


@triton.jit
def xielu_bwd(x, g, p):
    """(dx, (da_p, da_n)) in fp32."""
    a_p, a_n = p[0], p[1] + 0.5
    low, high = tl.minimum(x, 0.0), clip_low(x)
    h = low * low * h_series(low)
    e = exp_of(low) - 1.0
    near = low > -1.0
    gx = g * high
    dx = gx * (2.0 * a_p) + g * (a_n * tl.where(near, low + h, e) + 0.5)
    return dx, (gx * high, g * tl.where(near, h, e - low))


def h(x: Tensor) -> Tensor:
    """e^x - 1 - x for x <= 0 in x's precision.

    A float32 x goes through float64, where the subtraction leaves 2e-16 / |x| of relative error: on a CPU half the time
    of a series. A float64 x above -0.5 takes the series.
    """
    if x.dtype != torch.float64:
        wide = x.double()
        return torch.expm1(wide).sub_(wide).to(x.dtype)
    q = x.clamp(min=-0.5)
    series = torch.ones_like(q)
    for k in range(TERMS + 2, 2, -1):
        series = 1.0 + q / k * series
    return torch.where(x > -0.5, 0.5 * q * q * series, torch.expm1(x) - x)


def torch_fwd(x: Tensor, a_p: Tensor, a_n: Tensor) -> Tensor:
    """y; a_p, a_n: 0-d tensors. Clamps, not torch.where (five exponentials on a CPU); in place, memory is the rest."""
    low, high = x.clamp(max=0.0), torch.relu(x)
    y = (high * a_p).add_(BETA).mul_(high)
    return y.addcmul_(low, BETA - a_n).addcmul_(torch.expm1(low), a_n)


def torch_bwd(x: Tensor, g: Tensor, a_p: Tensor, a_n: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(dx, (g df/da_p, g df/da_n)), elementwise."""
    low, high = x.clamp(max=0.0), torch.relu(x)
    slope = (high * (2.0 * a_p)).addcmul_(torch.expm1(low), a_n).add_(BETA)
    return g * finite(slope), ((g * high).mul_(high), h(low).mul_(g))


XIELU = Activation(
    name="xielu",
    params=(Param("alpha_p", 0.8, "softplus"), Param("alpha_n", 0.8, "softplus", offset=BETA)),
    fwd=xielu_fwd,
    bwd=xielu_bwd,
    torch_fwd=torch_fwd,
    torch_bwd=torch_bwd,
)
ACTIVATIONS = (XIELU,)
