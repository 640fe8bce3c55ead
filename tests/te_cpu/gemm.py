"""``tex.generic_gemm``: D = op(B) op(A), row-major, fp32 sums over operands that are dequantized exactly.

    op(A) = A^T if transa else A, from A's row-wise half if transa, else from its column-wise half
    op(B) = B^T if transb else B, from B's column-wise half if transb, else from its row-wise half

which is TE's choice of operands: on Hopper every FP8 GEMM is TN, and the column-wise half of a tensor with one scale is
its transposed copy; on 10.0 there is no such copy and the row-wise half serves. What cuBLAS or TE refuses raises here.
"""

from typing import Any

import torch
from torch import Tensor

from te_cpu import quantize, storages


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """[D, bias gradient, None, None]; arguments as in TE's binding.

    Args:
        D: written to, or added to if ``accumulate``; without it a new tensor of ``output_dtype``, or of the
            ``quantizer``.
        bias: added to the result, or if ``grad`` only a request for the sum of B over its rows.
    """
    if gelu or comm_overlap is not None:
        raise NotImplementedError("te_cpu: GEMMs with GELU or with communication are not emulated")
    left, result = multiply(A, transa, B, transb)
    result = alpha * result
    if bias is not None and not grad:
        result = result + bias.float()
    bias_grad = left.sum(0) if bias is not None and grad else None
    out_dtype = _torch_dtype(output_dtype, A)
    if D is None:
        shape = (B.size()[-1],) if transb else tuple(B.size()[:-1])
        D = quantize.emit(result.reshape(*shape, -1), quantizer, out_dtype)
    else:
        D.copy_((D.float() * (1.0 if beta is None else beta) if accumulate else 0.0) + result)
    return [D, None if bias_grad is None else bias_grad.to(out_dtype), None, None]


def multiply(A: Any, transa: bool, B: Any, transb: bool) -> tuple[Tensor, Tensor]:
    """(B dequantized, op(B) op(A)) in fp32."""
    _check(A, transa, B, transb)
    left, right = _operand(B, not transb), _operand(A, transa)
    return left, (left.T if transb else left) @ (right.T if transa else right)


def _torch_dtype(output_dtype: Any, A: Any) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return A.dtype if output_dtype is None else TE_DType_To_Torch[output_dtype]


def _operand(tensor: Any, rowwise: bool) -> Tensor:
    """fp32 [rows, columns] of the half that the GEMM reads."""
    if not storages.is_quantized(tensor):
        return storages.flat(tensor).float()
    return storages.rowwise(tensor) if rowwise or _only_rows(tensor) else storages.columnwise(tensor)


def _only_rows(tensor: Any) -> bool:
    """Whether the device multiplies any layout and TE therefore keeps no transposed copy."""
    from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

    by_tensor = type(tensor).__name__ in storages.SCALED_BY_TENSOR
    return by_tensor and tensor._data is not None and is_non_tn_fp8_gemm_supported()


def _check(A: Any, transa: bool, B: Any, transb: bool) -> None:
    """What TE and cuBLAS demand of FP8 operands.

    Raises:
        RuntimeError: one is FP8 and the other is not, of another kind, both e5m2, or of unfit dimensions.
    """
    if not storages.is_quantized(A) and not storages.is_quantized(B):
        return
    kinds = [_kind(A), _kind(B)]
    if kinds[0] != kinds[1]:
        raise RuntimeError(f"te_cpu: expected two operands of one kind, got {kinds[0]} and {kinds[1]}")
    if storages.format_of(A) == storages.format_of(B) == "e5m2":
        raise RuntimeError("te_cpu: expected an e4m3 operand, got e5m2 twice: cuBLAS has no such product")
    columns, rows = (_dims(A)[0] if transa else _dims(A)[1]), (_dims(B)[1] if transb else _dims(B)[0])
    inner = _dims(A)[1] if transa else _dims(A)[0]
    if inner % 16 and not (_only_rows(A) and not transa):
        raise RuntimeError(f"te_cpu: expected an inner dimension that is a multiple of 16, got {inner}: pad it")
    if kinds[0] == storages.SCALED_BY_BLOCK and (columns % 8 or (rows % 8 and not B._is_2D_scaled)):
        raise RuntimeError(f"te_cpu: expected outer dimensions that are multiples of 8, got {columns} and {rows}")


def _kind(tensor: Any) -> tuple[str, ...]:
    kinds = (storages.SCALED_BY_TENSOR, storages.SCALED_BY_BLOCK, storages.MX)
    return next((kind for kind in kinds if type(tensor).__name__ in kind), (type(tensor).__name__,))


def _dims(tensor: Any) -> tuple[int, int]:
    size = torch.Size(tensor.size())
    return size.numel() // size[-1], size[-1]


EXPORTS = (generic_gemm,)
