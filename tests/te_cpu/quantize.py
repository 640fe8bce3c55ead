"""``transformer_engine_torch``'s functions that make quantized tensors.

Buffers are born full of NaN (0x7F, scales NaN or E8M0 0xFF), so that what nobody wrote does not pass for a value.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_act.kernels import fp8
from te_cpu import numerics, storages


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: Any = None, pin_memory: bool = False
) -> Any:
    """A tensor (storage object for an ``internal`` quantizer) with the buffers of the quantizer's usages, all NaN.

    Raises:
        RuntimeError: MXFP8 with a dimension that is no multiple of 32.
    """
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
    from transformer_engine.pytorch.tensor import Float8CurrentScalingQuantizer, Float8Quantizer, MXFP8Quantizer

    size = torch.Size(shape)
    if isinstance(quantizer, MXFP8Quantizer) and (size[-1] % 32 or (size.numel() // max(1, size[-1])) % 32):
        raise RuntimeError(f"MXFP8 requires tensor dims that are divisible by 32, got {tuple(size)}")
    # delayed and current scaling make the same tensors; only the latter's class says which buffers
    kind = Float8CurrentScalingQuantizer if isinstance(quantizer, Float8Quantizer) else type(quantizer)
    meta = kind.storage_metadata(quantizer, dtype)
    context = {"is_tensor": not quantizer.internal, "requires_grad": False, **meta}
    buffers = {name: _unwritten(name, *spec) for name, spec in kind.inner_tensor_specs(quantizer, size).items()}
    return QuantizedTensorStorage.__tensor_unflatten__(buffers, context, size, None)


def _unwritten(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype != torch.uint8:
        return torch.full(shape, torch.nan, dtype=dtype)
    return torch.full(shape, numerics.NAN_E8M0 if name.endswith("scale_inv") else numerics.NAN_CODE, dtype=dtype)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """``tensor`` in FP8; into ``output``, whose buffers first follow the quantizer's usages, where it is given.

    noop: where it holds 1, ``output`` keeps its values.
    """
    if output is None:
        output = create_empty_quantized_tensor(quantizer, list(tensor.shape), tensor.dtype)
    else:
        _coerce(output, quantizer, tensor)
    if tensor.numel() and not (noop is not None and float(noop) == 1.0):
        fill(output, storages.flat(tensor).float(), quantizer)
    return output


def _coerce(output: Any, quantizer: Any, tensor: Tensor) -> None:
    """Adds the buffers that the quantizer's usages ask for, drops the others; keeps those that are there."""
    wanted = create_empty_quantized_tensor(quantizer, list(tensor.shape), tensor.dtype)
    for name, _ in wanted._INNER_TENSORS:
        new, old = getattr(wanted, name), getattr(output, name)
        if new is None or old is None:
            setattr(output, name, new)
        elif new.shape != old.shape:
            raise RuntimeError(f"te_cpu: expected {name} of shape {tuple(new.shape)}, got {tuple(old.shape)}")
    output._fp8_dtype = quantizer.dtype
    for name in ("_transpose_invalid", "_with_gemm_swizzled_scales"):
        if hasattr(wanted, name):
            setattr(output, name, getattr(wanted, name))


def fill(output: Any, y: Tensor, quantizer: Any) -> None:
    """Writes ``y`` (fp32, [M, K]) into ``output`` as the quantizer's kernel does, its amax included."""
    name = type(quantizer).__name__
    if name == "Float8Quantizer":
        quantizer.amax.copy_(torch.maximum(quantizer.amax, fp8.amax_of(y)))  # atomic max: it never shrinks here
        storages.fill_by_tensor(output, y, quantizer.scale)
    elif name == "Float8CurrentScalingQuantizer":
        storages.fill_by_tensor(output, y, _current_scale(y, quantizer))
    elif name == "Float8BlockQuantizer":
        storages.fill_by_block(output, y, quantizer)
    elif name == "MXFP8Quantizer" and not quantizer.with_2d_quantization:
        storages.fill_mx(output, y)
    else:
        raise NotImplementedError(f"te_cpu: {quantizer} is not emulated")


def _current_scale(y: Tensor, quantizer: Any) -> Tensor:
    amax = fp8.amax_of(y)
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    form = storages.format_of(quantizer)
    return fp8.scale_of(amax, quantizer.force_pow_2_scales, quantizer.amax_epsilon, form)


def emit(y: Tensor, quantizer: Any, dtype: torch.dtype, output: Any = None) -> Any:
    """A kernel's fp32 result, cast or quantized: delayed scaling takes it as it is, other recipes in ``dtype``."""
    if quantizer is None:
        return y.to(dtype) if output is None else output.copy_(y)
    if type(quantizer).__name__ != "Float8Quantizer":
        return quantize(y.to(dtype), quantizer, output)
    if output is None:
        output = create_empty_quantized_tensor(quantizer, list(y.shape), dtype)
    fill(output, storages.flat(y), quantizer)
    return output


def dequantize(tensor: Any, otype: Any) -> Tensor:
    """The values as a plain tensor, from the row-wise half if there is one."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    has_rows = getattr(tensor, "_rowwise_data", getattr(tensor, "_data", None)) is not None
    values = storages.rowwise(tensor) if has_rows else storages.columnwise(tensor)
    return values.reshape(tensor.size()).to(TE_DType_To_Torch[otype])


def bgrad_quantize(grad: Tensor, quantizer: Any) -> list[Any]:
    """[sum over rows in grad's dtype, grad in FP8]"""
    bias_grad = storages.flat(grad).float().sum(0).to(grad.dtype)
    return [bias_grad, grad if quantizer is None else quantize(grad, quantizer)]


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """uint8 (*leading, K) to (K, *leading), into ``out`` where it is given."""
    shape = storages.transposed_shape(data.shape)
    result = storages.flat(data).T.reshape(shape)
    return result.contiguous() if out is None else out.copy_(result.view(out.shape))


def swizzle_scales_for_gemm_(tensor: Any) -> None:
    """MXFP8's scales into the GEMM's order, in place; nothing for other tensors."""
    if type(tensor).__name__ not in storages.MX or tensor._with_gemm_swizzled_scales:
        return
    for name, columnwise in (("_rowwise_scale_inv", False), ("_columnwise_scale_inv", True)):
        scales = getattr(tensor, name)
        if scales is not None:
            setattr(tensor, name, numerics.swizzled(scales, columnwise))
    tensor._with_gemm_swizzled_scales = True


EXPORTS = (
    create_empty_quantized_tensor,
    quantize,
    dequantize,
    bgrad_quantize,
    fp8_transpose,
    swizzle_scales_for_gemm_,
)
