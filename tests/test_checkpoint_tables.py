"""The tables of the export: every argument that no family can express is refused, fused tensors are cut by hand."""

from argparse import Namespace

import pytest
import torch

from megatron_act.checkpoint import families, hf_config, requirements
from megatron_act.checkpoint.picks import PICKS, Geometry, cut, place
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

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


UNLIKE_EXPERTS = {
    "moe_layer_freq": [0, 1],
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 2,
    "moe_router_load_balancing_type": "sinkhorn",
    "moe_router_force_load_balancing": True,
    "moe_shared_expert_intermediate_size": 8,
    "moe_expert_capacity_factor": 1.0,
    "moe_apply_probs_on_input": True,
    "moe_latent_size": 4,
    "moe_router_force_biased": 2.0,
    "moe_expert_rank_capacity_factor": 1.0,
}


@pytest.mark.parametrize(
    ("activation", "qk_norm", "architecture"),
    [
        ("xielu", True, "ApertusForCausalLM"),
        ("swiglu", True, "Qwen3ForCausalLM"),
        ("swiglu", False, "LlamaForCausalLM"),
        ("relu2", False, "ArceeForCausalLM"),
        ("relu2", True, "MegatronActForCausalLM"),
        ("xielu", False, "MegatronActForCausalLM"),  # Arcee would round the scalars to bf16
        *((name, True, "MegatronActForCausalLM") for name in kernels.names() if name != "xielu"),
    ],
)
def test_choice(activation: str, qk_norm: bool, architecture: str) -> None:
    assert families.choose(Namespace(**ARGS, qk_layernorm=qk_norm), activation).architecture == architecture


def test_choice_by_name() -> None:
    plain = Namespace(**ARGS)
    arcee = families.choose(plain, "xielu", "arcee")
    assert arcee is families.ARCEE_XIELU and "bf16" in families.ARCEE_NOTE
    assert arcee.constants == {"mlp.act_fn.beta": 0.5, "mlp.act_fn.eps": -1e-6}
    assert families.choose(Namespace(**ARGS, qk_layernorm=True), "xielu", "megatron_act").ships_code
    with pytest.raises(UserError, match=r"--family apertus: expected a model that it can express, got xielu without"):
        families.choose(plain, "xielu", "apertus")
    with pytest.raises(UserError, match=r"--family megatron_act: .*got swiglu without --qk-layernorm"):
        families.choose(plain, "swiglu", "megatron_act")


def test_models_that_nothing_expresses() -> None:
    with pytest.raises(UserError, match=r"got quick_geglu without --qk-layernorm: they have Apertus.*\(xielu w"):
        families.choose(Namespace(**ARGS), "quick_geglu")
    with pytest.raises(UserError, match=r"got swiglu without --qk-layernorm and --num-experts: they have"):
        families.choose(Namespace(**ARGS, num_experts=8), "swiglu")


def test_heads_that_do_not_divide_the_hidden_size() -> None:
    """transformers' Llama and Arcee configs refuse them, whatever head_dim says."""
    odd = Namespace(**ARGS | {"num_attention_heads": 3})
    for activation, architecture in (("swiglu", "Llama"), ("relu2", "Arcee")):
        with pytest.raises(UserError, match=f"{architecture}ForCausalLM cannot express 3 heads in --hidden-size 8"):
            families.choose(odd, activation)
    assert families.choose(odd, "relu2", "megatron_act").ships_code


@pytest.mark.parametrize("name", [name for name, *_ in requirements.REQUIRED_OF_EXPERTS])
def test_arguments_of_experts_that_no_family_expresses(name: str) -> None:
    args = ARGS | {"num_experts": 4, "moe_layer_freq": 1, "moe_router_load_balancing_type": "none"}
    assert families.choose(Namespace(**args), "xielu").ships_code
    with pytest.raises(UserError, match=rf"MegatronActForCausalLM cannot express --{name.replace('_', '-')}.*it needs"):
        families.choose(Namespace(**args | {name: UNLIKE_EXPERTS[name]}), "xielu")


@pytest.mark.parametrize("name", [name for name, *_ in requirements.REQUIRED])
def test_arguments_that_no_family_expresses(name: str) -> None:
    args = Namespace(**ARGS | {name: UNLIKE[name], "qk_layernorm": True})
    with pytest.raises(UserError, match=rf"ApertusForCausalLM cannot express --{name.replace('_', '-')}.*it needs"):
        families.choose(args, "xielu")


def test_rope() -> None:
    assert hf_config.rope_parameters(Namespace(rotary_base=5e5)) == {"rope_type": "default", "rope_theta": 5e5}
    linear = hf_config.rope_parameters(Namespace(rotary_base=1e4, rotary_seq_len_interpolation_factor=4))
    assert linear == {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    for factor in (8.0, 32.0, 1.5):
        llama3 = {"rotary_base": 5e5, "use_rope_scaling": True, "rope_scaling_factor": factor, "activation": None}
        wanted = {"rope_type": "llama3", "factor": factor, "rope_theta": 5e5, "low_freq_factor": 1.0}
        wanted |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        assert hf_config.rope_parameters(Namespace(**llama3)) == wanted
    with pytest.raises(UserError, match="expected one rotary scaling, got"):
        hf_config.rope_parameters(Namespace(**llama3, rotary_seq_len_interpolation_factor=4))


def test_rope_factor_of_megatrons_own_entry_point() -> None:
    """It takes the flag and trains with 8, so that any other number in its checkpoints is not the model's."""
    theirs = {"rotary_base": 1e4, "use_rope_scaling": True}
    assert hf_config.rope_parameters(Namespace(**theirs, rope_scaling_factor=8.0))["factor"] == 8.0
    with pytest.raises(UserError, match=r"--rope-scaling-factor 8 of Megatron-LM's own entry point, got 32: .*drops"):
        hf_config.rope_parameters(Namespace(**theirs, rope_scaling_factor=32.0))


def test_config_names_everything_that_a_default_could_change() -> None:
    args = Namespace(**ARGS, qk_layernorm=True)
    tokens = {"bos_token_id": None, "eos_token_id": 5, "pad_token_id": None}
    config = hf_config.config(families.APERTUS, args, 100, "bfloat16", tokens)
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


def test_config_of_experts() -> None:
    experts = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 6, "moe_router_pre_softmax": True}
    args = Namespace(**ARGS, **experts, moe_router_topk_scaling_factor=2.5, activation_per_expert=True)
    config = hf_config.config(families.choose(args, "crrelu"), args, 100, "float32", {})
    wanted = {
        "activation": "crrelu",
        "qk_norm": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
        "activation_per_expert": True,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_picks_of_fused_tensors() -> None:
    """4 query heads in 2 groups of head size 3: per group rows are q0 q1 k v. Both directions."""
    geometry = Geometry(num_attention_heads=4, num_query_groups=2, kv_channels=3, vocab_size=5)
    qkv = torch.arange(24.0)[:, None].expand(24, 2).contiguous()
    rows = {name: cut(name, qkv, geometry)[:, 0].tolist() for name in ("query", "key", "value")}
    assert rows["query"] == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert rows["key"] == [6, 7, 8, 18, 19, 20]
    assert rows["value"] == [9, 10, 11, 21, 22, 23]
    fc1, vocabulary = torch.arange(6.0)[:, None], torch.arange(8.0)[:, None]
    assert cut("gate", fc1, geometry)[:, 0].tolist() == [0, 1, 2]
    assert cut("up", fc1, geometry)[:, 0].tolist() == [3, 4, 5]
    assert cut("vocabulary", vocabulary, geometry)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(cut("whole", fc1, geometry), fc1)
    for picks, whole in ((("query", "key", "value"), qkv), (("gate", "up"), fc1), (("whole",), fc1)):
        again = torch.full_like(whole, -1.0)
        for pick in picks:
            place(pick, again, geometry, cut(pick, whole, geometry))
        assert torch.equal(again, whole)
    padded = torch.zeros(8, 1)
    place("vocabulary", padded, geometry, vocabulary[:5])
    assert padded[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert set(PICKS) == {"whole", "query", "key", "value", "gate", "up", "vocabulary"}
