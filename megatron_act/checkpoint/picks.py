"""Which part of a Megatron tensor a Hugging Face tensor is, as a view: read for the export, filled by the import.

Megatron's fused tensors, with H hidden, A query heads, G key/value groups, D features per head, F ffn width:
``linear_qkv``  (G x (A/G + 2) x D, H): per group its A/G query heads, then one key head, then one value head;
``linear_fc1``  gated: (2F, H), all gate rows first, then all up rows, whatever tensor-parallel size wrote it;
``embedding``, ``output_layer``  (V padded, H): rows beyond the vocabulary are padding.
Rotary embeddings rotate halves of a head in both worlds (``rotary_interleaved`` off), so that rows keep their place.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Sizes that the picks need; ``vocab_size`` without padding."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int


Pick = Callable[[Tensor, Geometry], Tensor]


def _whole(tensor: Tensor, _: Geometry) -> Tensor:
    return tensor


def _groups(qkv: Tensor, geometry: Geometry) -> Tensor:
    """(G, A/G + 2, D, H) view of ``linear_qkv``."""
    per_group = geometry.num_attention_heads // geometry.num_query_groups + 2
    return qkv.view(geometry.num_query_groups, per_group, geometry.kv_channels, qkv.shape[-1])


def _query(qkv: Tensor, geometry: Geometry) -> Tensor:
    return _groups(qkv, geometry)[:, :-2]


def _key(qkv: Tensor, geometry: Geometry) -> Tensor:
    return _groups(qkv, geometry)[:, -2]


def _value(qkv: Tensor, geometry: Geometry) -> Tensor:
    return _groups(qkv, geometry)[:, -1]


def _gate(fc1: Tensor, _: Geometry) -> Tensor:
    return fc1.chunk(2)[0]


def _up(fc1: Tensor, _: Geometry) -> Tensor:
    return fc1.chunk(2)[1]


def _vocabulary(rows: Tensor, geometry: Geometry) -> Tensor:
    return rows[: geometry.vocab_size]


PICKS: dict[str, Pick] = {
    "whole": _whole,
    "query": _query,
    "key": _key,
    "value": _value,
    "gate": _gate,
    "up": _up,
    "vocabulary": _vocabulary,
}


def cut(pick: str, tensor: Tensor, geometry: Geometry) -> Tensor:
    """The Hugging Face tensor (rows, columns), a norm or a scalar; works on ``meta`` tensors, to plan shapes."""
    view = PICKS[pick](tensor, geometry)
    return view if view.dim() <= 2 else view.reshape(-1, view.shape[-1])


def place(pick: str, tensor: Tensor, geometry: Geometry, part: Tensor) -> None:
    """Copies a Hugging Face tensor to where `cut` finds it in a Megatron one; ``part`` has the shape of that cut."""
    view = PICKS[pick](tensor, geometry)
    view.copy_(part.reshape(view.shape))
