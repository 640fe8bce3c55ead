"""What a Hugging Face model folder holds, from its ``config.json``, its weight files' headers and the scalars."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from megatron_act.checkpoint import families
from megatron_act.checkpoint.import_flags import open_source
from megatron_act.checkpoint.info_checkpoint import short
from megatron_act.checkpoint.info_cost import Piece, cost, cost_of_shape
from megatron_act.checkpoint.info_openers import openers
from megatron_act.checkpoint.info_own import own_pieces
from megatron_act.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_act.checkpoint.writer import INDEX, SINGLE
from megatron_act.errors import UserError
from megatron_act.hf_args import from_hf
from megatron_act.kernels import api as kernels
from megatron_act.model_args import Flags, read, shape

CONSTANTS = ("beta", "eps")  # transformers' XIELUActivation stores them; absent ones load as uninitialised memory
MODEL = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
FUSED = {rule.hf: rule.megatron for rule in (*families.ATTENTION, *families.GATED_MLP)}
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.*)$")
_SCALAR = re.compile(r"model\.layers\.(\d+)\.mlp\.(?:experts\.(\d+)\.)?act_fn\.(\w+)$")


def describe_model(folder: Path) -> dict[str, Any]:
    """Architecture, tensors, the scalars' effective values by layer, which programs open it, an import's cost."""
    config = _config(folder)
    activation = str(config.get("activation") or config.get("hidden_act"))
    described = {
        "path": str(folder),
        "kind": "Hugging Face model folder",
        "architecture": (config.get("architectures") or [None])[0],
        "model": {name: config[name] for name in MODEL if config.get(name) is not None},
        "activation": activation,
        "opens_in": openers(config),
    }
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return {**described, "tensors": [], **_without_weights(folder, config)}
    weights = SafetensorsFolder(folder)
    if config.get("hidden_act") == "xielu" and "auto_map" not in config and (missing := _missing(weights)):
        why = f"no: {len(missing)} tensors are missing and would be random: {missing[0]}"
        described["opens_in"] = dict.fromkeys(described["opens_in"], why)
    return described | _weights(weights, activation)


def describe_flags(path: Path) -> dict[str, Any]:
    """A model that is a YAML file of Megatron flags so far: its parameters and what a conversion will take."""
    flags = read(path)
    described = {"path": str(path), "kind": "Megatron flags (no weights)", "tensors": []}
    return described | _from_flags(flags, 2 if flags.get("--bf16") or flags.get("--fp16") else 4)


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json: expected a readable JSON file, got: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{folder}/config.json: expected a JSON object, got {type(content).__name__}")
    return content


def _itemsize(config: dict[str, Any]) -> int:
    return 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2


def _without_weights(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    if config.get("model_type") != families.OWN:
        return _from_flags(from_hf(folder), _itemsize(config))
    pieces = own_pieces(open_source(folder), _itemsize(config))
    total = sum(piece.size_bytes for piece in pieces)
    return {"parameters": sum(piece.elements for piece in pieces), "conversion": cost(pieces, total)}


def _from_flags(flags: Flags, itemsize: int) -> dict[str, Any]:
    scalars = {name: len(kernels.get(name).params) for name in kernels.names()}
    size = shape(flags, scalars)
    wanted = cost_of_shape(size, itemsize)
    return {"parameters": int(wanted["disk_bytes"]) // itemsize, "conversion": wanted}


def _weights(weights: SafetensorsFolder, activation: str) -> dict[str, Any]:
    sizes = {name: torch.Size(stored.shape).numel() for name, stored in weights.tensors.items()}
    return {
        "parameters": sum(count for name, count in sizes.items() if weights.tensors[name].shape),
        "scalars_by_layer": _scalars(weights, activation),
        "tensors": [
            {"name": name, "shape": list(stored.shape), "dtype": short(stored.dtype), "file": stored.file.name}
            for name, stored in weights.tensors.items()
        ],
        "conversion": cost(
            _pieces(weights), sum(sizes[name] * stored.dtype.itemsize for name, stored in weights.tensors.items())
        ),
    }


def _pieces(weights: SafetensorsFolder) -> list[Piece]:
    """Megatron's tensors: those that it fuses are one, in the widest of their dtypes."""
    found: dict[str, Piece] = {}
    for name, stored in weights.tensors.items():
        layer, rest = (match[1], match[2]) if (match := _LAYER.match(name)) else ("", name)
        key = layer + FUSED.get(rest, rest)
        _, elements, itemsize = found.get(key, Piece(key, 0, 0))
        elements += torch.Size(stored.shape).numel()
        found[key] = Piece(key, elements, max(itemsize, stored.dtype.itemsize))
    return list(found.values())


def _missing(weights: SafetensorsFolder) -> list[str]:
    """What transformers would need beside each layer's alpha_p."""
    stems = [name.removesuffix("alpha_p") for name in weights.tensors if name.endswith(".act_fn.alpha_p")]
    wanted = [f"{stem}{name}" for stem in stems for name in ("alpha_n", *CONSTANTS)]
    return [name for name in wanted if name not in weights.tensors]


def _scalars(weights: SafetensorsFolder, activation: str) -> list[dict[str, list[float]]]:
    if activation not in kernels.names():
        return []
    params = {param.name: param for param in kernels.get(activation).params}
    found: dict[int, dict[str, list[float]]] = {}
    for name in sorted(weights.tensors, key=_numbers):
        if (match := _SCALAR.match(name)) and (param := params.get(match[3])):
            values = found.setdefault(int(match[1]), {}).setdefault(match[3], [])
            values.append(param.effective(float(weights.read(name))))
    return [found[layer] for layer in sorted(found)]


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(word) for word in name.split(".") if word.isdigit())
