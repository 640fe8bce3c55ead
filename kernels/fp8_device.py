"""FP8 numbers and scales on the device: twins of the functions of ``fp8.py``, elementwise, no pointers.

CASTS says which casts are the device's: ``fp8`` (from sm_89 on: cvt.rn.satfinite, one rounding), ``bf16`` (sm_80: FP8
is rounded by integers), ``none`` (Triton's interpreter, whose casts truncate: all by integers). The casts to narrower
types are PTX: Triton's own go from fp32 to e4m3 through fp16 on sm_89, which rounds twice, and its bf16 casts of values
that are widened again come one at a time, on the slow conversion unit.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

E4M3_CAST = tl.constexpr(
    "{.reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; "
    "mov.b32 $0, {lo, hi};}"
)
E5M2_CAST = tl.constexpr(
    "{.reg .b16 lo, hi; cvt.rn.satfinite.e5m2x2.f32 lo, $2, $1; cvt.rn.satfinite.e5m2x2.f32 hi, $4, $3; "
    "mov.b32 $0, {lo, hi};}"
)


@triton.jit
def bf16_of(y, CASTS: tl.constexpr):
    """fp32 to the nearest bf16, ties to even."""
    if CASTS == "none":
        bits = y.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(y == y, rounded.to(tl.float32, bitcast=True), y).to(tl.bfloat16)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [y], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def encode(y, FORMAT: tl.constexpr, CASTS: tl.constexpr):
    """fp32 to FP8 bits as uint8."""
    if CASTS == "fp8":
        if FORMAT == "e4m3":
            return tl.inline_asm_elementwise(E4M3_CAST, "=r,r,r,r,r", [y], dtype=tl.uint8, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(E5M2_CAST, "=r,r,r,r,r", [y], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        M: tl.constexpr = 3 if FORMAT == "e4m3" else 2  # mantissa bits
        BIAS: tl.constexpr = 7 if FORMAT == "e4m3" else 15
        TOP: tl.constexpr = 0x7E if FORMAT == "e4m3" else 0x7B
        RULER: tl.constexpr = 16384.0 if FORMAT == "e4m3" else 128.0  # fp32 around it has the subnormals' steps
        RULER_BITS: tl.constexpr = 0x46800000 if FORMAT == "e4m3" else 0x43000000
        bits = y.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        odd = (size >> (23 - M)) & 1
        normal = ((size + (1 << (22 - M)) - 1 + odd) >> (23 - M)) - ((127 - BIAS) << M)
        small = (tl.abs(y) + RULER).to(tl.int32, bitcast=True) - RULER_BITS
        code = tl.minimum(tl.where(size < ((128 - BIAS) << 23), small, normal), TOP) | ((bits >> 24) & 0x80)
        return tl.where(y == y, code, 0x7F).to(tl.uint8)


@triton.jit
def decode(code, FORMAT: tl.constexpr, CASTS: tl.constexpr):
    """FP8 bits (uint8) to fp32, exactly."""
    if CASTS == "fp8":
        if FORMAT == "e4m3":
            return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            return code.to(tl.float8e5, bitcast=True).to(tl.float32)
    else:
        M: tl.constexpr = 3 if FORMAT == "e4m3" else 2
        POWER: tl.constexpr = 1.329227995784916e36 if FORMAT == "e4m3" else 5.192296858534828e33  # 2^120, 2^112
        size = code.to(tl.int32) & 0x7F
        value = (size << (23 - M)).to(tl.float32, bitcast=True) * POWER  # fp32 subnormals carry those of FP8
        if FORMAT == "e5m2":
            value = tl.where(size == 0x7C, float("inf"), value)
            value = tl.where(size > 0x7C, float("nan"), value)
        else:
            value = tl.where(size == 0x7F, float("nan"), value)
        return tl.where(code >= 0x80, -value, value)


@triton.jit
def magnitude(y, CASTS: tl.constexpr):
    """|y| for a maximum: the device's ignores NaN, the interpreter's must not see one."""
    if CASTS == "none":
        return tl.where(y == y, tl.abs(y), 0.0)
    else:
        return tl.abs(y)


@triton.jit
def amax_of(y, AXIS: tl.constexpr, CASTS: tl.constexpr):
    """Largest |y| along an axis in fp32, NaN not counted: 0 where all are."""
    return tl.maximum(tl.max(magnitude(y, CASTS), AXIS), 0.0)


@triton.jit
def larger(size, y, CASTS: tl.constexpr):
    """max(size, |y|) of two tiles, NaN of y not counted; bf16 two at a time."""
    if y.dtype == tl.bfloat16 and CASTS != "none":
        return tl.inline_asm_elementwise(
            "{.reg .b32 a; abs.bf16x2 a, $2; max.bf16x2 $0, $1, a;}", "=r,r,r", [size, y],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.maximum(size, magnitude(y.to(tl.float32), CASTS).to(y.dtype))


@triton.jit
def times(y, power, CASTS: tl.constexpr):
    """y times a power of two in y's dtype: exact, but where the product is too small for FP8 anyway."""
    if y.dtype == tl.bfloat16 and CASTS != "none":
        return tl.inline_asm_elementwise(  # an fma, since sm_80 has no multiplication; -0 keeps the sign of a zero
            "{.reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z;}", "=r,r,r", [y, bf16_of(power, CASTS)],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        product = y.to(tl.float32) * power
        return bf16_of(product, CASTS) if y.dtype == tl.bfloat16 else product


@triton.jit
def power_scale(amax, FORMAT: tl.constexpr):
    """(s, 1 / s) with s = ``fp8.scale_of(amax, power_of_2=True)``, both exact.

    The format's maximum is 1.75 * 2^T, amax = m * 2^e: s = 2^(T - e), half of it for m > 1.75 (a quotient just below a
    power of two never rounds up to it), at most 2^127; 1 for an amax of 0 or infinity.
    """
    T: tl.constexpr = 8 if FORMAT == "e4m3" else 15
    bits = amax.to(tl.int32, bitcast=True)
    exponent = tl.minimum(254 + T - (bits >> 23) - ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 254)
    exponent = tl.where((bits == 0) | (bits == 0x7F800000), 127, exponent)
    inverse = tl.maximum((254 - exponent) << 23, 0x400000)
    return (exponent << 23).to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def e8m0_of(amax, FORMAT: tl.constexpr):
    """``fp8.e8m0_of``, int32."""
    INVERSE: tl.constexpr = 0.002232142857142857 if FORMAT == "e4m3" else 1.743861607142857e-05
    bits = (amax * INVERSE).to(tl.int32, bitcast=True)
    return tl.where(bits <= 0x400000, 0, tl.minimum((bits + 0x7FFFFF) >> 23, 0xFE))  # 0x400000: 2^-127


@triton.jit
def e8m0_value(code):
    """2^(code - 127); 0xFF is NaN."""
    bits = tl.where(code == 0, 0x400000, code << 23)
    return tl.where(code == 0xFF, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_scale(code):
    """2^(127 - code), for a code that :func:`e8m0_of` gave."""
    return tl.maximum((254 - code) << 23, 0x400000).to(tl.float32, bitcast=True)
