"""What tiles of results are written as: device twins of ``fp8.quantize``, by recipe, both halves in one pass.

A store takes a tuple of tiles, one below the other, each [BM, BN] in bf16 or fp32 with zeros where the tensor ends; the
place of the first; and OUT, the pointers and pitches of its recipe, None for a part that is left out. The half that a
GEMM reads along the other dimension is cast from the transposed tile: it changes hands once, through shared memory, as
bf16, and every thread then writes 16 bytes of a row. What pads the scales is written with them.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from megatron_act.kernels.fp8_device import (
    amax_of,
    bf16_of,
    e8m0_of,
    e8m0_scale,
    encode,
    larger,
    power_scale,
    times,
)
from megatron_act.kernels.operands import lanes, scale_place, spread


@triton.jit
def write(DATA, value, row, col, rows, cols):
    """A tile at row, col of DATA [rows, cols]."""
    r, c = lanes(row, col, value.shape[0], value.shape[1])
    tl.store(DATA + r.to(tl.int64) * cols + c, value, mask=(r < rows) & (c < cols))


@triton.jit
def store_plain(tiles, OUT, row, col, rows, cols, FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, CASTS: tl.constexpr):
    """In the dtype of OUT = (DATA,)."""
    for s in tl.static_range(len(tiles)):
        y = tiles[s]
        if OUT[0].dtype.element_ty == tl.bfloat16:
            y = bf16_of(y.to(tl.float32), CASTS)
        write(OUT[0], y.to(OUT[0].dtype.element_ty), row + s * y.shape[0], col, rows, cols)


@triton.jit
def store_tensor(tiles, OUT, row, col, rows, cols, FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, CASTS: tl.constexpr):
    """One scale. OUT = (DATA, SCALE_INV, DATA_T, SCALE)."""
    scale = tl.load(OUT[3])
    if (row == 0) & (col == 0):
        tl.store(OUT[1], tl.div_rn(1.0, scale))
    for s in tl.static_range(len(tiles)):
        y, first = tiles[s], row + s * tiles[s].shape[0]
        write(OUT[0], encode(y.to(tl.float32) * scale, FORMAT, CASTS), first, col, rows, cols)
        if OUT[2] is not None:
            write(OUT[2], encode(tl.trans(y).to(tl.float32) * scale, FORMAT, CASTS), col, first, cols, rows)


@triton.jit
def store_blockwise(
    tiles, OUT, row, col, rows, cols, FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, CASTS: tl.constexpr
):
    """1 x 128. OUT = (DATA, SCALE_INV, DATA_T, SCALE_INV_T, pitch, pitch of T); the tiles make up 128 x 128."""
    BM: tl.constexpr = tiles[0].shape[0]
    BN: tl.constexpr = tiles[0].shape[1]
    for s in tl.static_range(len(tiles)):
        y, first = tiles[s].to(tl.float32), row + s * BM
        scale, inverse = power_scale(amax_of(y, 1, CASTS), FORMAT)
        write(OUT[0], encode(y * scale[:, None], FORMAT, CASTS), first, col, rows, cols)
        write_scales(OUT[1], inverse, col // 128, first, rows, OUT[4])
    if OUT[2] is not None:
        scale, inverse = power_scale(column_amax(tiles, CASTS), FORMAT)
        write_scales(OUT[3], inverse, row // 128, col, cols, OUT[5])
        for s in tl.static_range(len(tiles)):
            q = times(tiles[s], tl.broadcast_to(scale[None, :], [BM, BN]), CASTS)
            write(OUT[2], encode(tl.trans(q).to(tl.float32), FORMAT, CASTS), col, row + s * BM, cols, rows)


@triton.jit
def column_amax(tiles, CASTS: tl.constexpr):
    """Largest |y| of each column of all tiles, fp32 [BN]; NaN not counted."""
    size = tl.zeros_like(tiles[0])
    for s in tl.static_range(len(tiles)):
        size = larger(size, tiles[s], CASTS)
    return tl.max(size.to(tl.float32), 0)


@triton.jit
def write_scales(SCALES, inverse, block, first, count, pitch):
    """A row of SCALES from ``first`` on; zeros from ``count`` to ``pitch``."""
    at = first + tl.arange(0, inverse.shape[0])
    tl.store(SCALES + block.to(tl.int64) * pitch + at, tl.where(at < count, inverse, 0.0), mask=at < pitch)


@triton.jit
def mx_rows(y, FORMAT: tl.constexpr, CASTS: tl.constexpr):
    """(bits [BM, BN], E8M0 codes [BM, BN / 32] as int32) of 1 x 32 blocks."""
    BM: tl.constexpr = y.shape[0]
    BN: tl.constexpr = y.shape[1]
    codes = e8m0_of(amax_of(tl.reshape(y, [BM, BN // 32, 32]), 2, CASTS), FORMAT)
    return encode(y * spread(e8m0_scale(codes), BM, BN), FORMAT, CASTS), codes


@triton.jit
def store_mxfp8(tiles, OUT, row, col, rows, cols, FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, CASTS: tl.constexpr):
    """1 x 32, E8M0. OUT = (DATA, SCALES, DATA_C, SCALES_C, pitch, pitch of C); the tiles make up 32 rows.

    Swizzled column-wise scales are those of the transposed matrix, and so is their pitch.
    """
    BM: tl.constexpr = tiles[0].shape[0]
    BN: tl.constexpr = tiles[0].shape[1]
    padded = (rows + 127) // 128 * 128
    for s in tl.static_range(len(tiles)):
        first = row + s * BM
        code, scales = mx_rows(tiles[s].to(tl.float32), FORMAT, CASTS)
        write(OUT[0], code, first, col, rows, cols)
        r, block = lanes(first, col // 32, BM, BN // 32)
        tl.store(OUT[1] + scale_place(r, block, OUT[4], SWIZZLED), scales.to(tl.uint8), mask=r < padded)
    if OUT[2] is not None:
        scales = e8m0_of(column_amax(tiles, CASTS), FORMAT)
        for s in tl.static_range(len(tiles)):
            code = encode(tiles[s].to(tl.float32) * e8m0_scale(scales)[None, :], FORMAT, CASTS)
            write(OUT[2], code, row + s * BM, col, rows, cols)
        c = col + tl.arange(0, BN)
        place = scale_place(c, row // 32, OUT[5], True) if SWIZZLED else scale_place(row // 32, c, OUT[5], False)
        tl.store(OUT[3] + place, scales.to(tl.uint8), mask=(c >= 0) & (row < padded))


@triton.jit
def keep(z, KEPT, row, col, rows, cols, CASTS: tl.constexpr):
    """``fp8.keep``. KEPT = (DATA, SCALES, pitch)."""
    code, scales = mx_rows(z, "e4m3", CASTS)
    write(KEPT[0], code, row, col, rows, cols)
    write(KEPT[1], scales.to(tl.uint8), row, col // 32, rows, KEPT[2])
