"""What a tile of results is written as in FP8: device twins of ``fp8.quantize``, by recipe, both halves in one pass.

A store takes a tile y (fp32, [BM, BN], zeros where the tensor ends), its place and the pointers of its recipe; None
leaves a part out. EXACT rounds by integers: in Triton's interpreter, whose casts are not the device's, and on sm_89,
where Triton would round twice. From sm_90 on cvt.rn.satfinite.e4m3x2.f32 does it.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def bf16_of(y, EXACT: tl.constexpr):
    """fp32 rounded to the nearest bf16, as fp32."""
    if EXACT:
        bits = y.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(y == y, rounded.to(tl.float32, bitcast=True), y)
    else:
        return y.to(tl.bfloat16).to(tl.float32)


@triton.jit
def e4m3_of(y, EXACT: tl.constexpr):
    """e4m3 bits as uint8 (``fp8.encode``)."""
    if EXACT:
        bits = y.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
        small = (tl.abs(y) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.minimum(tl.where(size < 0x3C800000, small, normal), 0x7E) | ((bits >> 24) & 0x80)
        return tl.where(y == y, code, 0x7F).to(tl.uint8)
    else:
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def e4m3_value(code, EXACT: tl.constexpr):
    """e4m3 bits (uint8) to fp32, exactly."""
    if EXACT:
        size = code.to(tl.int32) & 0x7F
        mantissa = (size & 7).to(tl.float32)
        exponent = ((((size >> 3) + 117) << 23) & 0x7FFFFFFF).to(tl.float32, bitcast=True)  # 2^(e - 10)
        value = tl.where(size < 8, mantissa * 0.001953125, (8.0 + mantissa) * exponent)
        value = tl.where(size == 0x7F, float("nan"), value)
        return tl.where(code >= 0x80, -value, value)
    else:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def magnitude(y):
    """|y|, 0 for NaN: an amax does not count it."""
    return tl.where(y == y, tl.abs(y), 0.0)


@triton.jit
def scale_of(amax):
    """``fp8.scale_of(amax, power_of_2=True)``; an exact division, since its exponent is kept."""
    scale = tl.minimum(tl.div_rn(448.0, amax), 3.4028234663852886e38)
    scale = tl.where((amax == 0) | (amax == float("inf")), 1.0, scale)
    return (scale.to(tl.int32, bitcast=True) & -8388608).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_of(amax):
    """``fp8.e8m0_of``, int32."""
    value = amax * 0.002232142857142857
    bits = value.to(tl.int32, bitcast=True)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    tiny = (exponent == 0) & (mantissa <= 0x400000)
    rounded = exponent + tl.where((mantissa > 0) & (exponent != 0xFE) & (tiny == 0), 1, 0)
    return tl.where(value == float("inf"), 0xFE, tl.where(value == 0, 0, rounded))


@triton.jit
def e8m0_scale(code):
    """2^(127 - code), 1 for code 0."""
    return tl.where(code == 0, 1.0, ((254 - code) << 23).to(tl.float32, bitcast=True))


@triton.jit
def store_tensor(y, OUT, row, col, rows, cols, EXACT: tl.constexpr):
    """One scale. OUT = (DATA, DATA_T, SCALE, AMAX); AMAX takes the maximum of what is there and the tile's."""
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    code = e4m3_of(y * tl.load(OUT[2]), EXACT)
    tl.store(OUT[0] + row[:, None].to(tl.int64) * cols + col[None, :], code, mask=inside)
    if OUT[1] is not None:
        tl.store(OUT[1] + col[None, :].to(tl.int64) * rows + row[:, None], code, mask=inside)
    if OUT[3] is not None:
        tl.atomic_max(OUT[3], tl.max(tl.max(magnitude(y), 1), 0))  # a maximum: any order gives the same bits


@triton.jit
def store_blockwise(y, OUT, row, col, rows, cols, EXACT: tl.constexpr):
    """1 x 128. OUT = (DATA, SCALE_INV, DATA_T, SCALE_INV_T, up(rows, 4), up(cols, 4)); a tile is 128 x 128."""
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    size = magnitude(y)
    scale = scale_of(tl.max(size, 1))
    code = e4m3_of(y * scale[:, None], EXACT)
    tl.store(OUT[0] + row[:, None].to(tl.int64) * cols + col[None, :], code, mask=inside)
    tl.store(OUT[1] + tl.program_id(1).to(tl.int64) * OUT[4] + row, 1.0 / scale, mask=row < rows)
    if OUT[2] is not None:
        scale = scale_of(tl.max(size, 0))
        code = e4m3_of(y * scale[None, :], EXACT)
        tl.store(OUT[2] + col[None, :].to(tl.int64) * rows + row[:, None], code, mask=inside)
        tl.store(OUT[3] + tl.program_id(0).to(tl.int64) * OUT[5] + col, 1.0 / scale, mask=col < cols)


@triton.jit
def store_mxfp8(y, OUT, row, col, rows, cols, EXACT: tl.constexpr):
    """1 x 32, E8M0. OUT = (DATA, SCALES, DATA_C, SCALES_C, up(cols / 32, 4), up(cols, 128)); rows, cols % 32 == 0."""
    BM: tl.constexpr = y.shape[0]
    BN: tl.constexpr = y.shape[1]
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    place = row[:, None].to(tl.int64) * cols + col[None, :]
    size = magnitude(y)
    scales = e8m0_of(tl.max(tl.reshape(size, [BM, BN // 32, 32]), 2))
    code = e4m3_of(y * spread(e8m0_scale(scales), BM, BN), EXACT)
    tl.store(OUT[0] + place, code, mask=inside)
    block = tl.program_id(1) * (BN // 32) + tl.arange(0, BN // 32)
    tl.store(
        OUT[1] + row[:, None].to(tl.int64) * OUT[4] + block[None, :], scales.to(tl.uint8),
        mask=(row[:, None] < rows) & (block[None, :] * 32 < cols),
    )  # fmt: skip
    if OUT[2] is not None:
        scales = e8m0_of(tl.max(tl.reshape(size, [BM // 32, 32, BN]), 1))
        factor = tl.broadcast_to(e8m0_scale(scales)[:, None, :], [BM // 32, 32, BN])
        tl.store(OUT[2] + place, e4m3_of(y * tl.reshape(factor, [BM, BN]), EXACT), mask=inside)
        block = tl.program_id(0) * (BM // 32) + tl.arange(0, BM // 32)
        tl.store(
            OUT[3] + block[:, None].to(tl.int64) * OUT[5] + col[None, :], scales.to(tl.uint8),
            mask=(block[:, None] * 32 < rows) & (col[None, :] < cols),
        )  # fmt: skip


@triton.jit
def spread(factor, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN / 32] to [BM, BN], each entry 32 times."""
    return tl.reshape(tl.broadcast_to(factor[:, :, None], [BM, BN // 32, 32]), [BM, BN])
