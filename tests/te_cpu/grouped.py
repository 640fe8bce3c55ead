"""``transformer_engine_torch``'s functions for experts: a GEMM each, their inputs quantized or padded together."""

from typing import Any

from torch import Tensor

from te_cpu import gemm, quantize


def te_general_grouped_gemm(
    A: list[Any],
    transa: bool,
    B: list[Any],
    transb: bool,
    D: list[Tensor],
    out_dtype: Any,
    m_splits: list[int],
    bias: list[Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: list[Tensor],
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[Tensor]:
    """D[i] = op(B[i]) op(A[i]) (``gemm.py``), or added to it; ``single_output``: each in its rows of D[0].

    Args:
        bias: added, or if ``grad`` filled with the sums of B[i] over its rows; empty tensors where there is none.
    """
    if any(tensor.numel() for tensor in pre_gelu_out):
        raise NotImplementedError("te_cpu: grouped GEMMs with GELU are not emulated")
    outputs = D[0].split(m_splits) if single_output else D
    for a, b, out, offset in zip(A, B, outputs, bias, strict=True):
        if out.numel():
            _one(a, transa, b, transb, out, offset, grad, accumulate)
    return bias


def _one(a: Any, transa: bool, b: Any, transb: bool, out: Tensor, bias: Tensor, grad: bool, accumulate: bool) -> None:
    if not b.size().numel():  # an expert without tokens: its weight gradient
        if not accumulate:
            out.zero_()
        bias.zero_()
        return
    left, result = gemm.multiply(a, transa, b, transb)
    if bias.numel() and grad:
        bias.copy_(left.sum(0))
    elif bias.numel():
        result = result + bias.float()
    out.copy_(out.float() + result if accumulate else result)


def split_quantize(
    tensor: Tensor, split_sections: list[int], quantizer_list: list[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    """The rows of each section in FP8, by the quantizer of each."""
    return multi_tensor_quantize(list(tensor.split(split_sections)), quantizer_list)


def multi_tensor_quantize(tensor_list: list[Tensor], quantizer_list: list[Any]) -> list[Any]:
    """Each tensor in FP8, by its quantizer."""
    return [quantize.quantize(part, quantizer) for part, quantizer in zip(tensor_list, quantizer_list, strict=True)]


def fused_multi_row_padding(input: Tensor, output: Tensor, rows: list[int], padded: list[int]) -> None:
    """The sections of ``rows`` rows into those of ``padded`` rows, zeros after them."""
    output.zero_()
    for source, target in zip(input.split(rows), output.split(padded), strict=True):
        target[: source.shape[0]].copy_(source)


def fused_multi_row_unpadding(input: Tensor, output: Tensor, padded: list[int], rows: list[int]) -> None:
    """``fused_multi_row_padding`` undone."""
    for source, target in zip(input.split(padded), output.split(rows), strict=True):
        target.copy_(source[: target.shape[0]])


EXPORTS = (
    te_general_grouped_gemm,
    split_quantize,
    multi_tensor_quantize,
    fused_multi_row_padding,
    fused_multi_row_unpadding,
)
