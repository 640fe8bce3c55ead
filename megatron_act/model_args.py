"""Model shapes as Megatron flags: the MODEL_ARGS form of our configs.

A model is a mapping ``{"--hidden-size": 1536, "--swiglu": True, ...}``: what Megatron's command line would hold. A flag
without value is True; False or a missing key means that it is not given. Whatever the source, `shape` reads this one
form with Megatron's own defaults; `config_files` writes it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_act.budget import Shape, padded_vocab_size
from megatron_act.errors import UserError

Flags = dict[str, Any]

ROOT_KEY = "MODEL_ARGS"
ACTIVATION_FLAGS = ("--activation", "--swiglu", "--quick-geglu", "--squared-relu", "--openai-gelu")
# Megatron's own switches for an activation; --activation NAME is ours and covers those without a gate.
MEGATRON_ACTIVATIONS = {"--swiglu": "swiglu", "--squared-relu": "relu2", "--openai-gelu": "gelu"}
NOT_COUNTED = ("--num-experts", "--multi-latent-attention", "--mtp-num-layers", "--hybrid-layer-pattern")


def read(path: str | Path) -> Flags:
    """Reads the flags of a YAML file in Megatron's MODEL_ARGS form.

    Raises:
        UserError: no such file, not YAML, no MODEL_ARGS mapping, or a key that is no flag.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from None
    flags = content.get(ROOT_KEY) if isinstance(content, dict) else None
    if not isinstance(flags, dict):
        raise UserError(f"{path}: expected a mapping {ROOT_KEY} of '--flag: value' pairs, got none: see configs/")
    for key in flags:
        if not isinstance(key, str) or not key.startswith("--"):
            raise UserError(f"{path}: expected flags such as --hidden-size under {ROOT_KEY}, got {key!r}")
        if flags[key] is None:
            raise UserError(f"{path}: expected a value for {key}, got none: a switch takes true")
    return flags


def read_text(path: str | Path) -> str:
    """A file's text; UserError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, got {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected a text file, got binary data") from None


def to_words(flags: Flags) -> list[str]:
    """Flags as command-line words: True is the flag alone, False and None leave it out, a list gives several values."""
    words: list[str] = []
    for flag, value in flags.items():
        if value is False or value is None:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [flag, *(str(item) for item in values)]
    return words


def shape(flags: Mapping[str, Any], scalars: Mapping[str, int]) -> Shape:
    """Reads a model's shape from Megatron flags, with Megatron's defaults for the absent ones.

    Args:
        flags: as `read` returns them.
        scalars: trainable scalars per layer of each activation without a gate.

    Raises:
        UserError: a required size is missing, or the model has parts that are not counted (experts, MLA, MTP, Mamba).
    """
    for flag in NOT_COUNTED:
        if flags.get(flag):
            raise UserError(f"{flag}: expected a dense GPT, got {flags[flag]!r}: this count does not cover it")
    name = activation(flags)
    linear_bias = not flags.get("--disable-bias-linear")
    return Shape(
        hidden_size=_required(flags, "--hidden-size"),
        num_layers=_required(flags, "--num-layers"),
        num_attention_heads=_required(flags, "--num-attention-heads"),
        ffn_hidden_size=_required(flags, "--ffn-hidden-size"),
        activation=name,
        activation_scalars=scalars.get(name, 0),
        vocab_size=_vocab_size(flags),
        seq_length=integer(flags, "--seq-length", Shape.seq_length),
        # Megatron's own default of --num-query-groups is 1
        num_query_groups=integer(flags, "--num-query-groups", 1) if flags.get("--group-query-attention") else None,
        kv_channels=flags.get("--kv-channels"),
        tied_embeddings=not flags.get("--untie-embeddings-and-output-weights"),
        qk_layernorm=bool(flags.get("--qk-layernorm")),
        normalization=flags.get("--normalization", "LayerNorm"),
        bias=linear_bias,
        qkv_bias=bool(flags.get("--add-qkv-bias")),
        learned_positions=_learned_positions(flags),
    )


def activation(flags: Mapping[str, Any]) -> str:
    """The activation that the flags select: ours by name, else Megatron's switch, else Megatron's default, gelu."""
    given = [flag for flag in ACTIVATION_FLAGS if flags.get(flag)]
    if len(given) > 1:
        raise UserError(f"activation: expected one flag, got {' and '.join(given)}: remove all but one")
    if given == ["--quick-geglu"]:
        raise UserError("--quick-geglu: expected swiglu or an activation without a gate: give --baseline swiglu")
    if given == ["--activation"]:
        return str(flags["--activation"])
    return MEGATRON_ACTIVATIONS[given[0]] if given else "gelu"


def with_mlp(flags: Mapping[str, Any], name: str, ffn_hidden_size: int) -> Flags:
    """The same model with another activation and MLP width, in their place.

    Raises:
        UserError: Megatron has no flag for the activation.
    """
    if name == "geglu":
        raise UserError("geglu: expected an activation with a Megatron flag, got one without: it can only be counted")
    chosen: Flags = {"--swiglu": True} if name == "swiglu" else {"--activation": name}
    mlp: Flags = {"--ffn-hidden-size": ffn_hidden_size, **chosen}
    changed: Flags = {}
    for flag, value in flags.items():
        if flag == "--ffn-hidden-size":
            changed |= mlp
        elif flag not in ACTIVATION_FLAGS:
            changed[flag] = value
    return changed if "--ffn-hidden-size" in changed else changed | mlp


def integer(flags: Mapping[str, Any], flag: str, default: int) -> int:
    """The flag's value, or ``default`` when it is absent; UserError when it is no integer."""
    value = default if flags.get(flag) is None else flags[flag]
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{flag}: expected an integer, got {value!r}")
    return value


def _required(flags: Mapping[str, Any], flag: str) -> int:
    if flags.get(flag) is None:
        raise UserError(f"{flag}: expected a value, got none: give it as a flag, or --config, --model or --hf-config")
    return integer(flags, flag, 0)


def _vocab_size(flags: Mapping[str, Any]) -> int:
    if flags.get("--padded-vocab-size"):
        return integer(flags, "--padded-vocab-size", 0)
    vocab_size = integer(flags, "--vocab-size", 0)
    if flags.get("--no-pad-vocab-size"):
        return vocab_size
    divisible_by = integer(flags, "--make-vocab-size-divisible-by", 128)
    return padded_vocab_size(vocab_size, divisible_by, integer(flags, "--tensor-model-parallel-size", 1))


def _learned_positions(flags: Mapping[str, Any]) -> int:
    if flags.get("--position-embedding-type", "learned_absolute") != "learned_absolute":
        return 0
    if flags.get("--use-rotary-position-embeddings"):
        return 0
    return _required(flags, "--max-position-embeddings")
