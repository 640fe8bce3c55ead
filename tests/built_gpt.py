"""Builds GPT models with Megatron-Core on the CPU and prints what they hold and cost, for test_budget.py.

Runs in a process of its own, because Megatron's parallel state and the CPU backend are global:

    echo '[{"hidden_size": 64, ...}]' | python tests/built_gpt.py

Standard input: a JSON list of `megatron_act.budget.Shape` fields; ``"experts"`` beside them, the fields of `Experts`,
makes a mixture of experts. Standard output: a JSON list with the parameters, the
FLOPs per token that torch's counter sees (forward, forward + backward), and what Megatron itself estimates.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_act import cpu_backend

cpu_backend.install()

import torch  # noqa: E402  the backend comes first
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.activations import squared_relu  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory  # noqa: E402
from megatron.training.training import num_floating_point_operations  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megatron_act import specs  # noqa: E402
from megatron_act.budget import Shape  # noqa: E402

STOCK = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu2": squared_relu}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the layers where ``pattern`` is 1."""

    count: int = 4
    topk: int = 2
    width: int = 64
    shared_width: int = 32
    pattern: tuple[int, ...] = (0, 1)


def main() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    cases = [(fields.pop("experts", None), Shape(**fields)) for fields in json.load(sys.stdin)]
    results = [measure(shape, experts and Experts(**experts)) for experts, shape in cases]
    print(json.dumps(results))


def measure(shape: Shape, experts: Experts | None) -> dict[str, int | float]:
    model = build(shape, experts)
    args = megatron_args(shape, experts)
    forward, training = count_flops(model, shape)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward": forward,
        "training": training,
        "megatron_training": num_floating_point_operations(args, batch_size=1) / shape.seq_length,
        "megatron_state_bytes_tp2_pp2_dp4": compute_weight_and_optimizer_memory(args),
    }


def build(shape: Shape, experts: Experts | None) -> GPTModel:
    config = TransformerConfig(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        gated_linear_unit=shape.gated,
        activation_func=STOCK.get(shape.activation, F.gelu),
        bias_activation_fusion=False,
        normalization=shape.normalization,
        qk_layernorm=shape.qk_layernorm,
        add_bias_linear=shape.bias,
        add_qkv_bias=shape.qkv_bias,
        use_cpu_initialization=True,
        **(expert_settings(experts) if experts else {}),
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    if shape.activation not in STOCK:
        spec = specs.with_activation(spec, shape.activation, config)
    return GPTModel(
        config,
        spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.learned_positions or shape.seq_length,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="learned_absolute" if shape.learned_positions else "rope",
    )


def expert_settings(experts: Experts) -> dict[str, Any]:
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.topk,
        "moe_ffn_hidden_size": experts.width,
        "moe_shared_expert_intermediate_size": experts.shared_width,
        "moe_layer_freq": list(experts.pattern),
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
    }


def count_flops(model: GPTModel, shape: Shape) -> tuple[float, float]:
    """FLOPs per token of one sequence: forward, forward + backward."""
    tokens = torch.arange(shape.seq_length)[None] % shape.vocab_size
    positions = torch.arange(shape.seq_length)[None]
    mask = torch.ones(shape.seq_length, shape.seq_length, dtype=torch.bool).triu(1)[None, None]
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens, positions, mask)
        forward = counter.get_total_flops()
        logits.square().mean().backward()
    return forward / shape.seq_length, counter.get_total_flops() / shape.seq_length


def megatron_args(shape: Shape, experts: Experts | None) -> SimpleNamespace:
    """The arguments that Megatron's own FLOP and memory estimates read; the layout concerns the latter only."""
    return SimpleNamespace(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        group_query_attention=shape.groups != shape.num_attention_heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_hidden_size,
        swiglu=shape.gated,
        seq_length=shape.seq_length,
        padded_vocab_size=shape.vocab_size,
        normalization=shape.normalization,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        data_parallel_size=4,
        world_size=16,
        expert_tensor_parallel_size=2,
        expert_model_parallel_size=1,
        use_distributed_optimizer=True,
        num_experts=experts and experts.count,
        moe_router_topk=experts and experts.topk,
        moe_layer_freq=experts and list(experts.pattern),
        moe_ffn_hidden_size=experts and experts.width,
        moe_shared_expert_intermediate_size=experts and experts.shared_width,
        moe_latent_size=None,
        mtp_num_layers=None,
        multi_latent_attention=False,
        hybrid_layer_pattern=None,
        experimental_attention_variant=None,
        attention_output_gate=False,
        add_bias_linear=shape.bias,
    )


if __name__ == "__main__":
    main()
