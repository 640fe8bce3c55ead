"""Activations without parameters: ReLU^2, GELU (exact), SiLU, ReLU.

    relu2: f = max(0, x)^2            f' = 2 max(0, x)
    gelu : f = x Phi(x)               f' = Phi(x) + x phi(x)        Phi, phi: standard normal distribution and density
    silu : f = x s(x)                 f' = s (1 + x (1 - s))        s(x) = 1 / (1 + e^-x)
    relu : f = max(0, x)              f' = [x > 0]

f(-inf) = 0 and f(+inf) = +inf for all. ``torch.nn.functional.gelu`` is exact by default; Megatron's fused bias-GELU and
Transformer Engine's GELU are the tanh form, which differs by up to 4.7e-4.
"""
# mypy: disallow-untyped-defs=False

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megatron_act.kernels.device_math import sigmoid
from megatron_act.kernels.spec import Activation

CUT = 40.0  # Phi(-40) and phi(40) are 0 in float64: clamping there changes no finite value and keeps inf * 0 out


@triton.jit
def relu2_fwd(x, p):
    """max(0, x)^2."""
    r = tl.where(x <= 0, 0.0, x)
    return r * r


@triton.jit
def relu2_bwd(x, g, p):
    """(dx, ())."""
    return g * 2.0 * tl.where(x <= 0, 0.0, x), ()


@triton.jit
def gelu_fwd(x, p):
    """x Phi(x)."""
    half = 0.5 * tl.math.erf(tl.maximum(x, -40.0) * 0.7071067811865476) + 0.5
    return tl.maximum(x, -40.0, propagate_nan=tl.PropagateNan.ALL) * half


@triton.jit
def gelu_bwd(x, g, p):
    """(dx, ())."""
    c = tl.minimum(tl.maximum(x, -40.0), 40.0)
    half = 0.5 * tl.math.erf(c * 0.7071067811865476) + 0.5
    return g * (half + c * (0.3989422804014327 * tl.exp(-0.5 * c * c))), ()


@triton.jit
def silu_fwd(x, p):
    """x s(x)."""
    return tl.maximum(x, -200.0, propagate_nan=tl.PropagateNan.ALL) * sigmoid(x)


@triton.jit
def silu_bwd(x, g, p):
    """(dx, ())."""
    s = sigmoid(x)
    c = tl.minimum(tl.maximum(x, -200.0), 200.0)
    return g * (s * (1.0 + c * (1.0 - s))), ()


@triton.jit
def relu_fwd(x, p):
    """max(0, x)."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def relu_bwd(x, g, p):
    """(dx, ())."""
    return tl.where(x <= 0, 0.0, g), ()


def relu2_torch_bwd(x: Tensor, g: Tensor) -> tuple[Tensor, tuple[()]]:
    """(dx, ())."""
    return g * (2.0 * torch.relu(x)), ()


def gelu_torch_fwd(x: Tensor) -> Tensor:
    """x Phi(x) by erfc, which does not cancel for x << 0."""
    c = x.clamp(min=-CUT)
    return c * (0.5 * torch.erfc(c * -math.sqrt(0.5)))


def gelu_torch_bwd(x: Tensor, g: Tensor) -> tuple[Tensor, tuple[()]]:
    """(dx, ())."""
    c = x.clamp(-CUT, CUT)
    density = torch.exp(-0.5 * c * c) / math.sqrt(2.0 * math.pi)
    return g * (0.5 * torch.erfc(c * -math.sqrt(0.5)) + c * density), ()


def silu_torch_fwd(x: Tensor) -> Tensor:
    """x s(x), 0 at -inf."""
    return x.clamp(min=-800.0) * torch.sigmoid(x)


def silu_torch_bwd(x: Tensor, g: Tensor) -> tuple[Tensor, tuple[()]]:
    """(dx, ())."""
    s = torch.sigmoid(x)
    return g * (s * (1.0 + x.clamp(-800.0, 800.0) * torch.sigmoid(-x))), ()


def relu_torch_bwd(x: Tensor, g: Tensor) -> tuple[Tensor, tuple[()]]:
    """(dx, ())."""
    return g * (x > 0), ()


ACTIVATIONS = (
    Activation("relu2", (), relu2_fwd, relu2_bwd, lambda x: F.relu(x).square(), relu2_torch_bwd),
    Activation("gelu", (), gelu_fwd, gelu_bwd, gelu_torch_fwd, gelu_torch_bwd),
    Activation("silu", (), silu_fwd, silu_bwd, silu_torch_fwd, silu_torch_bwd),
    Activation("relu", (), relu_fwd, relu_bwd, F.relu, relu_torch_bwd),
)
