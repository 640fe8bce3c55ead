"""Launches of the kernels of ``quantized.py``: pointers of buffers, tiles and grids by recipe, what the GPU casts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megatron_act.kernels import operands, registry, stores
from megatron_act.kernels.fp8 import Kept, Quantized
from megatron_act.kernels.ops import INTERPRETED, SUM_BLOCK, SUM_WARPS
from megatron_act.kernels.quantized import backward_kernel, forward_kernel
from megatron_act.kernels.template import sum_kernel

ROWS, BN = 128, 128  # of a program: whole blocks of 128 x 128, and whole 128 x 4 tiles of scales
CAPABILITY = (8, 9)  # the first with FP8 casts (Ada)


class Recipe(NamedTuple):
    """How a recipe is written and read.

    Attributes:
        rows, held: of a tile, and tiles held until they are stored: together a block of column-wise scales.
        warps: so many that a thread has 16 elements of a tile, what it stores of FP8 at once, in one row. With fewer
            rows of mxfp8 in a program, fewer threads compute the same column's scale.
    """

    store: Any
    load: Any
    rows: int
    held: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """Of the kernels."""
        return {"BM": self.rows, "BN": BN, "HELD": self.held, "LOOPS": ROWS // self.rows // self.held}


RECIPES = {
    "plain": Recipe(stores.store_plain, operands.load_plain, 32, 1, 8),
    "tensor": Recipe(stores.store_tensor, operands.load_tensor, 32, 1, 8),
    "blockwise": Recipe(stores.store_blockwise, operands.load_blockwise, 32, 4, 8),
    "mxfp8": Recipe(stores.store_mxfp8, operands.load_mxfp8, 16, 2, 4),
}


def casts_of(device: torch.device) -> str:
    """Which casts the kernels leave to the device (``fp8_device.py``)."""
    if INTERPRETED:
        return "none"
    return "fp8" if torch.cuda.get_device_capability(device) >= CAPABILITY else "bf16"


def launch_forward(
    name: str, x: Tensor, params: Sequence[Tensor], bias: Tensor | None, out: Quantized | None, amax: Tensor | None,
    scale: Tensor | None, kept: Kept | None, round_bf16: bool,
) -> None:  # fmt: skip
    """Fills ``out``, ``amax`` and ``kept``, each where it is not None, from x [M, K]."""
    grid, width, options = _shape(name, x, "tensor" if out is None else out.recipe)
    with torch.cuda.device_of(x):
        forward_kernel[grid](
            (x, x.stride(0)), bias, tuple(params), None if out is None else _pointers(out, scale), amax,
            None if kept is None else (kept.data, kept.scales, kept.scales.shape[-1]), *x.shape, width,
            FWD=registry.get(name).fwd, LOAD=operands.load_plain, ROUND=_rounds(out, round_bf16),
            **_store(out), **options,
        )  # fmt: skip


def launch_backward(
    name: str, grad: Tensor | Quantized, x: Tensor | Kept, params: Sequence[Tensor], bias: Tensor | None,
    out: Quantized, scale: Tensor | None, round_bf16: bool,
) -> tuple[tuple[Tensor, ...], Tensor | None]:  # fmt: skip
    """Fills ``out``; (each raw parameter's gradient, dbias). x and a float grad: [M, K]."""
    like = x if isinstance(x, Tensor) else x.data
    grid, width, options = _shape(name, like, out.recipe)
    cols, device = like.shape[1], like.device
    g = Quantized(grad) if isinstance(grad, Tensor) else grad
    partial = torch.empty(len(params), grid[0], device=device)
    sums = None if bias is None else torch.empty(grid[0] // width, cols, device=device)
    grads = tuple(torch.empty_like(p) for p in params)
    with torch.cuda.device_of(like):
        backward_kernel[grid](
            (x, x.stride(0)) if isinstance(x, Tensor) else (x.data, cols, x.scales, x.scales.shape[-1]),
            bias if isinstance(x, Tensor) else None, _operand(g, cols), tuple(params), _pointers(out, scale), out.amax,
            partial, sums, *like.shape, width, BWD=registry.get(name).bwd, LOAD_G=RECIPES[g.recipe].load,
            LOAD=operands.load_plain if isinstance(x, Tensor) else operands.load_mxfp8,
            FORMAT_G=g.format, SWIZZLED_G=g.swizzled, ROUND=_rounds(out, round_bf16), **_store(out), **options,
        )  # fmt: skip
        if grads:
            sum_kernel[(1,)](
                partial, tuple(params), grads, partial.shape[1], SOFTPLUS=options["SOFTPLUS"], BLOCK=SUM_BLOCK,
                num_warps=SUM_WARPS,
            )  # fmt: skip
    if bias is None or sums is None:
        return grads, None
    return grads, sums.sum(0, dtype=torch.float64).to(bias.dtype)


def _shape(name: str, like: Tensor, recipe: str) -> tuple[tuple[int], int, dict[str, Any]]:
    """(grid, programs across, the constants that follow from recipe, shape and device)"""
    rows, cols = like.shape
    kind, width = RECIPES[recipe], triton.cdiv(cols, BN)
    options = {
        "SOFTPLUS": tuple(p.constrain == "softplus" for p in registry.get(name).params), "CASTS": casts_of(like.device),
        "WHOLE": rows % ROWS == 0 and cols % BN == 0, "num_warps": kind.warps, "enable_fp_fusion": True,
        **kind.constants,
    }  # fmt: skip
    return (triton.cdiv(rows, ROWS) * width,), width, options


def _rounds(out: Quantized | None, round_bf16: bool) -> bool:
    return round_bf16 and (out is None or out.recipe != "plain")


def _store(out: Quantized | None) -> dict[str, Any]:
    if out is None:
        return {"STORE": None, "FORMAT": "e4m3", "SWIZZLED": False}
    return {"STORE": RECIPES[out.recipe].store, "FORMAT": out.format, "SWIZZLED": out.swizzled}


def _pointers(q: Quantized, scale: Tensor | None) -> tuple[Any, ...]:
    """OUT of the recipe's store."""
    if q.recipe == "plain":
        return (q.data,)
    if q.recipe == "tensor":
        return q.data, q.scale_inv, q.columnwise, scale
    along = 0 if q.swizzled else -1  # swizzled column-wise scales are those of the transposed matrix
    second = 0 if q.columnwise_scale_inv is None else q.columnwise_scale_inv.shape[along]
    return q.data, q.scale_inv, q.columnwise, q.columnwise_scale_inv, q.scale_inv.shape[-1], second  # type: ignore[union-attr]


def _operand(q: Quantized, cols: int) -> tuple[Any, ...]:
    """IN of the recipe's load."""
    if q.recipe == "plain":
        return q.data, q.data.stride(-2)
    if q.recipe == "tensor":
        return q.data, cols, q.scale_inv
    return q.data, cols, q.scale_inv, q.scale_inv.shape[-1]  # type: ignore[union-attr]
