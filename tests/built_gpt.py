"""Builds GPT models with Megatron-Core on the CPU and prints what they hold and cost, for test_budget.py.

Runs in a process of its own, because Megatron's parallel state and the CPU backend are global:

    echo '[{"hidden_size": 64, ...}]' | python tests/built_gpt.py

Standard input: a JSON list of `megatron_act.budget.Shape` fields. Standard output: a JSON list with the parameters, the
FLOPs per token that torch's counter sees (forward, forward + backward), and what Megatron itself estimates.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_act import cpu_backend

cpu_backend.install()

import torch  # noqa: E402  the backend comes first
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.activations import squared_relu  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory  # noqa: E402
from megatron.training.training import num_floating_point_operations  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megatron_act import specs  # noqa: E402
from megatron_act.budget import Shape  # noqa: E402

STOCK = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu2": squared_relu}


def main() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    shapes = [Shape(**fields) for fields in json.load(sys.stdin)]
    results = [measure(shape) for shape in shapes]
    print(json.dumps(results))


def measure(shape: Shape) -> dict[str, int | float]:
    model = build(shape)
    args = megatron_args(shape)
    forward, training = count_flops(model, shape)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "forward": forward,
        "training": training,
        "megatron_training": num_floating_point_operations(args, batch_size=1) / shape.seq_length,
        "megatron_state_bytes_tp2_pp2_dp4": compute_weight_and_optimizer_memory(args),
    }


def build(shape: Shape) -> GPTModel:
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
    )
    spec = get_gpt_layer_local_spec(qk_layernorm=shape.qk_layernorm, normalization=shape.normalization)
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


def megatron_args(shape: Shape) -> SimpleNamespace:
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
        num_experts=None,
        mtp_num_layers=None,
        moe_ffn_hidden_size=None,
        moe_latent_size=None,
        moe_shared_expert_intermediate_size=None,
        multi_latent_attention=False,
        hybrid_layer_pattern=None,
        experimental_attention_variant=None,
        attention_output_gate=False,
    )


if __name__ == "__main__":
    main()
