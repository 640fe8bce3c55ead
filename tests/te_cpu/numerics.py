"""Scaling in blocks as ``transformer_engine_torch`` does it; the numbers are those of ``megatron_act.kernels.fp8``."""

import torch
from torch import Tensor

from megatron_act.kernels import fp8

NAN_CODE = 0x7F  # a NaN in e4m3 and in e5m2
NAN_E8M0 = 0xFF
FP32_MAX = torch.finfo(torch.float32).max


def in_blocks(y: Tensor, length: int) -> Tensor:
    """[R, C] to [R, blocks, length], the last block filled with zeros."""
    full = torch.nn.functional.pad(y, (0, fp8.up(y.shape[1], length) - y.shape[1]))
    return full.unflatten(1, (-1, length))


def padded(scales: Tensor, rows: int, cols: int) -> Tensor:
    """Zeros after the last row and column, up to multiples of ``rows`` and ``cols``."""
    height, width = scales.shape
    return torch.nn.functional.pad(scales, (0, fp8.up(width, cols) - width, 0, fp8.up(height, rows) - height))


def blockwise(y: Tensor, form: str, power_of_2: bool, epsilon: float) -> tuple[Tensor, Tensor]:
    """One scale per 1 x 128: (bits [R, C], 1 / s [ceil(C/128), up(R, 4)])."""
    blocks = in_blocks(y, fp8.BLOCK)
    scale = fp8.scale_of(fp8.amax_of(blocks, 2), power_of_2, epsilon, form)
    bits = fp8.encode((blocks * scale[..., None]).flatten(1)[:, : y.shape[1]], form)
    return bits, padded((1.0 / scale).T, 1, 4).contiguous()


def squares(y: Tensor, form: str, power_of_2: bool, epsilon: float) -> tuple[Tensor, Tensor]:
    """One scale per 128 x 128: (bits [R, C], 1 / s [ceil(R/128), ceil(C/128)])."""
    of_rows = fp8.amax_of(in_blocks(y, fp8.BLOCK), 2)
    scale = fp8.scale_of(in_blocks(of_rows.T, fp8.BLOCK).amax(2).T, power_of_2, epsilon, form)
    return fp8.encode(y * spread_squares(scale, y.shape), form), 1.0 / scale


def spread_squares(scales: Tensor, shape: torch.Size) -> Tensor:
    """[ceil(R/128), >= ceil(C/128)] to [R, C], each entry over its square."""
    full = scales.repeat_interleave(fp8.BLOCK, 0)[: shape[0]]
    return full.repeat_interleave(fp8.BLOCK, 1)[:, : shape[1]]


def mx(y: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """One power of 2 per 1 x 32: (bits [R, C], E8M0 [R, C/32])."""
    blocks = in_blocks(y, fp8.MX_BLOCK)
    codes = fp8.e8m0_of(fp8.amax_of(blocks, 2), form)
    bits = fp8.encode((blocks * fp8.e8m0_scale(codes)[..., None]).flatten(1)[:, : y.shape[1]], form)
    return bits, codes.to(torch.uint8)


def swizzled(scales: Tensor, columnwise: bool) -> Tensor:
    """E8M0 in the order in which a GEMM reads it; column-wise scales as those of the transposed matrix. Same shape."""
    return fp8.swizzle(scales.T if columnwise else scales).reshape(scales.shape)


def unswizzled(scales: Tensor, columnwise: bool) -> Tensor:
    """``swizzled`` undone."""
    return fp8.unswizzle(scales.reshape(scales.shape[::-1])).T if columnwise else fp8.unswizzle(scales)
