"""Small GPT models for the tests that compare two ways of computing one: on the CPU or on a GPU, local or TE layers."""

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_act import specs
from megatron_act.activation import activations_of

VOCAB, LENGTH = 64, 32  # tokens
# Transformer Engine keeps a norm's weights in the linear layer after it; its grouped experts keep one weight each.
CANONICAL = (
    (r"self_attention\.linear_qkv\.layer_norm_(\w+)$", r"input_layernorm.\1"),
    (r"mlp\.linear_fc1\.layer_norm_(\w+)$", r"pre_mlp_layernorm.\1"),
    (r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$", r"experts.\2.weight\1"),
)


@dataclass(frozen=True)
class Variant:
    """One way to compute a model.

    Attributes:
        engine: Transformer Engine's layers instead of Megatron's local ones.
        experts: the second of the two layers is a mixture: top 2 of 4, and a shared expert.
        grouped: its routed experts in grouped GEMMs (without ``engine``: a stand-in by plain torch).
        shift: added to every raw scalar after the weights are there.
        config: further fields of TransformerConfig.
    """

    activation: str = "xielu"
    backend: str = "auto"
    dtype: str = "float32"
    engine: bool = False
    experts: bool = False
    grouped: bool = False
    per_expert: bool = False
    learned_positions: bool = False
    shift: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)


class GroupedLinear(torch.nn.Module):
    """Transformer Engine's grouped GEMM by plain torch, with its parameters' names."""

    def __init__(self, experts: int, inputs: int, outputs: int, **_: Any) -> None:
        super().__init__()
        for number in range(experts):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.empty(outputs, inputs)))

    def forward(self, x: torch.Tensor, tokens: list[int]) -> tuple[torch.Tensor, None]:
        parts = zip(x.split(tokens), self.parameters(), strict=True)
        return torch.cat([part @ weight.T for part, weight in parts]), None


def build(variant: Variant, device: str) -> Any:
    """A GPTModel of two layers, or the Float16Module around it, with every scalar at a value of its own."""
    config = settings(variant, device)
    stock = get_gpt_decoder_block_spec(config, use_transformer_engine=variant.engine)
    if variant.grouped and not variant.engine:
        parts = stock.layer_specs[-1].submodules.mlp.keywords["submodules"]
        parts.experts = partial(TEGroupedMLP, submodules=GroupedMLPSubmodules(GroupedLinear, GroupedLinear))
    options = {"backend": variant.backend, "per_expert": variant.per_expert}
    model = GPTModel(
        config,
        specs.with_activation(stock, variant.activation, config, **options),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=False,
        position_embedding_type="learned_absolute" if variant.learned_positions else "rope",
    ).to(device)
    spread_scalars(model)
    return Float16Module(config, model) if variant.dtype == "bfloat16" else model


def settings(variant: Variant, device: str) -> TransformerConfig:
    dtype = getattr(torch, variant.dtype)
    mixture = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 48,
        "moe_shared_expert_intermediate_size": 32,
        "moe_layer_freq": [0, 1],
        "moe_grouped_gemm": variant.grouped,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.2,
        "use_cpu_initialization": device == "cpu",
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        **(mixture if variant.experts else {}),
        **variant.config,
    }
    return TransformerConfig(**fields)


@torch.no_grad()
def spread_scalars(model: Any) -> None:
    """Moves scalars off their initial values and apart from each other, so that mixing them up shows."""
    raws = [raw for module in activations_of(model) for raw in module.raw_scalars()]
    for number, raw in enumerate(raws):
        raw += 0.05 * (number + 1)


def canonical(name: str) -> str:
    """A parameter's name in a model of local layers, whatever layers it is from."""
    name = name.removeprefix("module.")
    for pattern, replacement in CANONICAL:
        name = re.sub(pattern, replacement, name)
    return name


def parameters(model: Any) -> dict[str, Any]:
    return {canonical(name): param for name, param in model.named_parameters()}


@torch.no_grad()
def copy_weights(source: Any, target: Any) -> None:
    """Gives ``target`` the weights of ``source``; both must have the same ones.

    Raises:
        ValueError: a weight that one of them lacks.
    """
    ours, theirs = parameters(target), parameters(source)
    if ours.keys() != theirs.keys():
        raise ValueError(f"expected equal weights, got {sorted(ours.keys() ^ theirs.keys())} in one model only")
    for name, param in ours.items():
        param.copy_(theirs[name])


def causal_mask(length: int, device: str) -> torch.Tensor:
    """True where attention must not look, as Megatron's local attention takes it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]


def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (batch, length, vocabulary)."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mask = causal_mask(tokens.shape[1], str(tokens.device))
    return model(tokens, positions, mask)
