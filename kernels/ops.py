"""The opaque torch operators behind ``backend="triton"``: views, grids, launches, fake tensors and autograd."""

from typing import Any

import torch
import triton
from torch import Tensor

from megatron_act.kernels import registry
from megatron_act.kernels.template import bwd_kernel, fwd_kernel, sum_kernel

INTERPRETED = not isinstance(fwd_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at the first import
BLOCK = 1024  # columns of a program: 8 elements (16 bytes of bf16) for each of 128 threads
WARPS = 4
FORWARD_ROWS = 8  # rows of a program: softplus of the parameters once for 64 elements of a thread
BACKWARD_ROWS = 16  # 16 terms a lane keep fp32 sums within 1e-6 of the sum of absolute terms
PROGRAMS = 2048  # at least: 15 for each SM of an H100; a smaller tensor gets shorter programs
SUM_BLOCK, SUM_WARPS = 4096, 16  # the second stage: one program reads the partials of 67 million elements at once

LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": True}  # Triton's default for fusion changes from 3.10 on


class _View:
    """How the template sees x and, in the backward pass, the gradient: rows, columns, row strides, programs.

    Attributes:
        tensors: the same with contiguous rows; copied only where no such view exists.
        strides: between their rows, in elements.
        groups, width: programs down and across.
    """

    def __init__(self, tensors: tuple[Tensor, ...], gated: bool, whole_rows: bool, rows_each: int):
        x = tensors[0]
        rows = [_rows_of(t) for t in tensors]
        flat = not (gated or whole_rows) and all(t.is_contiguous() for t in rows)
        self.n = x.numel() // (2 if gated else 1)
        self.cols = BLOCK if flat else rows[0].shape[1] // (2 if gated else 1)
        self.tensors = rows
        self.strides = [BLOCK if flat else t.stride(0) for t in rows]
        height, self.width = triton.cdiv(self.n, self.cols), triton.cdiv(self.cols, BLOCK)
        while rows_each > 1 and triton.cdiv(height, rows_each) * self.width < PROGRAMS:
            rows_each //= 2
        self.rows_each, self.groups = rows_each, triton.cdiv(height, rows_each)

    @property
    def grid(self) -> tuple[int]:
        """One dimension, columns fastest: neighbours read neighbouring memory."""
        return (self.groups * self.width,)


def _rows_of(tensor: Tensor) -> Tensor:
    """[rows, last dimension] with contiguous rows."""
    width = tensor.shape[-1] if tensor.ndim else 1
    if tensor.ndim and tensor.stride(-1) == 1:
        try:
            return tensor.view(-1, width)
        except RuntimeError:  # leading dimensions that no single stride describes
            pass
    return tensor.contiguous().view(-1, width)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _softplus(name: str) -> tuple[bool, ...]:
    return tuple(p.constrain == "softplus" for p in registry.get(name).params)


def _constants(name: str, gated: bool) -> dict[str, Any]:
    return {"FWD": registry.get(name).fwd, "SOFTPLUS": _softplus(name), "GATED": gated, "BLOCK": BLOCK, **LAUNCH}


def _value_like(x: Tensor, gated: bool) -> Tensor:
    shape = (*x.shape[:-1], x.shape[-1] // 2) if gated else x.shape
    return torch.empty(shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("megatron_act::activation", mutates_args=())
def activation_op(
    x: Tensor, params: list[Tensor], bias: Tensor | None, weights: Tensor | None, name: str, gated: bool
) -> Tensor:
    """y of the template, contiguous, in x's dtype."""
    y = _value_like(x, gated)
    if y.numel() == 0:
        return y
    bias, weights = _dense(bias), _dense(weights)
    view = _View((x,), gated, bias is not None or weights is not None, FORWARD_ROWS)
    with torch.cuda.device_of(x):
        fwd_kernel[view.grid](
            *view.tensors, bias, weights, y, P=tuple(params), cols=view.cols, n=view.n, stride=view.strides[0],
            width=view.width, ROWS=view.rows_each, **_constants(name, gated),
        )  # fmt: skip
    return y


@activation_op.register_fake
def _(x: Tensor, params: list[Tensor], bias: Tensor | None, weights: Tensor | None, name: str, gated: bool) -> Tensor:
    return _value_like(x, gated)


@torch.library.custom_op("megatron_act::activation_backward", mutates_args=())
def activation_backward_op(
    grad: Tensor, x: Tensor, params: list[Tensor], bias: Tensor | None, weights: Tensor | None,
    name: str, gated: bool, value: bool,
) -> list[Tensor]:  # fmt: skip
    """[dx, each parameter's gradient, dbias?, dweights?, y?]: each in its tensor's dtype, y with ``value``."""
    outputs = _gradient_outputs(x, params, bias, weights, gated, value)
    if grad.numel() == 0:
        return [t.zero_() for t in outputs]
    bias, weights = _dense(bias), _dense(weights)
    view = _View((x, grad), gated, bias is not None or weights is not None, BACKWARD_ROWS)
    vx, vg = view.tensors
    fp32 = x.new_empty((), dtype=torch.float32)
    partial = fp32.new_empty((len(params), view.grid[0]))
    dbias = None if bias is None else fp32.new_empty((view.groups, bias.numel()))
    dweights = None if weights is None else fp32.new_empty((weights.numel(), view.width))
    with torch.cuda.device_of(x):
        bwd_kernel[view.grid](
            vx, bias, weights, vg, outputs[0], outputs[-1] if value else None, P=tuple(params),
            PARTIAL=partial, DBIAS=dbias, DW=dweights, cols=view.cols, n=view.n, stride_x=view.strides[0],
            stride_g=view.strides[1], width=view.width, BWD=registry.get(name).bwd, ROWS=view.rows_each,
            **_constants(name, gated),
        )  # fmt: skip
        if params:
            sum_kernel[(1,)](
                partial, tuple(params), tuple(outputs[1 : 1 + len(params)]), partial.shape[1],
                SOFTPLUS=_softplus(name), BLOCK=SUM_BLOCK, num_warps=SUM_WARPS,
            )  # fmt: skip
    totals = [t.sum(axis, dtype=torch.float64) for axis, t in ((0, dbias), (1, dweights)) if t is not None]
    for out, total in zip(outputs[1 + len(params) :], totals, strict=False):  # y, where wanted, is already written
        out.copy_(total.reshape(out.shape))
    return outputs


def _gradient_outputs(
    x: Tensor, params: list[Tensor], bias: Tensor | None, weights: Tensor | None, gated: bool, value: bool
) -> list[Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    like = [t for t in (*params, bias, weights) if t is not None]
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
    return [dx, *grads, *([_value_like(x, gated)] if value else [])]


@activation_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, params: list[Tensor], bias: Tensor | None, weights: Tensor | None,
    name: str, gated: bool, value: bool,
) -> list[Tensor]:  # fmt: skip
    return _gradient_outputs(x, params, bias, weights, gated, value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, params, bias, weights, ctx.name, ctx.gated = inputs
    ctx.count, ctx.has_bias, ctx.has_weights = len(params), bias is not None, weights is not None
    ctx.save_for_backward(x, *params, *(t for t in (bias, weights) if t is not None))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    params, bias, weights = _split(ctx, rest)
    dx, *others = activation_backward_op(grad, x, params, bias, weights, ctx.name, ctx.gated, False)
    return dx, *_split(ctx, others), None, None


def _split(ctx: Any, tensors: list[Tensor]) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """(per parameter, for the bias, for the weights)"""
    rest = iter(tensors[ctx.count :])
    return tensors[: ctx.count], next(rest) if ctx.has_bias else None, next(rest) if ctx.has_weights else None


activation_op.register_autograd(_backward, setup_context=_setup_context)
