"""CRReLU (Sun et al., "EAFO", arXiv 2405.12954): ReLU plus a trainable odd bump.

    f = max(0, x) + eps x e^{-x^2/2}     f' = [x > 0] + eps (1 - x^2) e^{-x^2/2}     df/deps = x e^{-x^2/2}

eps is stored as it is: training moves it to either sign. At x = 0 the slope is eps (the x <= 0 branch).
f(-inf) = 0, f(+inf) = +inf.

Kernel error in |v| + 0.1 |x|, fp32, over [-80, 80], every ex2 and rsqrt off by the most a GPU may be
(tests/test_kernels_precision.py): y 1.4e-7, slope 1.4e-7, integrand 3.4e-7.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_act.kernels.device_math import clip_low, exp_half
from megatron_act.kernels.spec import Activation, Param

CUT = 40.0  # e^{-800} is 0 in float64: clamping x there changes no finite value and keeps inf * 0 out


@triton.jit
def crrelu_fwd(x, p):
    """y in fp32; p = (eps,)."""
    (eps,) = p
    c = tl.minimum(tl.maximum(x, -40.0), 40.0)
    return clip_low(x) + eps * c * exp_half(c * c)


@triton.jit
def crrelu_bwd(x, g, p):
    """(dx, (deps,)) in fp32."""
    (eps,) = p
    c = tl.minimum(tl.maximum(x, -40.0), 40.0)
    t = exp_half(c * c)
    dx = tl.where(x > 0, 1.0, 0.0) + eps * ((1.0 - c * c) * t)
    return g * dx, (g * (c * t),)


def torch_fwd(x: Tensor, eps: Tensor) -> Tensor:
    """y; eps: 0-d tensor."""
    c = x.clamp(-CUT, CUT)
    bump = c.square().mul_(-0.5).exp_().mul_(c)
    return torch.relu(x).addcmul_(bump, eps)


def torch_bwd(x: Tensor, g: Tensor, eps: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    """(dx, (g df/deps,)), elementwise; sign(relu(x)) is [x > 0], faster than a comparison on a CPU."""
    c = x.clamp(-CUT, CUT)
    square = c.square()
    t = torch.exp(square * -0.5)
    slope = (1.0 - square).mul_(t).mul_(eps).add_(torch.relu(x).sign())
    return slope.mul_(g), (t.mul(c).mul_(g),)


CRRELU = Activation("crrelu", (Param("eps", 0.01),), crrelu_fwd, crrelu_bwd, torch_fwd, torch_bwd)
ACTIVATIONS = (CRRELU,)
