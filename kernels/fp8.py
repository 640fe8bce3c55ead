"""FP8 numbers and scales, written out in torch: what every store of ``stores.py`` must equal bit for bit.

    e4m3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; largest 448; 0x7F is NaN, there is no infinity
    q = e4m3(y s), to nearest even, saturating; infinities saturate too, NaN stays NaN

One scale per tensor (delayed: given; current: from the tensor's own amax), per 1 x 128 block, or per 1 x 32 block as a
power of two in 8 bits (E8M0, biased by 127: MXFP8). The layouts are Transformer Engine's (2.20):

    tensor     data [M, K], transposed [K, M]; 1 / s as fp32 [1]
    blockwise  data [M, K] with 1 / s [ceil(K/128), up(M, 4)], entry [block of k, m];
               transposed [K, M] with 1 / s [ceil(M/128), up(K, 4)], entry [block of m, k]
    mxfp8      data [M, K] with E8M0 [up(M, 128), up(K/32, 4)]; once more [M, K] with E8M0 [up(M/32, 4), up(K, 128)] for
               blocks of 32 rows; M and K multiples of 32

up(a, b) is a rounded up to a multiple of b; what that adds holds zeros. An amax ignores NaN. Blockwise and mxfp8 first
round y to bf16, as quantizing a bf16 activation would; so can a scale per tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
BLOCK, MX_BLOCK = 128, 32
RECIPES = ("tensor", "blockwise", "mxfp8")


@dataclass(frozen=True)
class Quantized:
    """A tensor in FP8: uint8 bits and inverse scales; the column-wise half is None where it was not asked for.

    ``amax`` is the largest |y| (fp32, before scaling), ``tensor`` only.
    """

    data: Tensor
    scale_inv: Tensor
    columnwise: Tensor | None
    columnwise_scale_inv: Tensor | None
    amax: Tensor | None


def up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below ``size``."""
    return -(-size // multiple) * multiple


def to_bf16(y: Tensor) -> Tensor:
    """fp32 rounded to the nearest bf16, ties to even, as fp32."""
    return y.to(torch.bfloat16).to(torch.float32)


def encode(y: Tensor) -> Tensor:
    """fp32 to e4m3 bits, by integers: the mantissa's lowest 20 bits are rounded off.

    Below 2^-6 steps are 2^-9: adding 2^14 rounds to them, since fp32 has those steps there.
    """
    bits = y.contiguous().view(torch.int32)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = (y.abs() + 16384.0).contiguous().view(torch.int32) - 0x46800000
    code = torch.where(y.abs() < 2.0**-6, small, normal).clamp(max=0x7E) | ((bits >> 24) & 0x80)
    return torch.where(y.isnan(), 0x7F, code).to(torch.uint8)


def decode(code: Tensor) -> Tensor:
    """e4m3 bits to fp32, exactly."""
    size = code.to(torch.int32) & 0x7F
    exponent, mantissa = size >> 3, (size & 7).float()
    value = torch.where(exponent == 0, mantissa * 2.0**-9, (8.0 + mantissa) * torch.exp2(exponent.float() - 10.0))
    value = torch.where(size == 0x7F, torch.nan, value)
    return torch.where(code >= 0x80, -value, value)


def amax_of(y: Tensor, dim: int | None = None) -> Tensor:
    """Largest |y|, NaN not counted."""
    size = torch.where(y.isnan(), 0.0, y.abs())
    return size.amax() if dim is None else size.amax(dim)


def scale_of(amax: Tensor, power_of_2: bool, epsilon: float = 0.0) -> Tensor:
    """448 / amax in fp32; 1 where amax is 0 or infinite, the largest float where the quotient overflows.

    power_of_2: rounded down to one. epsilon: floor of amax.
    """
    amax = amax.clamp(min=epsilon)
    scale = torch.where((amax == 0) | amax.isinf(), 1.0, E4M3_MAX / amax)
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return _floor_to_power(scale) if power_of_2 else scale


def _floor_to_power(scale: Tensor) -> Tensor:
    return (scale.contiguous().view(torch.int32) & -0x800000).view(torch.float32)  # 0x7F800000 and the sign


def e8m0_of(amax: Tensor) -> Tensor:
    """E8M0 of amax / 448, rounded up, as int32: 0 for 0, 0xFE for infinity."""
    value = amax * (1.0 / E4M3_MAX)
    bits = value.contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    tiny = (exponent == 0) & (mantissa <= 0x400000)
    rounded = exponent + ((mantissa > 0) & (exponent != 0xFE) & ~tiny).int()
    return torch.where(value.isinf(), 0xFE, torch.where(value == 0, 0, rounded))


def e8m0_scale(code: Tensor) -> Tensor:
    """What values are multiplied by: 2^(127 - code), 1 for code 0."""
    return torch.where(code == 0, 1.0, ((254 - code) << 23).view(torch.float32))


def quantize(y: Tensor, recipe: str, scale: Tensor | None = None, round_bf16: bool = True) -> Quantized:
    """The specification: both halves of ``y`` (fp32, [M, K]).

    Args:
        y: values; leading dimensions flattened by the caller.
        recipe: ``tensor``, ``blockwise`` or ``mxfp8``.
        scale: of ``tensor``, fp32 [1].
        round_bf16: first round to bf16.
    """
    y = to_bf16(y) if round_bf16 else y
    if recipe == "tensor":
        assert scale is not None
        data = encode(y * scale)
        return Quantized(data, 1.0 / scale, data.T.contiguous(), None, amax_of(y).reshape(1))
    if recipe == "mxfp8":
        (data, codes), (data_t, codes_t) = _mxfp8(y), _mxfp8(y.T)
        return Quantized(
            data, _padded(codes, 128, 4), data_t.T.contiguous(), _padded(codes_t.T.contiguous(), 4, 128), None
        )
    (data, scales), (data_t, scales_t) = _blockwise(y), _blockwise(y.T)
    return Quantized(data, _padded(scales.T.contiguous(), 1, 4), data_t, _padded(scales_t.T.contiguous(), 1, 4), None)


def _blocks(y: Tensor, length: int) -> Tensor:
    """[M, K] to [M, blocks, length], the last block filled with zeros."""
    full = torch.nn.functional.pad(y, (0, up(y.shape[1], length) - y.shape[1]))
    return full.unflatten(1, (-1, length))


def _blockwise(y: Tensor) -> tuple[Tensor, Tensor]:
    """(bits [M, K], 1 / s [M, blocks])"""
    scale = scale_of(amax_of(_blocks(y, BLOCK), 2), power_of_2=True)
    data = encode((_blocks(y, BLOCK) * scale[..., None]).flatten(1)[:, : y.shape[1]])
    return data, 1.0 / scale


def _mxfp8(y: Tensor) -> tuple[Tensor, Tensor]:
    """(bits [M, K], E8M0 [M, blocks])"""
    codes = e8m0_of(amax_of(_blocks(y, MX_BLOCK), 2))
    data = encode((_blocks(y, MX_BLOCK) * e8m0_scale(codes)[..., None]).flatten(1)[:, : y.shape[1]])
    return data, codes.to(torch.uint8)


def _padded(scales: Tensor, rows: int, cols: int) -> Tensor:
    height, width = scales.shape
    return torch.nn.functional.pad(scales, (0, up(width, cols) - width, 0, up(height, rows) - height))
