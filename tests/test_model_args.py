"""Model shapes read from our configs and from Hugging Face config.json files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_act import model_args
from megatron_act.budget import flops, parameters
from megatron_act.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCALARS = {"xielu": 2, "crrelu": 1, "relu2": 0, "gelu": 0}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 320,
}
PARSE_ALL = """
import argparse, json, sys
from megatron_act.compat import install_typing_override
install_typing_override()
from megatron.training.arguments import add_megatron_arguments
from megatron_act import arguments, model_args
parser = arguments.add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
for path in sys.argv[1:]:
    flags = model_args.read(path)
    parsed = vars(parser.parse_args(arguments.config_to_argv(flags, parser, [])))
    actions = parser._option_string_actions
    switches = {flag for flag in flags if actions[flag].nargs == 0}
    print(json.dumps({flag: actions[flag].const if flag in switches else flags[flag] for flag in flags}))
    print(json.dumps({flag: parsed[actions[flag].dest] for flag in flags}))
"""


def shape_of(name):
    return model_args.shape(model_args.read(ROOT / "configs" / name), SCALARS)


def test_every_config_is_understood_by_megatron():
    """Each key is a flag of Megatron or ours, and Megatron's parser reads the value that the file means."""
    assert len(CONFIGS) >= 9
    command = [sys.executable, "-W", "ignore", "-c", PARSE_ALL, *map(str, CONFIGS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2 * len(CONFIGS)
    for wanted, parsed in zip(lines[::2], lines[1::2], strict=True):
        assert json.loads(parsed) == json.loads(wanted)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("paper-1.1b-swiglu.yaml", 1_132_537_344),
        ("paper-1.1b-xielu.yaml", 1_132_537_344 + 48),
        ("paper-3b-swiglu.yaml", 3_020_048_384),
        ("paper-3b-xielu.yaml", 3_020_048_384 + 72),
        ("apertus-8b-xielu.yaml", 8_053_338_112 + 64),
    ],
)
def test_configs_have_the_published_parameter_counts(name, count):
    assert parameters(shape_of(name)).total == count


@pytest.mark.parametrize("family", ["tiny", "paper-1.1b", "paper-3b"])
def test_configs_of_a_family_differ_in_the_mlp_only(family):
    files = [path for path in CONFIGS if path.name.startswith(f"{family}-")]
    gated = shape_of(f"{family}-swiglu.yaml")
    assert len(files) >= 2
    for path in files:
        shape = shape_of(path.name)
        assert parameters(shape).matmul == parameters(gated).matmul
        assert flops(shape) == flops(gated)
        assert shape.ffn_hidden_size % 2 == 0
        flags = model_args.with_mlp(model_args.read(path), "relu2", 0)
        assert flags == model_args.with_mlp(model_args.read(files[0]), "relu2", 0)


def test_tiny_model_has_one_to_three_million_parameters():
    for name in ("swiglu", "relu2", "xielu", "crrelu"):
        assert 1e6 < parameters(shape_of(f"tiny-{name}.yaml")).without_embeddings < 3e6


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
    shape = model_args.shape(model_args.from_hf(tmp_path), SCALARS)
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
    assert parameters(model_args.shape(model_args.from_hf(tmp_path), SCALARS)) == parameters(ours)


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
        model_args.from_hf(tmp_path)
    assert message in str(error.value)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="expected a text file, got binary data"):
        model_args.read(tmp_path / "model.yaml")


def test_written_flags_read_back(tmp_path):
    flags = {"--hidden-size": 64, "--lr": 1e-06, "--swiglu": True, "--lr-decay-style": "WSD"}
    model_args.write(tmp_path / "a.yaml", flags, "first\nsecond")
    assert model_args.read(tmp_path / "a.yaml") == flags
    assert (tmp_path / "a.yaml").read_text().startswith("# first\n# second\nMODEL_ARGS:\n")
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["MODEL_ARGS"]["--lr"] == 1e-06
