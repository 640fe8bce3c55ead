"""Quantizers as Transformer Engine's layers have them, and its quantized tensors byte by byte; on a GPU or in te_cpu.

Every empty tensor of these quantizers is full of POISON, so that a byte that nobody wrote shows.
"""

from typing import Any

import torch
from fp8_mlp import DEVICE
from torch import Tensor

from megatron_act import te_buffers
from megatron_act.kernels import fp8

POISON = 0x5A
SCALE = 30.0  # of delayed scaling: a normal x stays below the maximum, a large one saturates
CODES = {form: code for code, form in te_buffers.FORMATS.items()}
NAMES = {  # of the buffers, as ``fp8.Quantized`` names them
    "_data": "data",
    "_scale_inv": "scale_inv",
    "_transpose": "columnwise",
    "_rowwise_data": "data",
    "_rowwise_scale_inv": "scale_inv",
    "_columnwise_data": "columnwise",
    "_columnwise_scale_inv": "columnwise_scale_inv",
}


def quantizer_of(
    recipe: str, format: str = "e4m3", swizzled: bool = False, scale: float = SCALE, **options: Any
) -> Any:
    """For both halves; delayed scaling's scale and amax (0) are views of larger tensors.

    Args:
        recipe: a name of ``te.CAPABILITIES``.
        format: ``e4m3`` or ``e5m2``.
        swizzled: MXFP8's scales in the GEMM's order.
        scale: of ``delayed``.
        options: of ``tensorwise``'s quantizer.
    """
    from transformer_engine import pytorch as te

    dtype = getattr(te.DType, CODES[format])
    if recipe == "delayed":
        scales, history = torch.full((3,), scale, device=DEVICE), torch.zeros(4, 3, device=DEVICE)
        made = te.Float8Quantizer(scales[1:2], history[0, 1:2], dtype)
    elif recipe == "tensorwise":
        made = te.Float8CurrentScalingQuantizer(dtype, device=torch.device(DEVICE), **options)
    elif recipe == "blockwise":
        made = te.Float8BlockQuantizer(dtype, rowwise=True, columnwise=True, block_scaling_dim=1)
    else:
        made = te.MXFP8Quantizer(dtype)
        made.optimize_for_gemm = swizzled
    return _poisoned(made)


def _poisoned(quantizer: Any) -> Any:
    make = quantizer.make_empty

    def make_empty(*args: Any, **kwargs: Any) -> Any:
        tensor = make(*args, **kwargs)
        for part in buffers(tensor).values():
            part.view(torch.uint8).fill_(POISON)
        return tensor

    quantizer.make_empty = make_empty
    return quantizer


def buffers(tensor: Any) -> dict[str, Tensor]:
    """Those that a quantized tensor has, by attribute."""
    found = {name: getattr(tensor, name) for name, _ in tensor._INNER_TENSORS}
    return {name: part for name, part in found.items() if part is not None}


def written_by_te(quantizer: Any, y: Tensor) -> tuple[Any, bool]:
    """(the quantizer's tensor of y, whether it is Transformer Engine's own).

    Before Blackwell its MXFP8 kernels are empty: they write nothing, or are refused. The specification stands in.
    """
    made = quantizer.make_empty(y.shape, dtype=y.dtype, device=y.device)
    mx = hasattr(made, "_with_gemm_swizzled_scales")
    try:
        quantizer.update_quantized(y, made)
    except RuntimeError:
        if not mx:
            raise
    if mx and (made._rowwise_data == POISON).all():
        return specified(quantizer, y), False
    return made, True


def specified(quantizer: Any, y: Tensor) -> Any:
    """The quantizer's tensor of y, by ``kernels/fp8.py``; not of current scaling."""
    made = quantizer.make_empty(y.shape, dtype=y.dtype, device=y.device)
    recipe, format = te_buffers.RECIPES[type(quantizer).__name__], te_buffers.FORMATS[quantizer.dtype.name]
    swizzled, scale = getattr(made, "_with_gemm_swizzled_scales", False), getattr(quantizer, "scale", None)
    exact = fp8.quantize(y.float().flatten(0, -2), recipe, scale, format=format, swizzled=swizzled)
    for name, part in buffers(made).items():
        part.copy_(getattr(exact, NAMES[name]).view(part.shape))
    return made


def differences(got: Any, want: Any) -> tuple[int, int]:
    """(bytes that differ, bytes) of two quantized tensors, what pads their scales left out; ``got``'s holds zeros."""
    ours, theirs = _parts(got), _parts(want)
    assert ours.keys() == theirs.keys()
    for name, full in buffers(got).items():
        assert full.count_nonzero() == ours[name].count_nonzero(), f"{name}: padding that is not zero"
    pairs = [(_bytes(ours[name]), _bytes(theirs[name])) for name in ours]
    return sum(int((a != b).sum()) for a, b in pairs), sum(a.numel() for a, _ in pairs)


def _parts(tensor: Any) -> dict[str, Tensor]:
    """Buffers, scales in the plain order and without padding."""
    found, cols = buffers(tensor), tensor.shape[-1]
    rows, mx = tensor.numel() // cols, hasattr(tensor, "_with_gemm_swizzled_scales")
    if mx and tensor._with_gemm_swizzled_scales:
        turned = found["_columnwise_scale_inv"]
        found["_rowwise_scale_inv"] = fp8.unswizzle(found["_rowwise_scale_inv"])
        found["_columnwise_scale_inv"] = fp8.unswizzle(turned.reshape(turned.shape[::-1])).T
    if "_rowwise_scale_inv" in found:
        width, height = (cols // fp8.MX_BLOCK, rows // fp8.MX_BLOCK) if mx else (rows, cols)
        found["_rowwise_scale_inv"] = found["_rowwise_scale_inv"][: rows if mx else None, :width]
        found["_columnwise_scale_inv"] = found["_columnwise_scale_inv"][: height if mx else None, :cols]
    return found


def _bytes(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.uint8)
