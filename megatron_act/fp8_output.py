"""``--activation-fp8-output``: the activation writes fc2's input in FP8, and fc2 casts nothing.

Without it fc2 (Transformer Engine's Linear) reads the bf16 activation again to quantize it: 8 to 10 bytes per element
where 4 to 6 do. fc2's own quantizer decides what is written, and its bookkeeping stays Transformer Engine's: delayed
scaling's amax goes into fc2's history, which is reduced and turned into the next scale as ever.

Two kinds of calls get bf16 instead, which is always right. Passing ones, in silence: no gradients, no FP8 context
(Megatron's bf16 first and last layers), the first call (fc2 has no quantizer yet), and activations that will be or are
being recomputed: of delayed scaling fc2 swaps in the first pass's scale only after the activation has run, and a
checkpoint that is not reentrant needs equal kinds of tensors in both passes. And lasting ones, whose reason is logged
once. Source: transformer_engine/pytorch/module/{linear,base}.py, quantization.py (2.20).
"""

from typing import Any

import torch
from torch import Tensor

from megatron_act import te, te_buffers
from megatron_act.fp8_options import OUTPUT_FLAG
from megatron_act.once import log_once


def quantizer_of(fc2: Any, x: Tensor, weights: Tensor | None) -> Any | None:
    """A copy of the quantizer with which ``fc2`` would quantize this input now, or None: then it wants bf16.

    Args:
        fc2: the linear layer that takes the activation's result.
        x: the activation's input, (..., ffn_hidden_size / tp).
        weights: factors of routed experts' tokens, or None.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if why := te.problem() or te.version_problem() or _unfit_layer(fc2) or unfit_call(weights):
        log_once(f"{OUTPUT_FLAG}: {why}; the activation stays bf16 there")
        return None
    if not runs_fp8(fc2) or te.parts().is_fp8_activation_recompute_enabled():
        return None
    if te.parts().in_fp8_activation_recompute_phase():
        return None
    quantizer = fc2.quantizers["scaling_fwd"][te.parts().FP8FwdTensorIdx.GEMM1_INPUT]
    if why := unfit_recipe() or te_buffers.misfit(quantizer, x):
        log_once(f"{OUTPUT_FLAG}: {why}; the activation stays bf16 there")
        return None
    return configured(quantizer, columnwise=fc2.weight.requires_grad)


def configured(quantizer: Any, columnwise: bool) -> Any:
    """A copy that makes tensors for autograd: the original belongs to fc2, which sets it as it needs."""
    copy = quantizer.copy()
    copy.internal = False
    copy.optimize_for_gemm = False
    copy.set_usage(rowwise=True, columnwise=columnwise)
    return copy


def _unfit_layer(fc2: Any) -> str | None:
    if not isinstance(fc2, te.parts().Linear):
        return f"expected Transformer Engine's Linear as fc2, got {type(fc2).__name__}"
    if fc2.save_original_input:
        return "fc2 keeps its input in bf16 (save_original_input)"
    return unfit_settings(fc2)


def unfit_call(weights: Tensor | None) -> str | None:
    """Routed experts' activations stay bf16."""
    return None if weights is None else "routed experts weight their activation by token"


def unfit_settings(linear: Any) -> str | None:
    """What about a linear layer or the run keeps FP8 tensors of ours away from it, or None."""
    parts = te.parts()
    problems = (
        (getattr(linear, "te_quant_params", None) is not None, "the linear layer has a recipe of its own"),
        (parts.TEDebugState.debug_enabled, "Transformer Engine's debug mode replaces the quantizers"),
        (parts.is_cpu_offload_enabled(), "CPU offloading stores bf16 activations"),
    )
    return next((why for present, why in problems if present), None)


def runs_fp8(linear: Any) -> bool:
    """Whether the linear layer's next forward pass quantizes with the quantizers that it has."""
    state = te.parts().FP8GlobalStateManager
    if not state.is_fp8_enabled() or state.is_fp8_calibration() or not linear.fp8_initialized or not linear.training:
        return False
    recipe, known = state.get_fp8_recipe(), linear.fp8_meta.get("recipe")
    return type(recipe) is type(known) and "scaling_fwd" in linear.quantizers  # not the first call, or under another


def unfit_recipe() -> str | None:
    """Why nothing is written in the recipe in force, or None."""
    recipe = te.parts().FP8GlobalStateManager.get_fp8_recipe()
    if recipe.custom():
        return f"no kernel writes the recipe {type(recipe).__name__}"
    return "the recipe overrides the backward pass" if recipe.backward_override is not None else None
