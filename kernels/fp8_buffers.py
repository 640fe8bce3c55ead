"""Buffers of the results of ``fp8_ops``: made, and checked before a kernel writes through their pointers."""

from typing import Any

import torch
from torch import Tensor

from megatron_act.kernels import fp8
from megatron_act.kernels.fp8 import Kept, Quantized, up


def empty(
    recipe: str, rows: int, cols: int, device: torch.device | str, *, format: str = "e4m3", columnwise: bool = True,
    swizzled: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> Quantized:  # fmt: skip
    """Buffers of a recipe in Transformer Engine's layout, to be filled; ``amax`` starts at 0.

    Args:
        recipe: ``plain``, ``tensor``, ``blockwise`` or ``mxfp8``.
        format: ``e4m3``, or ``e5m2`` (the gradients of a hybrid recipe).
        columnwise: the half that a GEMM reads along the other dimension too; ``plain`` has none.
        swizzled: scales in the GEMM's order, ``mxfp8`` only.
        dtype: of ``plain``.

    Raises:
        ValueError: a recipe, format or shape that is not served.
    """
    check_recipe(recipe, format, rows, cols, swizzled)
    if recipe == "plain":
        return Quantized(torch.empty(rows, cols, dtype=dtype, device=device))
    bits: dict[str, Any] = {"dtype": torch.uint8, "device": device}
    data = torch.empty(rows, cols, **bits)
    if recipe == "mxfp8":
        shapes = ((up(rows, 128), up(cols // 32, 4)), (up(rows // 32, 4), up(cols, 128)))
        scales = [torch.empty(shape, **bits) for shape in shapes]
        second = torch.empty_like(data)
    else:
        sizes = ((cols, rows), (rows, cols))
        scales = [torch.empty(up(a, fp8.BLOCK) // fp8.BLOCK, up(b, 4), device=device) for a, b in sizes]
        second = torch.empty(cols, rows, **bits)
    if recipe == "tensor":
        inverse, amax = torch.ones(1, device=device), torch.zeros(1, device=device)
        return Quantized(data, inverse, second if columnwise else None, None, amax, recipe, format)
    return Quantized(
        data, scales[0], second if columnwise else None, scales[1] if columnwise else None, None,
        recipe, format, swizzled,
    )  # fmt: skip


def empty_kept(rows: int, cols: int, device: torch.device | str) -> Kept:
    """Buffers for the pre-activation, 1.03125 bytes per element."""
    bits: dict[str, Any] = {"dtype": torch.uint8, "device": device}
    return Kept(torch.empty(rows, cols, **bits), torch.empty(rows, up(cols, fp8.MX_BLOCK) // fp8.MX_BLOCK, **bits))


def check_recipe(recipe: str, format: str, rows: int, cols: int, swizzled: bool) -> None:
    """Raises ValueError for a recipe or format that is not served, or a shape that it cannot take.

    Planned, in TE's layout: ``nvfp4``, two e2m1 a byte, row-wise and transposed; an e4m3 scale for each 16, padded to
    [128, 4] as MXFP8's; an fp32 amax for the tensor.
    """
    if recipe == "nvfp4":
        raise ValueError("recipe: expected tensor, blockwise or mxfp8, got nvfp4, which is not built: use mxfp8")
    if recipe not in fp8.RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(fp8.RECIPES)}, got {recipe!r}; name one of them")
    if format not in fp8.FORMATS:
        raise ValueError(f"format: expected one of {', '.join(fp8.FORMATS)}, got {format!r}; name one of them")
    if recipe == "mxfp8" and (rows % fp8.MX_BLOCK or cols % fp8.MX_BLOCK):
        raise ValueError(f"mxfp8: expected rows and columns divisible by 32, got [{rows}, {cols}]; pad or use bf16")
    if swizzled and recipe != "mxfp8":
        raise ValueError(f"swizzled: expected recipe mxfp8, got {recipe}, whose scales have one order; leave it out")


def check_quantized(label: str, q: Quantized, like: Tensor) -> None:
    """Raises ValueError where a part of ``q`` is not its recipe's for the matrix ``like``: size, dtype, device."""
    rows, cols = like.shape
    check_recipe(q.recipe, q.format, rows, cols, q.swizzled)
    if q.recipe == "plain" and (not q.data.is_floating_point() or q.data.itemsize < 2):
        raise ValueError(
            f"{label}.data: expected a float dtype for recipe 'plain', got {q.data.dtype}; name its recipe"
        )
    wanted = empty(q.recipe, rows, cols, "meta", format=q.format, swizzled=q.swizzled, dtype=q.data.dtype)
    for part in ("data", "scale_inv", "columnwise", "columnwise_scale_inv", "amax"):
        _check_part(f"{label}.{part}", getattr(q, part), getattr(wanted, part), like.device)
    if q.scale_inv is None and q.recipe != "plain":
        raise ValueError(f"{label}.scale_inv: expected a tensor for recipe {q.recipe!r}, got None; give one")


def check_kept(kept: Kept, like: Tensor) -> None:
    """Raises ValueError where ``kept`` does not fit the matrix ``like``."""
    rows, cols = like.shape
    wanted = empty_kept(rows, cols, "meta")
    _check_part("kept.data", kept.data, wanted.data, like.device)
    _check_part("kept.scales", kept.scales, wanted.scales, like.device)


def _check_part(label: str, part: Tensor | None, wanted: Tensor | None, device: torch.device) -> None:
    if part is None:
        return
    if wanted is None:
        raise ValueError(f"{label}: expected None, got a tensor of shape {tuple(part.shape)}; leave it out")
    if (part.numel(), part.dtype) != (wanted.numel(), wanted.dtype):
        got = f"{part.dtype} of {part.numel()}"
        expected = f"{wanted.dtype} of {wanted.numel()} elements, as {list(wanted.shape)}"
        raise ValueError(f"{label}: expected {expected}, got {got}; make it with fp8_ops.empty or empty_kept")
    if part.device != device:
        raise ValueError(f"{label}: expected device {device} (that of x), got {part.device}; make it there")
    if not part.is_contiguous():
        raise ValueError(f"{label}: expected a contiguous tensor, got strides {part.stride()}; make it contiguous")
