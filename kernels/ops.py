"""The opaque torch operators behind ``backend="triton"``: views, grids, launches, fake tensors and autograd."""

from typing import Any

import torch
import triton
from torch import Tensor

from megatron_act.kernels import registry
from megatron_act.kernels.template import bwd_kernel, fwd_kernel

INTERPRETED = not isinstance(fwd_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at the first import
BLOCK = 1024  # columns of a program: 8 elements (16 bytes of bf16) for each of 128 threads
BACKWARD_ROWS = 16  # rows that a backward program sums: 16 terms a lane keep fp32 sums within 1e-6 (tests)
WARPS = 4


def _rows(x: Tensor) -> Tensor:
    """x as [rows, cols] with contiguous rows; copies only where no such view exists."""
    cols = x.shape[-1] if x.ndim else 1
    if x.ndim and x.stride(-1) == 1:
        try:
            return x.view(-1, cols)
        except RuntimeError:  # leading dimensions that no single stride describes
            pass
    return x.contiguous().view(-1, cols)


def _flat(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() for t in tensors)


def _layout(x: Tensor, flat: bool) -> tuple[int, int]:
    """(rows, cols) of the template's view of x."""
    if flat:
        return triton.cdiv(x.numel(), BLOCK), BLOCK
    cols = x.shape[-1] if x.ndim else 1
    return x.numel() // cols, cols


def _constraints(params: list[Tensor], name: str) -> dict[str, Any]:
    spec = registry.get(name).params
    return {
        "P": tuple(params),
        "SOFTPLUS": tuple(p.constrain == "softplus" for p in spec),
        "OFFSET": tuple(p.offset for p in spec),
    }


@torch.library.custom_op("megatron_act::activation", mutates_args=())
def activation_op(x: Tensor, params: list[Tensor], bias: Tensor | None, name: str) -> Tensor:
    """y = f(x + bias), contiguous, in x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    flat = bias is None and _flat(x)
    rows, cols = _layout(x, flat)
    view = x if flat else _rows(x)
    with torch.cuda.device_of(x):
        fwd_kernel[(rows, triton.cdiv(cols, BLOCK))](
            view, bias, y, cols=cols, n=x.numel(), stride=cols if flat else view.stride(0),
            FN=registry.get(name).fwd, HAS_BIAS=bias is not None, BLOCK=BLOCK, ROWS=1, num_warps=WARPS,
            **_constraints(params, name),
        )  # fmt: skip
    return y


@activation_op.register_fake
def _(x: Tensor, params: list[Tensor], bias: Tensor | None, name: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("megatron_act::activation_backward", mutates_args=())
def activation_backward_op(
    grad: Tensor, x: Tensor, params: list[Tensor], bias: Tensor | None, name: str
) -> list[Tensor]:
    """[dx, each parameter's gradient, dbias if there is a bias]; parameters' and bias' in their own dtype."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return [dx, *(torch.zeros_like(p) for p in params), *([] if bias is None else [torch.zeros_like(bias)])]
    flat = bias is None and _flat(x, grad)
    rows, cols = _layout(x, flat)
    vx, vg = (x, grad) if flat else (_rows(x), _rows(grad))
    grid = (triton.cdiv(rows, BACKWARD_ROWS), triton.cdiv(cols, BLOCK))
    partial = x.new_empty((len(params), grid[0] * grid[1]), dtype=torch.float32)
    dbias = None if bias is None else x.new_empty((grid[0], cols), dtype=torch.float32)
    with torch.cuda.device_of(x):
        bwd_kernel[grid](
            vx, bias, vg, dx, PARTIAL=partial, DBIAS=dbias, cols=cols, n=x.numel(),
            stride_x=cols if flat else vx.stride(0), stride_g=cols if flat else vg.stride(0),
            FN=registry.get(name).bwd, HAS_BIAS=bias is not None, BLOCK=BLOCK, ROWS=BACKWARD_ROWS, num_warps=WARPS,
            **_constraints(params, name),
        )  # fmt: skip
    sums = partial.sum(1, dtype=torch.float64)
    dparams = [_raw_gradient(spec, s, p) for spec, s, p in zip(registry.get(name).params, sums, params, strict=True)]
    if bias is None or dbias is None:
        return [dx, *dparams]
    return [dx, *dparams, dbias.sum(0, dtype=torch.float64).to(bias.dtype)]


def _raw_gradient(spec: Any, total: Tensor, raw: Tensor) -> Tensor:
    """dL/draw of shape (1,) from dL/d(effective): the constraint's derivative, once, after the sum."""
    scale = torch.sigmoid(raw.double()) if spec.constrain == "softplus" else 1.0
    return (total * scale).reshape(1).to(raw.dtype)


@activation_backward_op.register_fake
def _(grad: Tensor, x: Tensor, params: list[Tensor], bias: Tensor | None, name: str) -> list[Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return [dx, *(torch.empty_like(p) for p in params), *([] if bias is None else [torch.empty_like(bias)])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, params, bias, ctx.name = inputs
    ctx.count, ctx.has_bias = len(params), bias is not None
    ctx.save_for_backward(x, *params, *([bias] if ctx.has_bias else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    params, bias = rest[: ctx.count], rest[-1] if ctx.has_bias else None
    dx, *others = activation_backward_op(grad, x, params, bias, ctx.name)
    return dx, others[: ctx.count], others[-1] if ctx.has_bias else None, None


activation_op.register_autograd(_backward, setup_context=_setup_context)
