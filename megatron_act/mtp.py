"""Multi-token prediction layers with the model's activation.

Megatron builds them from its own stock decoder layer and ignores the layer spec that the model was given
(``megatron/training/models/gpt.py``, ``mtp_block_spec``), without a hook: ``install`` wraps that function.
"""

import copy
import functools
from typing import Any

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.utils import get_model_config

from megatron_act.activation import activations_of
from megatron_act.norms import replaced, with_sequence_parallel_norms

_installed = False


def install() -> None:
    """Makes multi-token prediction layers follow ``layer_spec``'s callables and this project's norms. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    from megatron.training.models import gpt

    original = gpt.mtp_block_spec

    @functools.wraps(original)
    def mtp_block_spec(config: Any, transformer_layer_spec: Any, vp_stage: int | None = None) -> Any:
        block = original(config, transformer_layer_spec, vp_stage=vp_stage)
        if block is None:
            return None
        block = copy.copy(block)
        block.layer_specs = [_placed(layer, config) for layer in block.layer_specs]
        return block

    gpt.mtp_block_spec = mtp_block_spec


def _placed(spec: Any, config: Any) -> Any:
    """One prediction layer's spec: norms for sequence parallelism, the activation in its transformer layer."""
    spec, parts = copy.copy(spec), copy.copy(spec.submodules)
    if config.transformer.sequence_parallel:
        parts.enorm, parts.hnorm, parts.layer_norm = map(replaced, (parts.enorm, parts.hnorm, parts.layer_norm))
        parts.mtp_model_layer = with_sequence_parallel_norms(parts.mtp_model_layer, config.transformer, one_layer=True)
    place = getattr(config.transformer_layer_spec, "place", None)  # only layer_spec's callables have it
    if place:
        parts.mtp_model_layer = place(parts.mtp_model_layer, config.transformer)
    spec.submodules = parts
    return spec


def number_layers(models: list[Any]) -> list[Any]:
    """A post-wrap hook: prediction layers count on from the decoder's last layer (Megatron starts at 1 again)."""
    for layer in (module for model in models for module in model.modules()):
        if isinstance(layer, MultiTokenPredictionLayer):
            for activation in activations_of(layer):
                activation.layer_number = get_model_config(models[0]).num_layers + layer.layer_number
    return models
