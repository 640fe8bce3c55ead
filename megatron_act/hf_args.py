"""Hugging Face's ``config.json`` as Megatron flags (the form of `model_args`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_act.errors import UserError
from megatron_act.model_args import Flags, read_text

FAMILIES: dict[str, Flags] = {  # model_type -> what the family fixes; the rest is in its config.json
    "llama": {"--swiglu": True},
    "mistral": {"--swiglu": True},
    "qwen2": {"--swiglu": True, "--add-qkv-bias": True},
    "qwen3": {"--swiglu": True, "--qk-layernorm": True},
    "arcee": {},
    "apertus": {"--qk-layernorm": True},
}
SIZES = {
    "--num-layers": "num_hidden_layers",
    "--hidden-size": "hidden_size",
    "--num-attention-heads": "num_attention_heads",
    "--ffn-hidden-size": "intermediate_size",
    "--padded-vocab-size": "vocab_size",
}
# What Megatron-Core's --use-rope-scaling fixes, as transformers writes it; the factor is --rope-scaling-factor.
LLAMA3_BOUNDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def from_hf(path: str | Path) -> Flags:
    """Megatron flags of a Hugging Face ``config.json`` (file, or folder that holds one), without rotary ones.

    Raises:
        UserError: no such file, not JSON, a size missing, or a model that has no Megatron flags here.
    """
    return flags_of(*_opened(path))


def flags_of(file: Path, config: Mapping[str, Any]) -> Flags:
    """`from_hf` of a config that is read already; ``file`` is for messages."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{file}: expected model_type {', '.join(FAMILIES)}, got {family!r}: give the sizes as flags")
    flags: Flags = {flag: _size(config, key, file) for flag, key in SIZES.items()}
    flags.update(_options(config), **FAMILIES[family])
    if "--swiglu" not in flags:
        flags["--activation"] = config.get("hidden_act", "xielu" if family == "apertus" else "relu2")
    elif config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{file}: expected hidden_act 'silu' in a {family} model, got {config['hidden_act']!r}")
    return flags


def _options(config: Mapping[str, Any]) -> Flags:
    flags: Flags = {"--normalization": "RMSNorm", "--disable-bias-linear": True, "--position-embedding-type": "rope"}
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError("config.json: expected no attention_bias or mlp_bias, got one: give the sizes as flags")
    if config.get("num_key_value_heads") not in (None, config["num_attention_heads"]):
        flags.update({"--group-query-attention": True, "--num-query-groups": config["num_key_value_heads"]})
    if config.get("head_dim"):
        flags["--kv-channels"] = config["head_dim"]
    if config.get("rms_norm_eps"):
        flags["--norm-epsilon"] = config["rms_norm_eps"]
    if not config.get("tie_word_embeddings", False):
        flags["--untie-embeddings-and-output-weights"] = True
    return flags


def rope_from_hf(path: str | Path) -> Flags:
    """The flags of rotary base and scaling, which no count depends on but a config to train with needs.

    transformers 5 keeps both in ``rope_parameters``, older ones in ``rope_theta`` and ``rope_scaling``.

    Raises:
        UserError: a scaling that Megatron-Core lacks.
    """
    return rope_of(*_opened(path))


def rope_of(file: Path, config: Mapping[str, Any]) -> Flags:
    """`rope_from_hf` of a config that is read already; ``file`` is for messages."""
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    rope.update(config.get("rope_parameters") or {})
    flags: Flags = {"--rotary-base": _whole(rope, "rope_theta", file)} if rope["rope_theta"] else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        flags["--rotary-seq-len-interpolation-factor"] = _whole(rope, "factor", file)
    elif kind == "llama3" and LLAMA3_BOUNDS.items() <= rope.items() and _is_number(rope.get("factor")):
        flags |= {"--use-rope-scaling": True, "--rope-scaling-factor": float(rope["factor"])}
    elif kind != "default":
        given = {key: value for key, value in rope.items() if value is not None}
        raise UserError(
            f"{file}: expected plain RoPE, linear scaling, or llama3 scaling of any factor with {LLAMA3_BOUNDS}, which "
            f"Megatron-Core has, got {given}: give the sizes as flags"
        )
    return flags


def _whole(rope: Mapping[str, Any], key: str, path: Path) -> int:
    """A number that Megatron's parser wants without fraction."""
    if not _is_number(rope.get(key)) or rope[key] != int(rope[key]):
        raise UserError(f"{path}: expected a whole number as {key} of rotary embeddings, got {rope.get(key)!r}")
    return int(rope[key])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _opened(path: str | Path) -> tuple[Path, dict[str, Any]]:
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    return file, _json(file)


def _json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _size(config: Mapping[str, Any], key: str, path: Path) -> int:
    if not isinstance(config.get(key), int):
        raise UserError(f"{path}: expected an integer {key}, got {config.get(key)!r}")
    return config[key]
