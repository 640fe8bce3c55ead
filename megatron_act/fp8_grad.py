"""``--activation-fp8-grad``: the activation's backward pass writes the gradient that fc1 reads in FP8.

fc1's backward pass takes a quantized gradient as it is (``grad_output_preprocess``, transformer_engine/pytorch/module/
base.py 2.20) and quantizes any other: 10 bytes per element for dact and cast, 6 for one kernel. fc1's own quantizer
decides, and delayed scaling's amax goes into fc1's history. Where it cannot be, the gradient stays bf16.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_act import fp8_output, te, te_buffers
from megatron_act.fp8_options import GRAD_FLAG
from megatron_act.once import log_once


def quantizer_of(fc1: Any, x: Tensor, weights: Tensor | None) -> Any | None:
    """A copy of the quantizer with which ``fc1`` would quantize x's gradient, or None: then it wants bf16.

    Args:
        fc1: the linear layer that has just made ``x``.
        x: fc1's output.
        weights: factors of routed experts' tokens, or None.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return None
    if why := te.problem() or te.version_problem() or _unfit_layer(fc1) or fp8_output.unfit_call(weights):
        log_once(f"{GRAD_FLAG}: {why}; the gradient stays bf16 there")
        return None
    if not fp8_output.runs_fp8(fc1):
        return None
    quantizer = fc1.quantizers["scaling_bwd"][te.parts().FP8BwdTensorIdx.GRAD_OUTPUT1]
    if why := fp8_output.unfit_recipe() or te_buffers.misfit(quantizer, x, gradient=True):
        log_once(f"{GRAD_FLAG}: {why}; the gradient stays bf16 there")
        return None
    return fp8_output.configured(quantizer, columnwise=fc1.weight.requires_grad)


def _unfit_layer(fc1: Any) -> str | None:
    parts = te.parts()
    if not isinstance(fc1, parts.Linear | parts.LayerNormLinear):
        return f"expected Transformer Engine's linear layer as fc1, got {type(fc1).__name__}"
    if fc1.apply_bias and fc1.use_bias:
        return "fc1 adds its bias itself, whose gradient it takes from a bf16 gradient"
    return fp8_output.unfit_settings(fc1)
