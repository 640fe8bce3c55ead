"""Activations of ``transformer_engine_torch``, which the op fuser calls: fp32 inside, output through ``quantize.emit``.

GELU is the tanh form. A gated one splits its input's last dimension in halves: act(first) * second. The gradients are
torch's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from te_cpu import quantize, storages

Function = Callable[[Tensor], Tensor]

PLAIN: dict[str, Function] = {
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "srelu": lambda x: torch.relu(x).square(),
    "silu": torch.nn.functional.silu,
}
GATES = {"glu": torch.sigmoid, "geglu": "gelu", "qgeglu": "qgelu", "reglu": "relu", "sreglu": "srelu", "swiglu": "silu"}


def _gated(gate: Any) -> Function:
    function = PLAIN[gate] if isinstance(gate, str) else gate

    def act(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return function(first) * second

    return act


def _forward(act: Function, name: str) -> Callable[..., Any]:
    def run(input: Tensor, quantizer: Any) -> Any:
        return quantize.emit(act(input.float()), quantizer, input.dtype)

    run.__name__ = name
    return run


def _gradient(act: Function, grad: Tensor, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().float().requires_grad_()
        return torch.autograd.grad(act(x), x, grad.float())[0]


def _backward(act: Function, name: str) -> Callable[..., Any]:
    def run(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> Any:
        return quantize.emit(_gradient(act, grad, fwd_input), quantizer, fwd_input.dtype)

    run.__name__ = f"d{name}"
    return run


def _backward_with_bias(act: Function, name: str) -> Callable[..., Any]:
    def run(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> list[Any]:
        dx = _gradient(act, grad, fwd_input)
        return [storages.flat(dx).sum(0).to(grad.dtype), quantize.emit(dx, quantizer, grad.dtype)]

    run.__name__ = f"dbias_d{name}"
    return run


ALL = {**PLAIN, **{name: _gated(gate) for name, gate in GATES.items()}}
EXPORTS = (
    *(_forward(act, name) for name, act in ALL.items()),
    *(_backward(act, name) for name, act in ALL.items()),
    *(_backward_with_bias(act, name) for name, act in PLAIN.items()),
)
