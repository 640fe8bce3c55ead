"""xIPReLU and xIPReLUP (arXiv 2411.13010): the integral of a PReLU, and its version with a trainable power.

    xiprelu : f = a x^2 + beta x               f' = 2 a x + beta                       df/da = x^2
    xiprelup: f = a |x|^q + beta x             f' = a q |x|^(q-1) sign(x) + beta       df/da = |x|^q
                                               df/dq = a |x|^q ln|x|
    a = a_p for x > 0, a_n for x <= 0; a_p, a_n = softplus(raw), q = 1 + softplus(power), beta = 0.5

f(+-inf) = +inf, f'(0) = beta, every parameter derivative is 0 at 0. The authors floor |x| at 1e-6; here it is exact.

Kernel error in |v| + 0.1 |x|, fp32, over [-80, 80], every ex2 and rsqrt off by the most a GPU may be
(tests/test_kernels_precision.py): xiprelu y 3.1e-7, slope 1.3e-7, integrands 5.7e-8;
xiprelup y 1.2e-6 (where its terms cancel), slope 9.2e-7, integrands 8.1e-7; with exact instructions 3.6e-7, 5.5e-7,
4.9e-7; beyond 100 the rounding of the exponent grows it to 5e-6.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_act.kernels.device_math import power
from megatron_act.kernels.spec import BETA, Activation, Param, finite

LN2 = 0.6931471805599453


@triton.jit
def xiprelu_fwd(x, p):
    """y in fp32; p = (a_p, a_n)."""
    return x * (tl.where(x > 0, p[0], p[1]) * x + 0.5)


@triton.jit
def xiprelu_bwd(x, g, p):
    """(dx, (da_p, da_n)) in fp32."""
    g_p = tl.where(x > 0, g, 0.0)
    g_n = tl.where(x > 0, 0.0, g)
    slope = 2.0 * tl.where(x > 0, p[0], p[1]) * x + 0.5
    return g * tl.clamp(slope, -3e38, 3e38), ((g_p * x) * x, (g_n * x) * x)


@triton.jit
def xiprelup_fwd(x, p):
    """y in fp32; p = (a_p, a_n, q - 1)."""
    s, _ = power(tl.abs(x), p[2])
    return x * (tl.where(x > 0, p[0], -p[1]) * s + 0.5)


@triton.jit
def xiprelup_bwd(x, g, p):
    """(dx, (da_p, da_n, dq)) in fp32."""
    a_p, a_n, r = p
    q = r + 1.0
    s, log2 = power(tl.abs(x), r)
    s = tl.minimum(s, 3e38 / tl.maximum(1.0, q * tl.maximum(a_p, a_n)))  # no slope is infinite: 0 times it stays 0
    to_log = 0.6931471805599453 / r
    gt = (g * s) * tl.abs(x)
    dq = gt * (tl.where(x > 0, a_p * to_log, a_n * to_log) * log2)
    dx = g * (tl.where(x > 0, a_p * q, -(a_n * q)) * s + 0.5)
    return dx, (tl.where(x > 0, gt, 0.0), tl.where(x > 0, 0.0, gt), dq)


def xiprelu_torch_fwd(x: Tensor, a_p: Tensor, a_n: Tensor) -> Tensor:
    """y; a_p, a_n: 0-d tensors."""
    low, high = x.clamp(max=0.0), torch.relu(x)
    return torch.addcmul(low * (a_n * low + BETA), high, a_p * high + BETA)


def xiprelu_torch_bwd(x: Tensor, g: Tensor, a_p: Tensor, a_n: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(dx, (g df/da_p, g df/da_n)), elementwise."""
    low, high = x.clamp(max=0.0), torch.relu(x)
    slope = torch.addcmul(2.0 * a_n * low + BETA, high, 2.0 * a_p)
    return g * finite(slope), (g * high * high, g * low * low)


def xiprelup_torch_fwd(x: Tensor, a_p: Tensor, a_n: Tensor, q: Tensor) -> Tensor:
    """y; a_p, a_n, q: 0-d tensors."""
    y = torch.where(x > 0, a_p, a_n) * x.abs().pow(q) + BETA * x
    return torch.where(x.isinf(), x.abs(), y)


def xiprelup_torch_bwd(
    x: Tensor, g: Tensor, a_p: Tensor, a_n: Tensor, q: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(dx, (g df/da_p, g df/da_n, g df/dq)), elementwise."""
    u = x.abs()
    a, s = torch.where(x > 0, a_p, a_n), u.pow(q - 1.0)
    gt = (g * finite(s)) * u
    return g * finite(a * q * s * x.sign() + BETA), (
        torch.where(x > 0, gt, 0.0),
        torch.where(x > 0, 0.0, gt),
        gt * (a * torch.xlogy(u.sign(), u)),
    )


QUADRATIC = (Param("alpha_p", 0.8, "softplus"), Param("alpha_n", 0.8, "softplus"))
POWER = Param("power", 2.0, "softplus", offset=1.0)
ACTIVATIONS = (
    Activation("xiprelu", QUADRATIC, xiprelu_fwd, xiprelu_bwd, xiprelu_torch_fwd, xiprelu_torch_bwd),
    Activation("xiprelup", (*QUADRATIC, POWER), xiprelup_fwd, xiprelup_bwd, xiprelup_torch_fwd, xiprelup_torch_bwd),
)
