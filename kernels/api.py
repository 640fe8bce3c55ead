"""The face of the kernels: :func:`names`, :func:`get`, :func:`apply`, :func:`backward`, Activation and Param.

from megatron_act.kernels import api as kernels
y = kernels.apply("xielu", x, (alpha_p, alpha_n))
y = kernels.apply("silu", gate_and_up, gated=True)  # SwiGLU
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_act.kernels.checks import KERNEL_DTYPES, check_arguments, check_gradient, check_triton
from megatron_act.kernels.registry import get, names
from megatron_act.kernels.spec import Activation, Param

__all__ = ["BACKENDS", "Activation", "Gradients", "Param", "apply", "backward", "get", "names"]

BACKENDS = ("auto", "triton", "reference")


class Gradients(NamedTuple):
    """What :func:`backward` returns; ``y`` is the forward value, computed again (None where it was not wanted)."""

    dx: Tensor
    dparams: tuple[Tensor, ...]
    dbias: Tensor | None
    dweights: Tensor | None
    y: Tensor | None


def apply(
    name: str, x: Tensor, params: Sequence[Tensor] = (), *,
    bias: Tensor | None = None, weights: Tensor | None = None, gated: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """f(x + bias) times the row's weight, differentiable in x, params, bias and weights; in x's dtype, contiguous.

    x: float tensor of any shape and stride. params: raw parameters in the order of ``get(name).params``, each of shape
    (1,) and any float dtype. bias: shape ``x.shape[-1:]``, broadcast over the other dimensions. weights: one per row
    (token of an expert), shape ``x.shape[:-1]`` or ``(*x.shape[:-1], 1)``.
    gated: the last dimension of x is [gate | up], 2F wide; the result f(gate) up is F wide.
    backend: ``triton``; ``reference`` (torch); ``auto`` takes triton for CUDA tensors of fp32, bf16 or fp16 and the
    reference for all others. Arithmetic is fp32 (fp64 in the reference of an fp64 x).

    Raises ValueError (name, count, shape, device, backend) or TypeError (dtype, not a tensor).
    """
    check_arguments(get(name), x, params, bias, weights, gated)
    if _backend(backend, x) == "triton":
        from megatron_act.kernels.ops import activation_op  # not needed by the reference

        return activation_op(x, list(params), bias, weights, name, gated)
    return _reference(name, x, params, bias, weights, gated)


def backward(
    name: str, grad: Tensor, x: Tensor, params: Sequence[Tensor] = (), *,
    bias: Tensor | None = None, weights: Tensor | None = None, gated: bool = False, backend: str = "auto",
    value: bool = True,
) -> Gradients:  # fmt: skip
    """All gradients of :func:`apply` for the incoming ``grad``, and with ``value`` y again, in one pass over x.

    For a caller that keeps x only and does its own backward. Nothing is recorded by autograd. Arguments and errors as
    for :func:`apply`; ``grad`` has the shape and dtype of its result.
    """
    check_arguments(get(name), x, params, bias, weights, gated)
    check_gradient(grad, x, gated)
    if _backend(backend, x) == "triton":
        from megatron_act.kernels.ops import activation_backward_op

        with torch.no_grad():
            results = activation_backward_op(grad, x, list(params), bias, weights, name, gated, value)
        return _gradients(results, len(params), bias, weights, results[-1] if value else None)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *params, bias, weights)]
    with torch.enable_grad():
        y = _reference(name, leaves[0], leaves[1:-2], leaves[-2], leaves[-1], gated)  # type: ignore[arg-type]
    results = list(torch.autograd.grad(y, [t for t in leaves if t is not None], grad))
    return _gradients(results, len(params), bias, weights, y.detach() if value else None)


def _gradients(
    found: list[Tensor], count: int, bias: Tensor | None, weights: Tensor | None, y: Tensor | None
) -> Gradients:  # fmt: skip
    rest = iter(found[1 + count :])
    dbias, dweights = (None if t is None else next(rest) for t in (bias, weights))
    return Gradients(found[0], tuple(found[1 : 1 + count]), dbias, dweights, y)


def _reference(
    name: str, x: Tensor, params: Sequence[Tensor], bias: Tensor | None, weights: Tensor | None, gated: bool
) -> Tensor:
    """The formula of :func:`apply` by torch, in at least fp32, rounded once."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    up = None
    if gated:
        x, up = x.chunk(2, -1)
    y = get(name).reference(x, *params)
    if up is not None:
        y = y * up
    if weights is not None:
        y = (y * weights.to(wide).reshape(*x.shape[:-1], 1)).reshape(y.shape)  # a 0-d y stays one
    return y.to(dtype).contiguous()


def _backend(backend: str, x: Tensor) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}; leave it out for auto")
    if backend == "auto":
        return "triton" if x.is_cuda and x.dtype in KERNEL_DTYPES else "reference"
    if backend == "triton":
        check_triton(x)
    return backend
