"""How a tile of an operand is read: a float tensor, or FP8 with its scales, by recipe.

A load takes IN = (DATA, row stride[, scales[, pitch]]) and the tile's first row and column; it gives fp32 [BM, BN], 0
where the tensor ends. The scales are the row-wise ones of ``fp8.Quantized``, or those of ``fp8.Kept``.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from megatron_act.kernels.fp8_device import decode, e8m0_value


@triton.jit
def lanes(row, col, BM: tl.constexpr, BN: tl.constexpr):
    """(rows [BM, 1], columns [1, BN]) of the tile that starts at row, col."""
    return row + tl.arange(0, BM)[:, None], col + tl.arange(0, BN)[None, :]


@triton.jit
def raw(IN, row, col, rows, cols, BM: tl.constexpr, BN: tl.constexpr):
    """Stored values of a tile."""
    r, c = lanes(row, col, BM, BN)
    return tl.load(IN[0] + r.to(tl.int64) * IN[1] + c, mask=(r < rows) & (c < cols), other=0)


@triton.jit
def load_plain(
    IN, row, col, rows, cols, BM: tl.constexpr, BN: tl.constexpr,
    FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """IN = (DATA, stride)."""
    return raw(IN, row, col, rows, cols, BM, BN).to(tl.float32)


@triton.jit
def load_tensor(
    IN, row, col, rows, cols, BM: tl.constexpr, BN: tl.constexpr,
    FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """IN = (DATA, stride, SCALE_INV)."""
    return decode(raw(IN, row, col, rows, cols, BM, BN), FORMAT, CASTS) * tl.load(IN[2])


@triton.jit
def load_blockwise(
    IN, row, col, rows, cols, BM: tl.constexpr, BN: tl.constexpr,
    FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """IN = (DATA, stride, SCALE_INV, pitch); a tile lies in one block of 128 columns: one scale a row."""
    r = row + tl.arange(0, BM)
    scale = tl.load(IN[2] + (col // 128).to(tl.int64) * IN[3] + r, mask=r < rows, other=0.0)
    return decode(raw(IN, row, col, rows, cols, BM, BN), FORMAT, CASTS) * scale[:, None]


@triton.jit
def load_mxfp8(
    IN, row, col, rows, cols, BM: tl.constexpr, BN: tl.constexpr,
    FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, CASTS: tl.constexpr,
):  # fmt: skip
    """IN = (DATA, stride, SCALES, pitch)."""
    r, block = lanes(row, col // 32, BM, BN // 32)
    inside = (r < rows) & (block * 32 < cols)
    code = tl.load(IN[2] + scale_place(r, block, IN[3], SWIZZLED), mask=inside, other=0).to(tl.int32)
    return decode(raw(IN, row, col, rows, cols, BM, BN), FORMAT, CASTS) * spread(e8m0_value(code), BM, BN)


@triton.jit
def scale_place(r, c, pitch, SWIZZLED: tl.constexpr):
    """Where scale (r, c) of a matrix of ``pitch`` columns lies (``fp8.swizzle``)."""
    if SWIZZLED:
        tile = (r // 128).to(tl.int64) * (pitch // 4) + c // 4
        return tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
    else:
        return r.to(tl.int64) * pitch + c


@triton.jit
def spread(factor, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN / 32] to [BM, BN], each entry 32 times."""
    return tl.reshape(tl.broadcast_to(factor[:, :, None], [BM, BN // 32, 32]), [BM, BN])
