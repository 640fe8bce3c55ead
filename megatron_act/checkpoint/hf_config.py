"""A Hugging Face ``config.json`` from Megatron's arguments; no default of transformers decides anything."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_act.checkpoint.families import Family
from megatron_act.errors import UserError
from megatron_act.hf_args import LLAMA3_BOUNDS

STOCK_FACTOR = 8.0  # of GPTModelConfig; megatron-core 0.19's gpt_config_from_args never passes the flag on

# Hugging Face's key: Megatron's argument
SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
}
AUTO_MAP = {
    "AutoConfig": "configuration_megatron_act.MegatronActConfig",
    "AutoModel": "modeling_megatron_act.MegatronActModel",
    "AutoModelForCausalLM": "modeling_megatron_act.MegatronActForCausalLM",
}


def rope_parameters(args: Namespace) -> dict[str, Any]:
    """transformers' ``rope_parameters``, always written: Apertus would assume llama3 scaling without them.

    Raises:
        UserError: two kinds of scaling at once, or a scaling factor that the run did not train with.
    """
    theta = {"rope_theta": float(args.rotary_base)}
    interpolation = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if not getattr(args, "use_rope_scaling", False):
        scaled = {"rope_type": "linear", "factor": float(interpolation)} if interpolation else {"rope_type": "default"}
        return {**scaled, **theta}
    if interpolation:
        raise UserError(
            "export: expected one rotary scaling, got --use-rope-scaling and --rotary-seq-len-interpolation-factor"
        )
    return {"rope_type": "llama3", "factor": _llama3_factor(args), **LLAMA3_BOUNDS, **theta}


def _llama3_factor(args: Namespace) -> float:
    factor = float(getattr(args, "rope_scaling_factor", STOCK_FACTOR))
    if factor != STOCK_FACTOR and not hasattr(args, "activation"):  # our entry point's own argument
        raise UserError(
            f"export: expected --rope-scaling-factor {STOCK_FACTOR:g} of Megatron-LM's own entry point, got "
            f"{factor:g}: megatron-core 0.19 drops the flag there and trains with {STOCK_FACTOR:g}; train with ours"
        )
    return factor


def config(
    family: Family, args: Namespace, vocab_size: int, dtype: str, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        family: of `families.choose`.
        args: Megatron's saved arguments.
        vocab_size: rows of the exported embedding.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of the exported weights.
        tokens: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``; None where there is none.
    """
    sizes = {key: getattr(args, argument) for key, argument in SIZES.items()}
    rope = rope_parameters(args)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **({"auto_map": AUTO_MAP} if family.ships_code else {}),
        "vocab_size": vocab_size,
        **sizes,
        **family.config,
        **_experts(args),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        # the same for readers older than transformers 5, whose Apertus too assumes llama3 scaling if nothing is said
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None
        if rope["rope_type"] == "default"
        else {k: v for k, v in rope.items() if k != "rope_theta"},
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "use_cache": True,
        "dtype": dtype,
        **tokens,
    }


def _experts(args: Namespace) -> dict[str, Any]:
    """Megatron's router: softmax over the chosen logits (Mixtral's), or before the choice (``pre_softmax``)."""
    if not getattr(args, "num_experts", None):
        return {}
    return {
        "num_experts": args.num_experts,
        "num_experts_per_tok": args.moe_router_topk,
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "norm_topk_prob": not getattr(args, "moe_router_pre_softmax", False),
        "routed_scaling_factor": getattr(args, "moe_router_topk_scaling_factor", None) or 1.0,
        "activation_per_expert": bool(getattr(args, "activation_per_expert", False)),
    }
