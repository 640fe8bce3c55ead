"""Transformer Engine's quantized tensors, filled by this project's kernels.

    forward    q = quantizer's tensor of f(x + bias)
    backward   q = quantizer's tensor of dx, and the gradients of the scalars and the bias

A quantizer says everything: its class the recipe, its usages which halves are wanted, its scale and amax (delayed
scaling) where they lie. Buffers come from ``quantizer.make_empty``, whose contents are undefined, inverse scales and
padding included; the kernels write all of them. Layouts: ``kernels/fp8.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_act.kernels import fp8_ops
from megatron_act.kernels.fp8 import Kept, Quantized

RECIPES = {
    "Float8Quantizer": "tensor",
    "Float8CurrentScalingQuantizer": "tensor",
    "Float8BlockQuantizer": "blockwise",
    "MXFP8Quantizer": "mxfp8",
}
FORMATS = {"kFloat8E4M3": "e4m3", "kFloat8E5M2": "e5m2"}
ROWS, COLUMNS, MX = 8, 16, 32  # what FP8 GEMMs divide tokens and widths by (utils.py), and what mxfp8 does


@dataclass(frozen=True)
class Operand:
    """The activation and its inputs, as ``kernels.apply`` takes them."""

    name: str
    x: Tensor
    raw: Sequence[Tensor]
    bias: Tensor | None
    backend: str


def forward(quantizer: Any, op: Operand, kept: Kept | None = None) -> Any:
    """f(x + bias) as a tensor of ``quantizer``, of x's shape and nominal dtype.

    Rounded to bf16 before scaling, so that the bits are those of quantizing a bf16 activation.

    Args:
        quantizer: Float8Quantizer, Float8CurrentScalingQuantizer, Float8BlockQuantizer or MXFP8Quantizer.
        op: what to compute.
        kept: a place for x + bias in FP8, filled in the same pass.
    """
    result, buffers = _empty(quantizer, op.x)
    scale = _current_scale(quantizer, op) if _is_current(quantizer) else getattr(quantizer, "scale", None)
    fp8_ops.forward(op.name, op.x, op.raw, buffers, bias=op.bias, scale=scale, kept=kept, backend=op.backend)
    return result


def backward(
    quantizer: Any, grad: Tensor | Quantized, op: Operand, kept: Kept | None
) -> tuple[Any, Any, Tensor | None]:
    """(dx as a tensor of ``quantizer``, the raw parameters' gradients, dbias) for the incoming ``grad``.

    Args:
        quantizer: as for :func:`forward`, but not of current scaling, whose second pass would save nothing.
        grad: of f(x + bias), of x's shape.
        op: what was computed; its x is read for shape and dtype only where ``kept`` is given.
        kept: x + bias, if it was kept in FP8.
    """
    result, buffers = _empty(quantizer, op.x)
    scale = getattr(quantizer, "scale", None)
    source = op.x if kept is None else kept
    _, dparams, dbias = fp8_ops.backward(
        op.name, grad, source, op.raw, buffers, bias=op.bias, scale=scale, backend=op.backend
    )
    return result, dparams, dbias


def misfit(quantizer: Any, x: Tensor, gradient: bool = False) -> str | None:
    """Why the kernels cannot fill ``quantizer``'s tensor like x, or None; without numbers, so that it is logged once.

    Args:
        quantizer: Transformer Engine's.
        x: the activation's input.
        gradient: whether it is x's gradient.
    """
    kind = type(quantizer).__name__
    if kind not in RECIPES or quantizer.dtype.name not in FORMATS:
        return f"no kernel writes what a {kind} makes"
    rows, cols = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    by_rows, by_cols = (MX, MX) if RECIPES[kind] == "mxfp8" else (ROWS, COLUMNS)
    two_way = getattr(quantizer, "block_scaling_dim", 1) != 1 or getattr(quantizer, "with_2d_quantization", False)
    odd_scales = RECIPES[kind] == "blockwise" and not (quantizer.force_pow_2_scales and quantizer.amax_epsilon == 0)
    problems = (
        (gradient and _is_current(quantizer), "a current scale takes a second pass over the gradient"),
        (getattr(quantizer, "with_amax_reduction", False), "the recipe takes one amax of several ranks"),
        (two_way, "the recipe has blocks of two dimensions"),
        (odd_scales, "the recipe has block scales other than plain powers of two"),
        (x.dtype != torch.bfloat16, f"expected bf16 activations, got {x.dtype}"),
        (
            rows == 0 or rows % by_rows or cols % by_cols,
            f"expected tokens divisible by {by_rows} and a width divisible by {by_cols}, got others",
        ),
    )
    return next((why for present, why in problems if present), None)


def _is_current(quantizer: Any) -> bool:
    return type(quantizer).__name__ == "Float8CurrentScalingQuantizer"


def _current_scale(quantizer: Any, op: Operand) -> Tensor:
    return fp8_ops.current_scale(
        op.name, op.x, op.raw, bias=op.bias, format=FORMATS[quantizer.dtype.name],
        power_of_2=quantizer.force_pow_2_scales, epsilon=quantizer.amax_epsilon, backend=op.backend,
    )  # fmt: skip


def _empty(quantizer: Any, x: Tensor) -> tuple[Any, Quantized]:
    """(a tensor of ``quantizer`` like x, its buffers as the kernels name them)."""
    recipe = RECIPES[type(quantizer).__name__]
    result = quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device)
    rows, cols = x.numel() // x.shape[-1], x.shape[-1]
    format = FORMATS[quantizer.dtype.name]
    if recipe == "tensor":
        transposed = result._transpose
        if transposed is not None:
            result._transpose_invalid = False
            transposed = transposed.view(cols, rows)
        amax = None if _is_current(quantizer) else quantizer.amax
        data = result._data.view(rows, cols)
        return result, Quantized(data, result._scale_inv, transposed, None, amax, recipe="tensor", format=format)
    scales, scales_t = result._rowwise_scale_inv, result._columnwise_scale_inv
    columnwise = result._columnwise_data
    if columnwise is not None:
        columnwise = columnwise.view((cols, rows) if recipe == "blockwise" else (rows, cols))
    swizzled = recipe == "mxfp8" and result._with_gemm_swizzled_scales
    data = result._rowwise_data.view(rows, cols)
    return result, Quantized(data, scales, columnwise, scales_t, None, recipe=recipe, format=format, swizzled=swizzled)
