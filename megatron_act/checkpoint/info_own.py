"""The tensors of a model of this project's modelling file that is a ``config.json`` so far, experts included."""

from collections.abc import Iterator

import torch

from megatron_act.checkpoint import families
from megatron_act.checkpoint.import_flags import Source
from megatron_act.checkpoint.import_plan import geometry_of, megatron_shapes
from megatron_act.checkpoint.info_cost import FLOAT32, Piece


def own_pieces(source: Source, itemsize: int) -> list[Piece]:
    """Megatron's tensors, each layer and expert of its own; weights of ``itemsize`` bytes, scalars fp32."""
    config = source.config
    shapes = megatron_shapes(source, geometry_of(config), config["vocab_size"])
    return [
        Piece(name, torch.Size(shapes[rule.megatron]).numel(), FLOAT32 if rule.scalar else itemsize)
        for name, rule in _tensors(source).items()
    ]


def _tensors(source: Source) -> dict[str, families.Rule]:
    untied = () if source.config["tie_word_embeddings"] else (families.UNTIED,)
    found = {rule.megatron: rule for rule in (*families.MODEL, *untied)}
    for layer in range(source.config["num_hidden_layers"]):
        found |= dict(_of_layer(source, layer))
    return found


def _of_layer(source: Source, layer: int) -> Iterator[tuple[str, families.Rule]]:
    for rule, _, row in families.expanded(source.family, source.experts):
        yield ".".join(map(str, ("layers", layer, *row, rule.megatron))), rule
