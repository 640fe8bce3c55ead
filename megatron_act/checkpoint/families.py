"""Megatron <-> Hugging Face as tables: one family per architecture of transformers, its tensors and its config.

Names of Megatron's layer tensors follow ``decoder.layers.``; the layer norms carry the names of the linear layer behind
them, fused or not. Read ``REQUIRED`` as: what an argument must be, since no family below can express anything else.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_act.errors import UserError


@dataclass(frozen=True)
class Rule:
    """``hf`` is ``pick`` of ``megatron``; fp32 scalars stay fp32 whatever the export's dtype."""

    hf: str
    megatron: str
    pick: str = "whole"
    scalar: bool = False


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    ``layer`` rules are relative to ``model.layers.N.`` and ``decoder.layers.``; ``model`` rules are whole names.
    ``constants`` are fp32 tensors of shape () that the family stores per layer although they never change.
    """

    architecture: str
    model_type: str
    activation: str
    qk_norm: bool
    layer: tuple[Rule, ...]
    constants: Mapping[str, float]
    config: Mapping[str, Any]


MODEL = (
    Rule("model.embed_tokens.weight", "embedding.word_embeddings.weight", "vocabulary"),
    Rule("model.norm.weight", "decoder.final_layernorm.weight"),
)
UNTIED = Rule("lm_head.weight", "output_layer.weight", "vocabulary")
ATTENTION = (
    Rule("self_attn.q_proj.weight", "self_attention.linear_qkv.weight", "query"),
    Rule("self_attn.k_proj.weight", "self_attention.linear_qkv.weight", "key"),
    Rule("self_attn.v_proj.weight", "self_attention.linear_qkv.weight", "value"),
    Rule("self_attn.o_proj.weight", "self_attention.linear_proj.weight"),
)
QK_NORM = (
    Rule("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
    Rule("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
)
LLAMA_NORMS = (
    Rule("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    Rule("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)
GATED_MLP = (
    Rule("mlp.gate_proj.weight", "mlp.linear_fc1.weight", "gate"),
    Rule("mlp.up_proj.weight", "mlp.linear_fc1.weight", "up"),
    Rule("mlp.down_proj.weight", "mlp.linear_fc2.weight"),
)
XIELU_MLP = (
    Rule("mlp.up_proj.weight", "mlp.linear_fc1.weight"),
    Rule("mlp.down_proj.weight", "mlp.linear_fc2.weight"),
    Rule("mlp.act_fn.alpha_p", "mlp.activation_func.alpha_p", scalar=True),
    Rule("mlp.act_fn.alpha_n", "mlp.activation_func.alpha_n", scalar=True),
)

APERTUS = Family(
    "ApertusForCausalLM",
    "apertus",
    "xielu",
    qk_norm=True,
    layer=(
        Rule("attention_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        Rule("feedforward_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        *ATTENTION,
        *QK_NORM,
        *XIELU_MLP,
    ),
    # buffers of transformers' XIELUActivation: left out, from_pretrained leaves uninitialised memory in their place
    constants={"mlp.act_fn.beta": 0.5, "mlp.act_fn.eps": -1e-6},
    config={"hidden_act": "xielu"},
)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    "swiglu",
    qk_norm=True,
    layer=(*LLAMA_NORMS, *ATTENTION, *QK_NORM, *GATED_MLP),
    constants={},
    config={"hidden_act": "silu", "use_sliding_window": False},
)
LLAMA = Family(
    "LlamaForCausalLM",
    "llama",
    "swiglu",
    qk_norm=False,
    layer=(*LLAMA_NORMS, *ATTENTION, *GATED_MLP),
    constants={},
    config={"hidden_act": "silu", "mlp_bias": False},
)
FAMILIES = {(family.activation, family.qk_norm): family for family in (APERTUS, QWEN3, LLAMA)}

ROPE_FACTOR = 8.0  # Megatron's GPTModelConfig default; gpt_config_from_args never passes the flag on

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

# argument, the value that the families share (also assumed where a checkpoint lacks the argument), what to train with
REQUIRED: tuple[tuple[str, Any, str], ...] = (
    ("normalization", "RMSNorm", "--normalization RMSNorm"),
    ("layernorm_zero_centered_gamma", False, "RMSNorm without --apply-layernorm-1p"),
    ("add_bias_linear", False, "--disable-bias-linear"),
    ("add_qkv_bias", False, "attention without --add-qkv-bias"),
    ("position_embedding_type", "rope", "--position-embedding-type rope"),
    ("rotary_percent", 1.0, "--rotary-percent 1.0"),
    ("rotary_interleaved", False, "rotary embeddings without --rotary-interleaved"),
    ("no_rope_freq", None, "rotary embeddings in every layer (no --no-rope-freq)"),
    ("num_experts", None, "a dense model (no --num-experts)"),
    ("multi_latent_attention", False, "attention without --multi-latent-attention"),
    ("experimental_attention_variant", None, "softmax attention in every layer"),
    ("attention_output_gate", False, "attention without --attention-output-gate"),
    ("softmax_type", "vanilla", "--softmax-type vanilla"),
    ("softmax_scale", None, "the default softmax scale"),
    ("window_size", None, "full attention (no --window-size)"),
    ("qk_l2_norm", False, "--qk-layernorm in place of --qk-l2-norm"),
    ("apply_residual_connection_post_layernorm", False, "pre-norm residuals"),
    ("use_mup", False, "a model without --use-mup"),
    ("mtp_num_layers", None, "a model without --mtp-num-layers"),
    ("heterogeneous_layers_config_path", None, "layers that are all alike"),
    ("heterogeneous_layers_config_encoded_json", None, "layers that are all alike"),
    ("hybrid_layer_pattern", None, "attention layers only (no --hybrid-layer-pattern)"),
    ("is_hybrid_model", False, "attention layers only"),
    ("glu_linear_offset", 0.0, "--glu-linear-offset 0"),
    ("activation_func_clamp_value", None, "an MLP without --activation-func-clamp-value"),
)


def choose(args: Namespace, activation: str) -> Family:
    """The family of a model.

    Args:
        args: Megatron's saved arguments.
        activation: what ``scalars.trained_activation`` says.

    Raises:
        UserError: no family can represent the model; the message names what would work.
    """
    qk_norm = bool(getattr(args, "qk_layernorm", False))
    family = FAMILIES.get((activation, qk_norm))
    if family is None:
        trained = f"{activation} {'with' if qk_norm else 'without'} --qk-layernorm"
        known = "; ".join(f"{each.architecture} ({_recipe(each)})" for each in FAMILIES.values())
        raise UserError(f"export: expected a model that transformers has, got {trained}: it has {known}")
    for name, value, recipe in REQUIRED:
        got = getattr(args, name, value)
        if got != value:
            shown = f"--{name.replace('_', '-')} {got}"
            raise UserError(f"export: {family.architecture} cannot express {shown}: it needs {recipe}")
    return family


def _recipe(family: Family) -> str:
    return f"{family.activation} {'with' if family.qk_norm else 'without'} --qk-layernorm"


def rope_parameters(args: Namespace) -> dict[str, Any]:
    """transformers' ``rope_parameters``, always written: Apertus would assume llama3 scaling without them.

    Raises:
        UserError: two kinds of scaling at once, or a scaling factor that Megatron did not train with.
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
    if getattr(args, "rope_scaling_factor", ROPE_FACTOR) != ROPE_FACTOR:
        raise UserError(
            f"export: expected --rope-scaling-factor {ROPE_FACTOR:g}, got {args.rope_scaling_factor:g}: megatron-core "
            f"0.19 drops that flag and trains with {ROPE_FACTOR:g}, so that the checkpoint does not say which is meant"
        )
    # the constants of Megatron's RotaryEmbedding
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": ROPE_FACTOR, **bounds, **theta}


def config(
    family: Family, args: Namespace, vocab_size: int, dtype: str, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        family: of `choose`.
        args: Megatron's saved arguments.
        vocab_size: rows of the exported embedding.
        dtype: ``float32`` or ``bfloat16``, of the exported weights.
        tokens: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``; None where there is none.
    """
    sizes = {key: getattr(args, argument) for key, argument in SIZES.items()}
    rope = rope_parameters(args)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        **sizes,
        **family.config,
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
