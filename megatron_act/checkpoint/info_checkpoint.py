"""What a Megatron checkpoint holds; metadata and the scalars' few bytes are read, no weight."""

import re
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from megatron_act.checkpoint import families
from megatron_act.checkpoint.hf_config import AUTO_MAP
from megatron_act.checkpoint.info_cost import Piece, cost
from megatron_act.checkpoint.info_openers import openers
from megatron_act.checkpoint.reader import LAYERS, MegatronCheckpoint
from megatron_act.checkpoint.scalars import trained_activation
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "context_parallel_size",
    "world_size",
)
MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_experts",
)
STACKED = ".experts.experts."  # tensors of routed experts have a dimension for them behind that of the layers
_SCALAR = re.compile(r"decoder\.layers\.(?:(\d+)\.)?mlp\.(.*?)activation_func\.(\w+)$")


def describe_checkpoint(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """Iteration, layout, model, tensors, the scalars' effective values by layer, destination, a conversion's cost.

    Raises:
        UserError: a file of it is cut short or missing.
    """
    checkpoint.check_whole()
    args, activation = checkpoint.args, trained_activation(checkpoint.args)
    tensors = checkpoint.keys()
    elements = {name: torch.Size(info.shape).numel() for name, info in tensors.items()}
    return {
        "path": str(checkpoint.path),
        "kind": "Megatron torch_dist checkpoint",
        "iteration": checkpoint.iteration,
        "layout": _values(args, LAYOUT),
        "model": _values(args, MODEL),
        "parameters": sum(elements.values()),
        "activation": activation,
        "scalars_by_layer": scalars_by_layer(checkpoint, activation),
        "tensors": [
            {"name": name, "shape": list(info.shape), "dtype": short(info.dtype), "chunks": checkpoint.chunks(name)}
            for name, info in tensors.items()
        ],
        **_destination(args, activation),
        "conversion": cost(
            [Piece(name, _read_at_once(name, info.shape), info.dtype.itemsize) for name, info in tensors.items()],
            sum(elements[name] * info.dtype.itemsize for name, info in tensors.items()),
        ),
    }


def short(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _values(args: Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def _read_at_once(name: str, shape: tuple[int, ...]) -> int:
    stacked = name.startswith(LAYERS) and not name.removeprefix(LAYERS).split(".")[0].isdigit()
    return torch.Size(shape[stacked + (STACKED in name) :]).numel()


def _destination(args: Namespace, activation: str) -> dict[str, Any]:
    try:
        family = families.choose(args, activation)
    except UserError as error:
        return {"exports_as": None, "why_not": str(error).removeprefix("export: "), "opens_in": {}}
    config = {
        "architectures": [family.architecture],
        **family.config,
        "num_experts": getattr(args, "num_experts", None),
        **({"auto_map": AUTO_MAP} if family.ships_code else {}),
    }
    return {"exports_as": family.architecture, "opens_in": openers(config)}


def scalars_by_layer(checkpoint: MegatronCheckpoint, activation: str) -> list[dict[str, list[float]]]:
    """By layer: scalar to effective values, one for the layer or one for each expert; empty without scalars."""
    if activation not in kernels.names():
        return []
    params = {param.name: param for param in kernels.get(activation).params}
    layers: list[dict[str, list[float]]] = [{} for _ in range(checkpoint.args.num_layers)]
    for key in checkpoint.keys():  # noqa: SIM118 (a method of ours)
        if (found := _SCALAR.match(key)) and (param := params.get(found[3])):
            label = _label(found[2]) + found[3]
            for layer, raw in _by_layer(checkpoint.tensor(key), found[1]):
                layers[layer][label] = [param.effective(float(value)) for value in raw.flatten()]
    return layers if any(layers) else []


def _label(place: str) -> str:
    return "shared." if "shared_experts" in place else ""


def _by_layer(tensor: Tensor, layer: str | None) -> list[tuple[int, Tensor]]:
    return list(enumerate(tensor)) if layer is None else [(int(layer), tensor)]
