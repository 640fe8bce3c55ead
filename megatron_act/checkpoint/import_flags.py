"""A Hugging Face model folder as a family of ``families`` and the Megatron flags that train it on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_act import hf_args
from megatron_act.checkpoint import families
from megatron_act.checkpoint.families import Family
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels
from megatron_act.model_args import Flags

# transformers' names of activations without scalars: the registry's
ACTIVATIONS = {
    "relu2": "relu2",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
GATED = ("llama", "qwen3")
SEQUENCE = 4096  # --seq-length that the flags propose at most; the command line wins


@dataclass(frozen=True)
class Source:
    """A model folder: its family, whose activation is the model's, and its config with transformers' defaults."""

    folder: Path
    family: Family
    config: Mapping[str, Any]

    @property
    def experts(self) -> int | None:
        """Routed experts per layer; None: dense."""
        return self.config.get("num_experts") if self.family.ships_code else None


def open_source(folder: str | Path) -> Source:
    """Reads a model folder's config.

    Raises:
        UserError: no config.json, or a model that no family is.
    """
    folder = Path(folder)
    config = _completed(folder)
    kind = config["model_type"]
    if kind == families.OWN:
        experts = config.get("num_experts")
        if config["activation"] not in kernels.names():
            known = ", ".join(kernels.names())
            raise UserError(f"--hf {folder}: expected activation {known}, got {config['activation']!r}")
        family = families.own(
            config["activation"], config["qk_norm"], bool(experts), bool(experts and config["activation_per_expert"])
        )
    elif kind in GATED:
        family = families.LLAMA if kind == "llama" else families.QWEN3
    else:
        family = _plain(kind, config["hidden_act"])
    _refuse(config)
    return Source(folder, family, config)


def _plain(kind: str, hidden_act: str) -> Family:
    base = families.APERTUS if kind == "apertus" else families.ARCEE
    if hidden_act == "xielu":
        return base if base is families.APERTUS else families.ARCEE_XIELU
    if hidden_act not in ACTIVATIONS:
        known = ", ".join(("xielu", *ACTIVATIONS))
        raise UserError(f"--hf: expected hidden_act {known}, got {hidden_act!r}: Megatron cannot train it")
    rules = tuple(rule for rule in base.layer if not rule.scalar)
    return replace(base, activation=ACTIVATIONS[hidden_act], layer=rules, constants={})


def _completed(folder: Path) -> dict[str, Any]:
    """config.json with what transformers assumes where it says nothing."""
    from transformers import AutoConfig

    from megatron_act.checkpoint.configuration_megatron_act import MegatronActConfig

    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = given["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--hf {folder}: expected a model folder with a config.json, got {error!r}") from None
    if kind not in families.NAMES:
        raise UserError(f"--hf {folder}: expected model_type {', '.join(families.NAMES)}, got {kind!r}")
    reader: Any = MegatronActConfig if kind == families.OWN else AutoConfig
    try:
        return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
    except Exception as error:  # whatever transformers' own checks raise
        why = " ".join(str(error).split())  # theirs have several lines
        raise UserError(f"--hf {folder}: expected a config that transformers reads, got: {why}") from None


def _refuse(config: Mapping[str, Any]) -> None:
    """Raises UserError for what the tables would drop in silence."""
    rope = config.get("rope_parameters") or {}
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or 1
    problems = (
        (config.get("attention_bias") or config.get("mlp_bias"), "linear layers without bias"),
        ("sliding_attention" in (config.get("layer_types") or ()), "full attention in every layer"),
        (config.get("use_sliding_window") and config.get("sliding_window"), "full attention in every layer"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "rotary embeddings over whole heads"),
        (config.get("pretraining_tp", 1) != 1, "pretraining_tp 1"),
        (heads % groups, f"num_attention_heads ({heads}) a multiple of num_key_value_heads ({groups})"),
    )
    for present, wanted in problems:
        if present:
            raise UserError(f"--hf: expected {wanted}, got another {config['model_type']} model: not imported")


def megatron_flags(source: Source, activation: str, padded: int, tokenizer: bool) -> Flags:
    """The flags of the run that trains the model on, in MODEL_ARGS form.

    Args:
        source: of `open_source`.
        activation: the registry's name, or ``swiglu``.
        padded: rows of Megatron's embedding.
        tokenizer: the folder has one.
    """
    config = source.config
    file, public = source.folder / "config.json", _as_public(config)
    flags = hf_args.flags_of(file, public) | hf_args.rope_of(file, public)
    flags.pop("--activation", None)
    if activation == "swiglu":
        flags["--swiglu"] = True
    else:
        flags["--activation"] = activation
    if source.family.qk_norm:
        flags["--qk-layernorm"] = True
    positions = config["max_position_embeddings"]
    flags |= {"--padded-vocab-size": padded, "--vocab-size": config["vocab_size"], **_experts(source)}
    flags |= {"--max-position-embeddings": positions, "--seq-length": min(positions, SEQUENCE)}
    flags |= {"--init-method-std": config["initializer_range"], "--attention-dropout": 0.0, "--hidden-dropout": 0.0}
    return flags | _tokenizer(source.folder, tokenizer)


def _as_public(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``hf_args`` reads; a model of our own as the public one that has its parts, activation and norms apart."""
    if config["model_type"] == families.OWN:
        return {**config, "model_type": "arcee", "hidden_act": config["activation"]}
    return dict(config)


def _experts(source: Source) -> Flags:
    if not source.experts:
        return {}
    config = source.config
    flags: Flags = {
        "--num-experts": source.experts,
        "--moe-router-topk": config["num_experts_per_tok"],
        "--moe-ffn-hidden-size": config["moe_intermediate_size"],
        "--moe-router-pre-softmax": not config["norm_topk_prob"],
        "--activation-per-expert": bool(config["activation_per_expert"]),
    }
    if config["routed_scaling_factor"] != 1.0:
        flags["--moe-router-topk-scaling-factor"] = config["routed_scaling_factor"]
    return flags


def _tokenizer(folder: Path, present: bool) -> Flags:
    if not present:
        return {"--tokenizer-type": "NullTokenizer"}
    return {"--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": str(folder.resolve())}
