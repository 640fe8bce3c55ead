"""The tables of the export: every argument that no family can express is refused, fused tensors are cut by hand."""

from argparse import Namespace

import pytest
import torch

from megatron_act.checkpoint import families
from megatron_act.checkpoint.picks import PICKS, Geometry
from megatron_act.errors import UserError

ARGS = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 12,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 3,
    "max_position_embeddings": 32,
    "layernorm_epsilon": 1e-6,
    "init_method_std": 0.02,
    "rotary_base": 10000,
    "untie_embeddings_and_output_weights": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
}
UNLIKE = {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": True,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "no_rope_freq": 4,
    "num_experts": 8,
    "multi_latent_attention": True,
    "experimental_attention_variant": "gated_delta_net",
    "attention_output_gate": True,
    "softmax_type": "learnable",
    "softmax_scale": 0.1,
    "window_size": (128, 0),
    "qk_l2_norm": True,
    "apply_residual_connection_post_layernorm": True,
    "use_mup": True,
    "mtp_num_layers": 1,
    "heterogeneous_layers_config_path": "layers.json",
    "heterogeneous_layers_config_encoded_json": "{}",
    "hybrid_layer_pattern": "M*M*",
    "is_hybrid_model": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
}


@pytest.mark.parametrize(
    ("activation", "qk_norm", "architecture"),
    [
        ("xielu", True, "ApertusForCausalLM"),
        ("swiglu", True, "Qwen3ForCausalLM"),
        ("swiglu", False, "LlamaForCausalLM"),
    ],
)
def test_choice(activation: str, qk_norm: bool, architecture: str) -> None:
    assert families.choose(Namespace(**ARGS, qk_layernorm=qk_norm), activation).architecture == architecture


@pytest.mark.parametrize(
    ("activation", "qk_norm"), [("xielu", False), ("crrelu", True), ("relu2", False), ("gelu", True)]
)
def test_models_that_transformers_lacks(activation: str, qk_norm: bool) -> None:
    trained = f"{activation} {'with' if qk_norm else 'without'} --qk-layernorm"
    with pytest.raises(UserError, match=rf"got {trained}: it has ApertusForCausalLM \(xielu with --qk-layernorm\)"):
        families.choose(Namespace(**ARGS, qk_layernorm=qk_norm), activation)


@pytest.mark.parametrize("name", [name for name, *_ in families.REQUIRED])
def test_arguments_that_no_family_expresses(name: str) -> None:
    args = Namespace(**ARGS | {name: UNLIKE[name], "qk_layernorm": True})
    with pytest.raises(UserError, match=rf"ApertusForCausalLM cannot express --{name.replace('_', '-')}.*it needs"):
        families.choose(args, "xielu")


def test_rope() -> None:
    assert families.rope_parameters(Namespace(rotary_base=5e5)) == {"rope_type": "default", "rope_theta": 5e5}
    linear = families.rope_parameters(Namespace(rotary_base=1e4, rotary_seq_len_interpolation_factor=4))
    assert linear == {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    scaled = families.rope_parameters(Namespace(rotary_base=1e4, use_rope_scaling=True, rope_scaling_factor=8.0))
    assert (scaled["rope_type"], scaled["factor"], scaled["original_max_position_embeddings"]) == ("llama3", 8.0, 8192)
    for changes in ({"rotary_seq_len_interpolation_factor": 4}, {"rope_scaling_factor": 32.0}):
        with pytest.raises(UserError, match="scaling"):
            families.rope_parameters(Namespace(rotary_base=1e4, use_rope_scaling=True, **changes))


def test_config_names_everything_that_a_default_could_change() -> None:
    args = Namespace(**ARGS, qk_layernorm=True)
    tokens = {"bos_token_id": None, "eos_token_id": 5, "pad_token_id": None}
    config = families.config(families.APERTUS, args, 100, "bfloat16", tokens)
    wanted = {
        "vocab_size": 100,
        "intermediate_size": 12,
        "num_key_value_heads": 2,
        "head_dim": 3,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "pad_token_id": None,
        "eos_token_id": 5,
        "hidden_act": "xielu",
    }
    assert {key: config[key] for key in wanted} == wanted


def test_picks_cut_fused_tensors() -> None:
    """4 query heads in 2 groups of head size 3: per group rows are q0 q1 k v."""
    geometry = Geometry(num_attention_heads=4, num_query_groups=2, kv_channels=3, vocab_size=5)
    qkv = torch.arange(24.0)[:, None].expand(24, 2)
    rows = {name: PICKS[name](qkv, geometry)[:, 0].tolist() for name in ("query", "key", "value")}
    assert rows["query"] == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert rows["key"] == [6, 7, 8, 18, 19, 20]
    assert rows["value"] == [9, 10, 11, 21, 22, 23]
    fc1 = torch.arange(6.0)[:, None]
    assert PICKS["gate"](fc1, geometry)[:, 0].tolist() == [0, 1, 2]
    assert PICKS["up"](fc1, geometry)[:, 0].tolist() == [3, 4, 5]
    assert PICKS["vocabulary"](torch.arange(8.0)[:, None], geometry)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(PICKS["whole"](fc1, geometry), fc1)
