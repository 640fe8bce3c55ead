"""What an engineer would write without a kernel: the formula in torch, its backward pass derived by autograd.

``Activation.reference`` is no such baseline: its own backward pass goes through float64. Where torch has the function
itself, that is taken, in x's dtype; otherwise the registry's formula, in fp32 and rounded to x's dtype.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_act.kernels import api as kernels

Function = Callable[..., Tensor]  # (x, *raw parameters) -> y, differentiable in all of them


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


NATIVE: dict[str, Function] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": _relu2,
}


def eager(name: str, gated: bool, x: Tensor, raw: list[Tensor]) -> Function:
    """The plain function of ``name`` for tensors like ``x`` and ``raw``; gated: x is [gate | up]."""
    single = NATIVE.get(name)
    gate = x.chunk(2, -1)[0] if gated else x
    function = single or _formula(name, gate, raw)
    if not gated:
        return function

    def product(both: Tensor, *params: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return function(gate, *params) * up

    return product


def compiled(function: Function) -> Function:
    """The same by torch.compile, for one shape; it starts from nothing, or its limit of variants would be met."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def _formula(name: str, x: Tensor, raw: list[Tensor]) -> Function:
    """``Activation.torch_fwd`` without its in-place steps, through which autograd cannot go."""
    activation = kernels.get(name)

    def formula(x: Tensor, *raw: Tensor) -> Tensor:
        effective = [param.constrained(each, torch.float32) for param, each in zip(activation.params, raw, strict=True)]
        return activation.torch_fwd(x.float(), *effective).to(x.dtype)

    with torch.no_grad():
        return make_fx(torch.func.functionalize(formula), tracing_mode="fake")(x, *raw)
