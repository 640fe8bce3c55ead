"""Activations without parameters: ReLU^2, GELU (exact and tanh form), SiLU, ReLU.

    relu2    : f = max(0, x)^2                 f' = 2 max(0, x)
    gelu     : f = x Phi(x)                    Phi: standard normal distribution
    silu     : f = x / (1 + e^-x)
    gelu_tanh: f = x / (1 + e^-v(x))           v = 2 sqrt(2/pi) (x + 0.044715 x^3), i.e. (1 + tanh(v/2)) / 2
    relu     : f = max(0, x)                   f' = [x > 0]

f(-inf) = 0 and f(+inf) = +inf for all. ``torch.nn.functional.gelu`` is exact by default; Megatron's fused bias-GELU and
Transformer Engine's GELU are the tanh form, which differs by up to 4.7e-4. Slopes of the gated ones: ``gates.py``.

Kernel error in |v| + 0.1 |x|, fp32, over [-80, 80], every ex2 and rsqrt off by the most a GPU may be
(tests/test_kernels_precision.py): y / slope: relu2 5.7e-8 / 0, gelu 2.5e-7 / 4.0e-7,
gelu_tanh 2.2e-7 / 3.4e-7, silu 2.5e-7 / 2.9e-7, relu 0 / 0.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_act.kernels.device_math import clip_low, exp_of, reciprocal
from megatron_act.kernels.gates import GAUSSIAN, LOGISTIC, TANH, TorchGate, gaussian, logistic
from megatron_act.kernels.spec import Activation


@triton.jit
def relu2_fwd(x, p):
    """max(0, x)^2."""
    return clip_low(x) * clip_low(x)


@triton.jit
def relu2_bwd(x, g, p):
    """(dx, ())."""
    return (g * 2.0) * clip_low(x), ()


@triton.jit
def relu_fwd(x, p):
    """max(0, x)."""
    return clip_low(x)


@triton.jit
def relu_bwd(x, g, p):
    """(dx, ())."""
    return tl.where(x <= 0, 0.0, g), ()


@triton.jit
def gelu_fwd(x, p):
    """x Phi(x)."""
    w, _, _ = gaussian(x)
    return clip_low(x) - w


@triton.jit
def gelu_bwd(x, g, p):
    """(dx, ())."""
    _, d, _ = gaussian(x)
    return g * tl.where(x > 0, 1.0 - d, d), ()


@triton.jit
def silu_fwd(x, p):
    """x / (1 + e^-x)."""
    w, _, _ = logistic(x)
    return clip_low(x) - w


@triton.jit
def silu_bwd(x, g, p):
    """(dx, ())."""
    _, d, _ = logistic(x)
    return g * tl.where(x > 0, 1.0 - d, d), ()


@triton.jit
def tanh_gate(x):
    """(w, D) of the gate of gelu_tanh."""
    a = tl.minimum(tl.abs(x), 40.0)  # e^-v(40) = 0; keeps inf * 0 out
    z = a * a
    t = exp_of(-a * (z * 0.07135481282553563 + 1.5957691216057308))
    r = reciprocal(1.0 + t)
    return a * (t * r), (t * r) * (1.0 - a * (z * 0.2140644384766069 + 1.5957691216057308) * r)


@triton.jit
def gelu_tanh_fwd(x, p):
    """x / (1 + e^-v(x))."""
    w, _ = tanh_gate(x)
    return clip_low(x) - w


@triton.jit
def gelu_tanh_bwd(x, g, p):
    """(dx, ())."""
    _, d = tanh_gate(x)
    return g * tl.where(x > 0, 1.0 - d, d), ()


def relu2_torch_bwd(x: Tensor, g: Tensor) -> tuple[Tensor, tuple[()]]:
    """(dx, ())."""
    return (2.0 * g) * torch.relu(x), ()


def relu_torch_bwd(x: Tensor, g: Tensor) -> tuple[Tensor, tuple[()]]:
    """(dx, ()); sign(relu(x)) is [x > 0], faster than a comparison on a CPU."""
    return g * torch.relu(x).sign(), ()


def _gated(name: str, fwd, bwd, gate: TorchGate) -> Activation:
    def torch_fwd(x: Tensor) -> Tensor:
        return x.clamp(min=-1e30) * gate.gate(x)  # 0, not inf * 0, at -inf

    def torch_bwd(x: Tensor, g: Tensor) -> tuple[Tensor, tuple[()]]:
        return g * gate.slope(x), ()

    return Activation(name, (), fwd, bwd, torch_fwd, torch_bwd)


ACTIVATIONS = (
    Activation("relu2", (), relu2_fwd, relu2_bwd, lambda x: torch.relu(x).square(), relu2_torch_bwd),
    Activation("relu", (), relu_fwd, relu_bwd, torch.relu, relu_torch_bwd),
    _gated("gelu", gelu_fwd, gelu_bwd, GAUSSIAN),
    _gated("silu", silu_fwd, silu_bwd, LOGISTIC),
    _gated("gelu_tanh", gelu_tanh_fwd, gelu_tanh_bwd, TANH),
)
