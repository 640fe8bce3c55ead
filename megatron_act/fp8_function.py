"""The activation as an autograd function whose result, gradient or saved input is in FP8.

    forward    y = f(x + bias), in x's dtype or a quantized tensor that fc2 reads
    keeps      x and the bias, or x + bias in FP8
    backward   dx, in x's dtype or a quantized tensor that fc1's backward pass reads

``kernels.apply`` serves everything else. Nothing here decides what is wanted: the Plan says it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_act import te_buffers
from megatron_act.kernels import api as kernels
from megatron_act.kernels import fp8_ops
from megatron_act.kernels.fp8 import Kept, Quantized
from megatron_act.te_buffers import Operand


@dataclass(frozen=True)
class Plan:
    """What one call of the activation writes.

    Attributes:
        name, backend: as for ``kernels.apply``.
        output: the quantizer of y, or None: y is in x's dtype.
        grad: the quantizer of dx, or None: it is in x's dtype.
        store: keep x + bias in FP8 (1.03 bytes per element).
    """

    name: str
    backend: str
    output: Any = None
    grad: Any = None
    store: bool = False


@dataclass(frozen=True)
class Saved:
    """What the backward pass needs beside tensors; ``like`` stands in for x: its shape, dtype and device."""

    plan: Plan
    like: Tensor
    biased: bool


def apply(plan: Plan, x: Tensor, bias: Tensor | None, raw: Sequence[Tensor]) -> Any:
    """y, differentiable in x, bias and raw.

    Args:
        plan: what is written.
        x: fc1's output, (..., width).
        bias: (width,) or None.
        raw: raw parameters, each (1,).

    Returns:
        A tensor of x's shape and dtype; with ``plan.output`` a quantized one.
    """
    return _Function.apply(plan, x, bias, *raw)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, bias: Tensor | None, *raw: Tensor) -> Any:
        y, tensors, ctx.saved = compute(plan, x, bias, raw)
        ctx.save_for_backward(*tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx, dparams, dbias = differentiate(ctx.saved, grad, ctx.saved_tensors)
        return None, dx, dbias, *dparams


def compute(plan: Plan, x: Tensor, bias: Tensor | None, raw: Sequence[Tensor]) -> tuple[Any, list[Tensor], Saved]:
    """(y, tensors to save, what else :func:`differentiate` needs); nothing is recorded by autograd."""
    op = Operand(plan.name, x, raw, bias, plan.backend)
    kept = fp8_ops.empty_kept(*_matrix(x), x.device) if plan.store else None
    if plan.output is not None:
        y = te_buffers.forward(plan.output, op, kept)
    elif kept is not None:
        y = fp8_ops.forward(plan.name, x, raw, _plain(x), bias=bias, kept=kept, backend=plan.backend).data.view(x.shape)
    else:
        y = kernels.apply(plan.name, x, raw, bias=bias, backend=plan.backend)
    tensors = [x] if kept is None else [kept.data, kept.scales]
    tensors += [*raw, *([] if bias is None else [bias])]
    return y, tensors, Saved(plan, torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape), bias is not None)


def differentiate(
    saved: Saved, grad: Tensor | Quantized, tensors: Sequence[Tensor]
) -> tuple[Any, Sequence[Tensor], Tensor | None]:
    """(dx, the raw parameters' gradients, dbias) for the incoming ``grad``.

    Args:
        saved, tensors: of :func:`compute`.
        grad: of y, of x's shape.
    """
    plan, like = saved.plan, saved.like
    bias, tensors = (tensors[-1], tensors[:-1]) if saved.biased else (None, tensors)
    kept = Kept(tensors[0], tensors[1]) if plan.store else None
    x, raw = (like, tensors[2:]) if plan.store else (tensors[0], tensors[1:])
    if plan.grad is not None:
        return te_buffers.backward(plan.grad, grad, Operand(plan.name, x, raw, bias, plan.backend), kept)
    if kept is None and isinstance(grad, Tensor):
        found = kernels.backward(plan.name, grad, x, raw, bias=bias, backend=plan.backend, value=False)
        return found.dx, found.dparams, found.dbias
    out, dparams, dbias = fp8_ops.backward(
        plan.name, grad, kept or x, raw, _plain(like), bias=bias, backend=plan.backend
    )
    return out.data.view(like.shape), dparams, dbias


def _matrix(x: Tensor) -> tuple[int, int]:
    return x.numel() // max(1, x.shape[-1]), x.shape[-1]


def _plain(x: Tensor) -> Quantized:
    return fp8_ops.empty("plain", *_matrix(x), x.device, dtype=x.dtype)
