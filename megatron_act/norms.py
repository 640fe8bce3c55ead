"""Norms for Megatron's local layers under ``--sequence-parallel``, where its own wrapper of torch's norms refuses.

Under sequence parallelism each tensor-parallel rank normalises its slice of the sequence, so the gradient of a norm's
weight is a partial sum. Megatron's ``finalize_model_grads`` sums it over the tensor-parallel group for parameters that
carry ``sequence_parallel = True``; these norms are torch's, with that mark. The norms of queries and keys see all
positions but only the rank's own heads; Megatron finds and sums those by name, so they go without the mark.
"""

import copy
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

_KINDS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


def torch_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
    """torch's norm over the last dimension (Megatron's norm builder interface), of ``config.normalization``'s kind.

    Raises:
        ValueError: options that torch's norms do not have.
    """
    if config.normalization not in _KINDS:
        raise ValueError(f"--normalization: expected {' or '.join(_KINDS)}, got {config.normalization}")
    if config.layernorm_zero_centered_gamma or config.persist_layer_norm:
        raise ValueError("torch's norms: remove --apply-layernorm-1p, and give --no-persist-layer-norm")
    return _KINDS[config.normalization](hidden_size, eps=eps)


def sequence_parallel_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: Any
) -> torch.nn.Module:
    """``torch_norm`` on a slice of the sequence: its parameters' gradients are summed by Megatron."""
    norm = torch_norm(config, hidden_size, eps, **options)
    for param in norm.parameters():
        param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def with_sequence_parallel_norms(
    spec: Any, config: TransformerConfig, vp_stage: int | None = None, one_layer: bool = False
) -> Any:
    """A copy of a layer or block spec whose torch norms work under sequence parallelism.

    Args:
        spec: Megatron's spec of a layer or a block; one without torch norms (Transformer Engine) comes back as it is.
        config: the configuration that the model will be built with.
        vp_stage: the virtual pipeline stage that the spec is for.
        one_layer: the spec is for a single layer outside the decoder: return a layer spec.

    Returns:
        A block spec where a torch norm had to be replaced: a layer spec cannot name the final norm.
    """
    if not config.sequence_parallel:
        return spec
    if isinstance(spec, TransformerBlockSubmodules):
        layers = [_layer(layer) for layer in spec.layer_specs or []]
        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=replaced(spec.layer_norm))
    layer = _layer(spec)
    if layer is spec or one_layer:
        return layer
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=sequence_parallel_norm)


def replaced(norm: Any) -> Any:
    """A norm builder for the hidden states that works under sequence parallelism."""
    return sequence_parallel_norm if norm is WrappedTorchNorm else norm


def _layer(spec: ModuleSpec) -> ModuleSpec:
    parts = spec.submodules
    if WrappedTorchNorm not in (parts.input_layernorm, parts.pre_mlp_layernorm):
        return spec
    spec, parts = copy.copy(spec), copy.copy(parts)
    parts.input_layernorm, parts.pre_mlp_layernorm = (
        replaced(parts.input_layernorm),
        replaced(parts.pre_mlp_layernorm),
    )
    parts.self_attention = _attention(parts.self_attention)
    spec.submodules = parts
    return spec


def _attention(spec: ModuleSpec) -> ModuleSpec:
    spec, parts = copy.copy(spec), copy.copy(spec.submodules)
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(parts, name, None) is WrappedTorchNorm:
            setattr(parts, name, torch_norm)
    spec.submodules = parts
    return spec


def stock_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's own layers for a GPT model configuration (``transformer_layer_spec``), with norms that work."""
    from megatron.training.models.gpt import default_layer_spec

    return with_sequence_parallel_norms(default_layer_spec(config, vp_stage), config.transformer, vp_stage)
