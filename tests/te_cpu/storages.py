"""Reading and writing the halves of Transformer Engine's quantized tensors, as its kernels and cuBLAS do.

A half that is missing, invalid or never written raises, where a GPU would compute with whatever the memory holds. The
layouts are in ``megatron_act.kernels.fp8``; matrices here have the tensor's leading dimensions flattened.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_act.kernels import fp8
from te_cpu import numerics

FORMATS = {"kFloat8E4M3": "e4m3", "kFloat8E5M2": "e5m2"}
SCALED_BY_TENSOR = ("Float8TensorStorage", "Float8Tensor")
SCALED_BY_BLOCK = ("Float8BlockwiseQTensorStorage", "Float8BlockwiseQTensor")
MX = ("MXFP8TensorStorage", "MXFP8Tensor")


def is_quantized(tensor: Any) -> bool:
    """Whether it holds FP8 of one of the three kinds known here."""
    return type(tensor).__name__ in SCALED_BY_TENSOR + SCALED_BY_BLOCK + MX


def format_of(holder: Any) -> str:
    """``e4m3`` or ``e5m2``: of a tensor or a quantizer.

    Raises:
        NotImplementedError: another format than e4m3 and e5m2.
    """
    dtype = getattr(holder, "_fp8_dtype", None) or holder.dtype
    if dtype.name not in FORMATS:
        raise NotImplementedError(f"te_cpu: expected e4m3 or e5m2, got {dtype.name}: not emulated")
    return FORMATS[dtype.name]


def flat(tensor: Tensor) -> Tensor:
    """[..., K] to [M, K]."""
    return tensor.reshape(-1, tensor.shape[-1])


def transposed_shape(shape: torch.Size) -> torch.Size:
    """(*leading, K) to (K, *leading): the shape of transposed data."""
    return torch.Size((shape[-1], *shape[:-1]))


def rowwise(tensor: Any) -> Tensor:
    """The values that the row-wise half stands for: fp32 [M, K].

    Raises:
        RuntimeError: it is missing, or its scales were never written.
    """
    if type(tensor).__name__ in SCALED_BY_TENSOR:
        _require(tensor._data is not None, tensor, "row-wise data")
        return flat(_values(tensor, tensor._data)) * _written(tensor._scale_inv, tensor)
    _require(tensor._rowwise_data is not None and tensor._rowwise_scale_inv is not None, tensor, "row-wise data")
    values = flat(_values(tensor, tensor._rowwise_data))
    return values * _spread(tensor, tensor._rowwise_scale_inv, values.shape, columnwise=False)


def columnwise(tensor: Any) -> Tensor:
    """The values that the column-wise half stands for: fp32 [M, K], as ``rowwise``."""
    if type(tensor).__name__ in SCALED_BY_TENSOR:
        valid = tensor._transpose is not None and not tensor._transpose_invalid
        _require(valid, tensor, "a valid transposed copy")
        values = _values(tensor, tensor._transpose).flatten(1).T
        return values * _written(tensor._scale_inv, tensor)
    present = tensor._columnwise_data is not None and tensor._columnwise_scale_inv is not None
    _require(present, tensor, "column-wise data")
    values = _values(tensor, tensor._columnwise_data)
    if type(tensor).__name__ in MX:
        values = flat(values)
        return values * _spread(tensor, tensor._columnwise_scale_inv, values.shape, columnwise=True)
    values = values.flatten(1)
    return (values * _spread(tensor, tensor._columnwise_scale_inv, values.shape, columnwise=True)).T


def _values(tensor: Any, data: Tensor) -> Tensor:
    return fp8.decode(data, format_of(tensor))


def _require(present: bool, tensor: Any, what: str) -> None:
    if not present:
        raise RuntimeError(f"te_cpu: expected {type(tensor).__name__} with {what}, got none: fill it or keep it")


def _written(scales: Tensor, tensor: Any) -> Tensor:
    if scales.isnan().any():
        raise RuntimeError(f"te_cpu: expected scales in {type(tensor).__name__}, got memory that was never written")
    return scales


def _spread(tensor: Any, scales: Tensor, shape: torch.Size, columnwise: bool) -> Tensor:
    """What each stored number is multiplied by: ``shape``, fp32."""
    rows, cols = shape
    if type(tensor).__name__ in MX:
        codes = numerics.unswizzled(scales, columnwise) if tensor._with_gemm_swizzled_scales else scales
        values = _written(fp8.e8m0_value(_mx_part(codes, shape, columnwise)), tensor)
        return values.repeat_interleave(fp8.MX_BLOCK, 0 if columnwise else 1)
    if tensor._is_2D_scaled:
        return _written(numerics.spread_squares(scales, shape), tensor)
    return _written(scales[:, :rows].T.repeat_interleave(fp8.BLOCK, 1)[:, :cols], tensor)


def _mx_part(codes: Tensor, shape: torch.Size, columnwise: bool) -> Tensor:
    """The scales without their padding."""
    rows, cols = shape
    return codes[: rows // fp8.MX_BLOCK, :cols] if columnwise else codes[:rows, : cols // fp8.MX_BLOCK]


def fill_by_tensor(tensor: Any, y: Tensor, scale: Tensor) -> None:
    """Writes every half that the tensor has.

    Args:
        tensor: ``Float8Tensor`` or its storage.
        y: values, fp32 [M, K].
        scale: what they are multiplied by, one number.

    Raises:
        NotImplementedError: only the transposed half is there, which TE's kernel refuses too.
    """
    if tensor._data is None:
        raise NotImplementedError("Columnwise-only per-tensor FP8 quantization is not implemented: also in TE")
    bits = fp8.encode(y * scale, format_of(tensor))
    tensor._data.copy_(bits.view(tensor._data.shape))
    if tensor._transpose is not None:
        tensor._transpose.copy_(bits.T.reshape(tensor._transpose.shape))
    tensor._scale_inv.copy_((1.0 / scale).reshape(1))


def fill_by_block(tensor: Any, y: Tensor, quantizer: Any) -> None:
    """Writes the halves of a ``Float8BlockwiseQTensor``: 1 x 128, or 128 x 128 where ``_is_2D_scaled``."""
    form = format_of(tensor)
    options = (form, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    if tensor._is_2D_scaled:
        bits, scales = numerics.squares(y, *options)
        halves = [(bits, numerics.padded(scales, 1, 4)), (bits.T, numerics.padded(scales.T, 1, 4))]
    else:
        halves = [numerics.blockwise(y, *options), numerics.blockwise(y.T, *options)]
    _store(tensor, halves)


def fill_mx(tensor: Any, y: Tensor) -> None:
    """Writes the halves of an ``MXFP8Tensor``, scales swizzled where its flag says so."""
    form = format_of(tensor)
    bits, codes = numerics.mx(y, form)
    bits_t, codes_t = numerics.mx(y.T, form)
    codes, codes_t = numerics.padded(codes, 128, 4), numerics.padded(codes_t.T, 4, 128)
    if tensor._with_gemm_swizzled_scales:
        codes, codes_t = numerics.swizzled(codes, False), numerics.swizzled(codes_t, True)
    _store(tensor, [(bits, codes), (bits_t.T, codes_t)])


def _store(tensor: Any, halves: list[tuple[Tensor, Tensor]]) -> None:
    for side, (bits, scales) in zip(("rowwise", "columnwise"), halves, strict=True):
        data = getattr(tensor, f"_{side}_data")
        if data is not None:
            data.copy_(bits.reshape(data.shape))
            getattr(tensor, f"_{side}_scale_inv").copy_(scales)
