"""What a Megatron model must be so that the families can express it.

Read ``REQUIRED`` as: what an argument must be, since no family can express anything else.
"""

from argparse import Namespace
from typing import Any

from megatron_act.errors import UserError

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
# the same for models with experts: softmax over logits, the k largest, no shared expert, no token dropped
REQUIRED_OF_EXPERTS: tuple[tuple[str, Any, str], ...] = (
    ("moe_layer_freq", 1, "experts in every layer (--moe-layer-freq 1)"),
    ("moe_router_score_function", "softmax", "--moe-router-score-function softmax"),
    ("moe_router_enable_expert_bias", False, "a router without --moe-router-enable-expert-bias"),
    ("moe_router_num_groups", None, "a router without --moe-router-num-groups"),
    ("moe_router_load_balancing_type", "aux_loss", "--moe-router-load-balancing-type aux_loss or none"),
    ("moe_router_force_load_balancing", False, "a router that reads its logits"),
    ("moe_router_force_biased", None, "a router without --moe-router-force-biased"),
    ("moe_shared_expert_intermediate_size", None, "routed experts only (no --moe-shared-expert-intermediate-size)"),
    ("moe_expert_capacity_factor", None, "experts that drop no token (no --moe-expert-capacity-factor)"),
    ("moe_expert_rank_capacity_factor", None, "experts that drop no token (no --moe-expert-rank-capacity-factor)"),
    ("moe_apply_probs_on_input", False, "--moe-apply-probs-on-input left out"),
    ("moe_latent_size", None, "experts of the full hidden size (no --moe-latent-size)"),
)
ALIKE = {"moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")}  # of training only
WHOLE_HEADS = (
    "LlamaForCausalLM",
    "ArceeForCausalLM",
)  # whose configs refuse a hidden size that the heads do not divide


def check_requirements(args: Namespace, architecture: str) -> None:
    """Raises UserError for the first argument that no family expresses, or not this architecture; says what would."""
    wanted = REQUIRED + (REQUIRED_OF_EXPERTS if getattr(args, "num_experts", None) else ())
    for name, value, recipe in wanted:
        got = getattr(args, name, value)
        if got not in ALIKE.get(name, (value,)):
            shown = f"--{name.replace('_', '-')} {got}"
            raise UserError(f"export: {architecture} cannot express {shown}: it needs {recipe}")
    if architecture in WHOLE_HEADS and args.hidden_size % args.num_attention_heads:
        raise UserError(
            f"export: {architecture} cannot express {args.num_attention_heads} heads in --hidden-size "
            f"{args.hidden_size}: it needs a multiple (Qwen3ForCausalLM and MegatronActForCausalLM do not)"
        )
