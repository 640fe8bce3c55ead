"""What a checkpoint holds, as text."""

from argparse import Namespace

import torch

from megatron_act.checkpoint import families
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.checkpoint.scalars import effective_scalars, scalar_names, trained_activation
from megatron_act.errors import UserError

LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "world_size")
MODEL = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


def describe(checkpoint: MegatronCheckpoint) -> str:
    """Iteration, layout, model, tensors, and the activation's effective scalars by layer as text of several lines."""
    args = checkpoint.args
    activation = trained_activation(args)
    tensors = checkpoint.keys()
    parameters = sum(torch.Size(each.shape).numel() for each in tensors.values())
    width = max(map(len, tensors), default=6)
    lines = [
        f"{checkpoint.path}",
        f"iteration    {checkpoint.iteration}",
        f"written at   {_values(args, LAYOUT)}",
        f"model        {_values(args, MODEL)}",
        f"parameters   {parameters:,} (vocabulary padding included)",
        f"activation   {activation}, scalars: {', '.join(scalar_names(checkpoint)) or 'none'}",
        f"exports as   {_destination(args, activation)}",
        *("", f"{'tensor':<{width}} {'shape':<24} {'dtype':<10} chunks"),
    ]
    for name, info in tensors.items():
        dtype = str(info.dtype).removeprefix("torch.")
        lines.append(f"{name:<{width}} {'x'.join(map(str, info.shape)):<24} {dtype:<10} {checkpoint.chunks(name)}")
    return "\n".join(lines + _scalar_table(checkpoint))


def _values(args: Namespace, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {getattr(args, name, 'unknown')}" for name in names)


def _destination(args: Namespace, activation: str) -> str:
    try:
        return families.choose(args, activation).architecture
    except UserError as error:
        return f"nothing: {str(error).removeprefix('export: ')}"


def _scalar_table(checkpoint: MegatronCheckpoint) -> list[str]:
    if not scalar_names(checkpoint):
        return []
    layers = effective_scalars(checkpoint)
    names = list(layers[0])
    rows = [f"{layer:>5}" + "".join(f"{values[name]:>14.6f}" for name in names) for layer, values in enumerate(layers)]
    return ["", "layer" + "".join(f"{name:>14}" for name in names) + "   (effective values)", *rows]
