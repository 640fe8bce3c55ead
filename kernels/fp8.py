"""FP8 numbers and scales, written out in torch: what every store of ``stores.py`` must equal bit for bit.

    e4m3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; largest 448; 0x7F is NaN, there is no infinity
    e5m2: 1 sign, 5 exponent (bias 15), 2 mantissa bits; largest 57344; 0x7C is infinity, above it NaN
    q = fp8(y s), to nearest even, saturating; infinities saturate too (no cast makes one), NaN becomes 0x7F

One scale per tensor (delayed: given; current: from the tensor's own amax), per 1 x 128 block, or per 1 x 32 block as a
power of two in 8 bits (E8M0, biased by 127: MXFP8). The layouts are Transformer Engine's (2.20):

    tensor     data [M, K], transposed [K, M]; 1 / s as fp32 [1]
    blockwise  data [M, K] with 1 / s [ceil(K/128), up(M, 4)], entry [block of k, m];
               transposed [K, M] with 1 / s [ceil(M/128), up(K, 4)], entry [block of m, k]
    mxfp8      data [M, K] with E8M0 [up(M, 128), up(K/32, 4)]; once more [M, K] with E8M0 [up(M/32, 4), up(K, 128)] for
               blocks of 32 rows; M and K multiples of 32; swizzled: the same bytes in the order of :func:`swizzle`
    plain      not FP8: data [M, K] in a float dtype, no scales, no second half

up(a, b) is a rounded up to a multiple of b; what that adds holds zeros. An amax ignores NaN. Blockwise and mxfp8 first
round y to bf16, as quantizing a bf16 activation would; so can a scale per tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK, MX_BLOCK = 128, 32
RECIPES = ("plain", "tensor", "blockwise", "mxfp8")


@dataclass(frozen=True)
class Format:
    """An 8-bit float: mantissa bits, exponent bias, largest finite value and its code."""

    mantissa: int
    bias: int
    max: float
    top: int


FORMATS = {"e4m3": Format(3, 7, 448.0, 0x7E), "e5m2": Format(2, 15, 57344.0, 0x7B)}


@dataclass(frozen=True)
class Quantized:
    """A tensor in one of RECIPES: uint8 bits and inverse scales; a part that was not asked for is None.

    Attributes:
        data, scale_inv: as the module describes.
        columnwise, columnwise_scale_inv: the half that a GEMM reads along the other dimension.
        amax: largest |y| (fp32, before scaling), one element, ``tensor`` only.
        format: ``e4m3`` or ``e5m2``.
        swizzled: the scales are in the order in which a GEMM reads them, ``mxfp8`` only.
    """

    data: Tensor
    scale_inv: Tensor | None = None
    columnwise: Tensor | None = None
    columnwise_scale_inv: Tensor | None = None
    amax: Tensor | None = None
    recipe: str = "plain"
    format: str = "e4m3"
    swizzled: bool = False

    def values(self) -> Tensor:
        """fp32 [M, K] of the row-wise half, exactly."""
        data = self.data.flatten(0, -2)
        if self.scale_inv is None:
            return data.float()
        found, (rows, cols) = decode(data, self.format), data.shape
        if self.recipe == "tensor":
            return found * self.scale_inv
        if self.recipe == "blockwise":
            return found * self.scale_inv.T.repeat_interleave(BLOCK, 1)[:rows, :cols]
        codes = unswizzle(self.scale_inv) if self.swizzled else self.scale_inv
        return found * e8m0_value(codes).repeat_interleave(MX_BLOCK, 1)[:rows, :cols]


@dataclass(frozen=True)
class Kept:
    """z = x + bias for the backward pass: e4m3 bits and E8M0 scales of 1 x 32 blocks, 1.03125 bytes per element.

    z is the fp32 sum, rounded once, to e4m3; the last block of a row may be short. Our own layout, without padding.

    Attributes:
        data: uint8 [M, K].
        scales: uint8 [M, ceil(K/32)].
    """

    data: Tensor
    scales: Tensor

    def values(self) -> Tensor:
        """z as fp32 [M, K]."""
        scales = e8m0_value(self.scales).repeat_interleave(MX_BLOCK, 1)[:, : self.data.shape[1]]
        return decode(self.data) * scales


def up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below ``size``."""
    return -(-size // multiple) * multiple


def to_bf16(y: Tensor) -> Tensor:
    """fp32 rounded to the nearest bf16, ties to even, as fp32."""
    return y.to(torch.bfloat16).to(torch.float32)


def encode(y: Tensor, format: str = "e4m3") -> Tensor:
    """fp32 to FP8 bits, by integers: with m mantissa bits the lowest 23 - m of 23 are rounded off.

    Below the smallest normal number 2^(1 - bias) steps are 2^(1 - bias - m): adding the power of two around which fp32
    has those steps rounds to them.
    """
    kind = FORMATS[format]
    shift = 23 - kind.mantissa
    bits = y.contiguous().view(torch.int32)
    size = bits & 0x7FFFFFFF
    odd = (size >> shift) & 1
    normal = ((size + (1 << (shift - 1)) - 1 + odd) >> shift) - ((127 - kind.bias) << kind.mantissa)
    ruler = 2.0 ** (shift + 1 - kind.bias)
    small = (y.abs() + ruler).contiguous().view(torch.int32) - torch.tensor(ruler).view(torch.int32).item()
    code = torch.where(y.abs() < 2.0 ** (1 - kind.bias), small, normal).clamp(max=kind.top) | ((bits >> 24) & 0x80)
    return torch.where(y.isnan(), 0x7F, code).to(torch.uint8)


def decode(code: Tensor, format: str = "e4m3") -> Tensor:
    """FP8 bits to fp32, exactly."""
    kind = FORMATS[format]
    size = code.to(torch.int32) & 0x7F
    exponent, mantissa = size >> kind.mantissa, size & ((1 << kind.mantissa) - 1)
    whole = mantissa + torch.where(exponent > 0, 1 << kind.mantissa, 0)
    step = (exponent.clamp(min=1) + 127 - kind.bias - kind.mantissa << 23).view(torch.float32)
    value = whole.float() * step
    if format == "e5m2":
        value = torch.where(size == 0x7C, torch.inf, value)
    value = torch.where(size > (0x7E if format == "e4m3" else 0x7C), torch.nan, value)
    return torch.where(code >= 0x80, -value, value)


def amax_of(y: Tensor, dim: int | None = None) -> Tensor:
    """Largest |y|, NaN not counted."""
    size = torch.where(y.isnan(), 0.0, y.abs())
    return size.amax() if dim is None else size.amax(dim)


def scale_of(amax: Tensor, power_of_2: bool, epsilon: float = 0.0, format: str = "e4m3") -> Tensor:
    """max / amax in fp32, max that of the format; 1 where amax is 0 or infinite, finite where the quotient overflows.

    power_of_2: rounded down to one. epsilon: floor of amax.
    """
    amax = amax.clamp(min=epsilon)
    scale = torch.where((amax == 0) | amax.isinf(), 1.0, FORMATS[format].max / amax)
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return _floor_to_power(scale) if power_of_2 else scale


def _floor_to_power(scale: Tensor) -> Tensor:
    return (scale.contiguous().view(torch.int32) & -0x800000).view(torch.float32)  # 0x7F800000 and the sign


def e8m0_of(amax: Tensor, format: str = "e4m3") -> Tensor:
    """E8M0 of amax / max, rounded up, as int32: 0 (which is 2^-127) for 0, 0xFE for infinity."""
    value = amax * (1.0 / FORMATS[format].max)
    bits = value.contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    tiny = (exponent == 0) & (mantissa <= 0x400000)
    rounded = exponent + ((mantissa > 0) & (exponent != 0xFE) & ~tiny).int()
    return torch.where(value.isinf(), 0xFE, torch.where(value == 0, 0, rounded))


def e8m0_value(code: Tensor) -> Tensor:
    """2^(code - 127) as fp32, exactly: 2^-127 is subnormal; 0xFF is NaN."""
    code = code.to(torch.int32)
    bits = torch.where(code == 0, 0x400000, code << 23)
    return torch.where(code == 0xFF, torch.nan, bits.view(torch.float32))


def e8m0_scale(code: Tensor) -> Tensor:
    """What values are multiplied by: 2^(127 - code)."""
    return e8m0_value(254 - code)


def swizzle(scales: Tensor) -> Tensor:
    """E8M0 [R, C] in the order in which cuBLAS reads it, same shape; R is a multiple of 128, C of 4.

    Tiles of 128 x 4, row-major over [R/128, C/4]; within one, row r and column c lie at 16 (r % 32) + 4 (r // 32) + c
    (cuBLAS manual, "1D Block Scaling Factors Layout").
    """
    rows, cols = scales.shape
    tiles = scales.reshape(rows // 128, 4, 32, cols // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, cols)


def unswizzle(scales: Tensor) -> Tensor:
    """Inverse of :func:`swizzle`."""
    rows, cols = scales.shape
    tiles = scales.reshape(rows // 128, cols // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, cols)


def quantize(
    y: Tensor, recipe: str, scale: Tensor | None = None, round_bf16: bool = True, *, format: str = "e4m3",
    swizzled: bool = False,
) -> Quantized:  # fmt: skip
    """The specification: both halves of ``y`` (fp32, [M, K]).

    Args:
        y: values; leading dimensions flattened by the caller.
        recipe: ``tensor``, ``blockwise`` or ``mxfp8``.
        scale: of ``tensor``, fp32, one element.
        round_bf16: first round to bf16.
        format: ``e4m3`` or ``e5m2``.
        swizzled: order the scales of ``mxfp8`` for the GEMM; the column-wise ones as those of the transposed matrix.
    """
    y = to_bf16(y) if round_bf16 else y
    if recipe == "tensor":
        assert scale is not None
        data = encode(y * scale, format)
        inverse = (1.0 / scale).reshape(1)
        return Quantized(data, inverse, data.T.contiguous(), None, amax_of(y).reshape(1), recipe, format)
    if recipe == "mxfp8":
        (data, codes), (data_t, codes_t) = _mxfp8(y, format), _mxfp8(y.T, format)
        codes, codes_t = _padded(codes, 128, 4), _padded(codes_t, 128, 4)
        if swizzled:
            second = swizzle(codes_t).reshape(codes_t.shape[1], codes_t.shape[0])
            return Quantized(data, swizzle(codes), data_t.T.contiguous(), second, None, recipe, format, True)
        return Quantized(data, codes, data_t.T.contiguous(), codes_t.T.contiguous(), None, recipe, format)
    (data, scales), (data_t, scales_t) = _blockwise(y, format), _blockwise(y.T, format)
    inverse, inverse_t = _padded(scales.T, 1, 4).contiguous(), _padded(scales_t.T, 1, 4).contiguous()
    return Quantized(data, inverse, data_t, inverse_t, None, recipe, format)


def keep(z: Tensor) -> Kept:
    """The specification of :class:`Kept` for z, fp32 [M, K]."""
    return Kept(*_mxfp8(z, "e4m3"))


def _blocks(y: Tensor, length: int) -> Tensor:
    """[M, K] to [M, blocks, length], the last block filled with zeros."""
    full = torch.nn.functional.pad(y, (0, up(y.shape[1], length) - y.shape[1]))
    return full.unflatten(1, (-1, length))


def _blockwise(y: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """(bits [M, K], 1 / s [M, blocks])"""
    scale = scale_of(amax_of(_blocks(y, BLOCK), 2), power_of_2=True, format=format)
    data = encode((_blocks(y, BLOCK) * scale[..., None]).flatten(1)[:, : y.shape[1]], format)
    return data, 1.0 / scale


def _mxfp8(y: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """(bits [M, K], E8M0 [M, blocks])"""
    codes = e8m0_of(amax_of(_blocks(y, MX_BLOCK), 2), format)
    data = encode((_blocks(y, MX_BLOCK) * e8m0_scale(codes)[..., None]).flatten(1)[:, : y.shape[1]], format)
    return data, codes.to(torch.uint8)


def _padded(scales: Tensor, rows: int, cols: int) -> Tensor:
    height, width = scales.shape
    return torch.nn.functional.pad(scales, (0, up(width, cols) - width, 0, up(height, rows) - height))
