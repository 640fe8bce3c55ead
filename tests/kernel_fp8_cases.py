"""What the FP8 kernel tests share: inputs with every special value, and comparison bit for bit.

Triton's interpreter has casts of its own, so there the kernels round by integers. On a GPU cvt rounds and the same
tests compare its bits; that it rounds to nearest and saturates is read from its PTX too (test_kernels_fp8_compile.py).
"""

import math

import torch
from kernel_cases import DEVICE, shifted_params
from torch import Tensor

from megatron_act.kernels import fp8, fp8_ops
from megatron_act.kernels.fp8 import Quantized

FP8 = ("tensor", "blockwise", "mxfp8")
SHAPES = {"plain": (70, 150), "tensor": (70, 150), "blockwise": (130, 150), "mxfp8": (160, 96)}  # tails both ways
PARTS = ("data", "scale_inv", "columnwise", "columnwise_scale_inv", "amax")


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def special(shape: tuple[int, int]) -> Tensor:
    """Rows of zeros, one with NaN, one of NaN, one with infinities, one beyond the range, one of subnormal results."""
    x = random(*shape)
    x[3], x[5, 7], x[7], x[9, 11], x[9, 12] = 0.0, math.nan, math.nan, math.inf, -math.inf
    x[17], x[20] = x[17] * 1e6, x[20] * 1e-9
    return x


def raw(name: str) -> list[Tensor]:
    return [p.detach() for p in shifted_params(name)]


def buffers(recipe: str, shape: tuple[int, int], **options: object) -> Quantized:
    """Of a recipe, full of what no test expects: every byte of them must be written."""
    out = fp8_ops.empty(recipe, *shape, DEVICE, **options)  # type: ignore[arg-type]
    for part in PARTS[:4]:
        if getattr(out, part) is not None:
            getattr(out, part).fill_(99)
    return out


def equal(got: Tensor, want: Tensor) -> bool:
    """Bits, so that NaN equals NaN and -0 differs from 0."""
    bits = lambda t: t if t.dtype == torch.uint8 else t.contiguous().view(torch.int32)  # noqa: E731
    return got.shape == want.shape and torch.equal(bits(got.cpu()), bits(want.cpu()))


def check(got: Quantized, want: Quantized, columnwise: bool = True) -> None:
    """Every part of ``got`` equals ``want``'s."""
    for part in PARTS:
        mine, exact = getattr(got, part), getattr(want, part)
        if exact is None or (part.startswith("columnwise") and not columnwise):
            assert mine is None, part
        else:
            assert equal(mine, exact), part


def quantized_gradient(recipe: str, shape: tuple[int, int], format: str, swizzled: bool = False) -> Quantized:
    """A random gradient in FP8, zeros, largest values and (e5m2) infinities among its bits."""
    g = random(*shape, seed=2, scale=2.0)
    scale = fp8.scale_of(fp8.amax_of(g), False, format=format)
    made = fp8.quantize(g, recipe, scale, format=format, swizzled=swizzled)
    top = fp8.FORMATS[format].top
    made.data[0, :4] = torch.tensor([top, top | 0x80, 1, 0x80], dtype=torch.uint8)
    return made
