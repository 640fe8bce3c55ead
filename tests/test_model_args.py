"""Model shapes read from flags and from Hugging Face config.json files."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_act import hf_args, model_args
from megatron_act.budget import parameters
from megatron_act.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SCALARS = {"xielu": 2, "crrelu": 1, "relu2": 0, "gelu": 0}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 320,
}


def shape_of(name):
    return model_args.shape(model_args.read(ROOT / "configs" / name), SCALARS)


@pytest.mark.parametrize(
    ("family", "changes", "activation"),
    [
        ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}, "swiglu"),
        ("mistral", {"num_key_value_heads": 1, "head_dim": 24}, "swiglu"),
        ("qwen2", {"num_key_value_heads": 2}, "swiglu"),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 32}, "swiglu"),
        ("arcee", {"num_key_value_heads": 4}, "relu2"),
        ("apertus", {"num_key_value_heads": 2}, "xielu"),
    ],
)
def test_hf_config_counts_equal_the_transformers_model(tmp_path, family, changes, activation):
    config = AutoConfig.for_model(family, **SMALL, **changes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = model_args.shape(hf_args.from_hf(tmp_path), SCALARS)
    assert shape.activation == activation
    assert parameters(shape).total == sum(p.numel() for p in model.parameters())


def test_hf_apertus_8b_equals_our_config(tmp_path):
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = AutoConfig.for_model("apertus", intermediate_size=21504, vocab_size=131072, **sizes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ours = shape_of("apertus-8b-xielu.yaml")
    assert parameters(ours).total == sum(p.numel() for p in model.parameters())
    assert parameters(model_args.shape(hf_args.from_hf(tmp_path), SCALARS)) == parameters(ours)


def test_megatron_defaults_apply_to_absent_flags():
    flags = {"--hidden-size": 64, "--num-layers": 1, "--num-attention-heads": 4, "--ffn-hidden-size": 96}
    shape = model_args.shape({**flags, "--max-position-embeddings": 8}, SCALARS)
    assert (shape.activation, shape.normalization, shape.bias) == ("gelu", "LayerNorm", True)
    assert (shape.tied_embeddings, shape.learned_positions, shape.groups) == (True, 8, 4)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"--swiglu": True}, "swiglu"),
        ({"--squared-relu": True}, "relu2"),
        ({"--activation": "xielu"}, "xielu"),
        ({}, "gelu"),
    ],
)
def test_activation_of_flags(flags, name):
    assert model_args.activation({**flags, "--swiglu": flags.get("--swiglu", False)}) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected a mapping MODEL_ARGS of '--flag: value' pairs, got none"),
        ("MODEL_ARGS:\n", "expected a mapping MODEL_ARGS"),
        ("MODEL_ARGS: {num-layers: 3}\n", "expected flags such as --hidden-size under MODEL_ARGS, got 'num-layers'"),
        ("MODEL_ARGS: [1\n", "expected YAML, got"),
        ("MODEL_ARGS: {--swiglu: true, --activation: xielu}\n", "expected one flag, got --activation and --swiglu"),
        ("MODEL_ARGS: {--num-experts: 8}\n", "--num-experts: expected a dense GPT, got 8"),
        ("MODEL_ARGS: {--hidden-size: wide}\n", "--hidden-size: expected an integer, got 'wide'"),
        ("MODEL_ARGS: {--quick-geglu: true}\n", "--quick-geglu: expected swiglu"),
    ],
)
def test_bad_configs_are_refused(tmp_path, text, message):
    file = tmp_path / "model.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        model_args.shape(model_args.read(file), SCALARS)
    assert message in str(error.value)


@pytest.mark.parametrize("scaling", [{"type": "yarn", "factor": 4.0}, {"rope_type": "llama3", "factor": 32.0}])
def test_rotary_scaling_that_megatron_lacks_is_refused(tmp_path, scaling):
    with pytest.raises(UserError, match=r"expected plain RoPE, linear scaling, or llama3 .* got .*'factor'"):
        hf_flags(tmp_path, rope_scaling=scaling)


def hf_flags(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL, **changes}))
    return {**hf_args.from_hf(tmp_path), **hf_args.rope_from_hf(tmp_path)}


def test_hf_flags_say_more_than_sizes(tmp_path):
    """The written config trains the same model: norms, rotary base and scaling, of transformers 5 and before."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 8192}
    older = hf_flags(tmp_path, rms_norm_eps=1e-6, rope_theta=500000.0, rope_scaling=llama3)
    newer = hf_flags(tmp_path, rms_norm_eps=1e-6, rope_parameters={"rope_theta": 500000.0, **llama3})
    assert older == newer
    assert (older["--norm-epsilon"], older["--rotary-base"], older["--use-rope-scaling"]) == (1e-6, 500000, True)
    assert older["--rope-scaling-factor"] == 8.0
    wider = hf_flags(tmp_path, rope_theta=500000.0, rope_scaling=llama3 | {"factor": 32.0})
    assert wider["--rope-scaling-factor"] == 32.0
    linear = hf_flags(tmp_path, rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0})
    assert (linear["--rotary-seq-len-interpolation-factor"], "--use-rope-scaling" in linear) == (4, False)
    plain = hf_flags(tmp_path, rope_theta=10000.0, rope_scaling=None)
    assert (plain["--rotary-base"], "--use-rope-scaling" in plain) == (10000, False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "expected JSON, got"),
        ("[]", "expected a JSON object, got list"),
        ({"model_type": "mamba"}, "expected model_type llama, mistral"),
        ({"model_type": "llama", **SMALL, "vocab_size": None}, "expected an integer vocab_size, got None"),
        (
            {"model_type": "llama", **SMALL, "hidden_act": "gelu"},
            "expected hidden_act 'silu' in a llama model, got 'gelu'",
        ),
        ({"model_type": "llama", **SMALL, "mlp_bias": True}, "expected no attention_bias or mlp_bias"),
    ],
)
def test_bad_hf_configs_are_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError) as error:
        hf_args.from_hf(tmp_path)
    assert message in str(error.value)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="expected a text file, got binary data"):
        model_args.read(tmp_path / "model.yaml")
