"""Weights for the oracle: gathered from a Megatron model's shards in any layout, or from a Hugging Face state dict.

A shard names its tensor as Megatron's sharded state dict does, with layer and expert numbers written into the name
(``decoder.layers.0.mlp.experts.experts.2.linear_fc1.weight``), and its place in that tensor. Full tensors under these
names are the leaves whose gradients are compared; ``from_megatron`` makes the oracle's weights of them, differentiably.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from oracle_gpt import Shape
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one parameter.

    Attributes:
        name: of the whole tensor.
        shape: of the whole tensor.
        offset: of ``value`` in it.
        value: the weight.
        start: where ``grad`` begins in the flattened ``value``.
        grad: the gradients that this rank's optimizer sees, a contiguous part of the flattened shard; may be empty.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    value: Tensor
    start: int
    grad: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor that this shard is."""
        return whole[tuple(slice(o, o + n) for o, n in zip(self.offset, self.value.shape, strict=True))]


def gather(shards: Iterable[Shard]) -> dict[str, Tensor]:
    """Whole tensors in fp64 from the shards of all ranks.

    Raises:
        ValueError: replicas that differ, or elements that no rank has; names the tensor.
    """
    whole: dict[str, Tensor] = {}
    for shard in shards:
        target = whole.setdefault(shard.name, torch.full(shard.shape, torch.nan, dtype=torch.float64))
        if tuple(target.shape) != tuple(shard.shape):
            raise ValueError(f"{shard.name}: expected one shape on all ranks, got {target.shape} and {shard.shape}")
        place = shard.of(target)
        if not (place.isnan() | (place == shard.value)).all():
            raise ValueError(f"{shard.name}: expected equal values on all ranks that hold {shard.offset}, got others")
        place.copy_(shard.value)
    missing = [name for name, value in whole.items() if value.isnan().any()]
    if missing:
        raise ValueError(f"expected every element on some rank, got none of parts of {missing}")
    return whole


MEGATRON = (  # from Megatron's names to the oracle's, applied in this order
    (r"^embedding\.word_embeddings\.weight$", "embedding"),
    (r"^output_layer\.weight$", "output"),
    (r"^decoder\.", ""),
    (r"^final_layernorm\.", "final_norm."),
    (r"^mtp\.layers\.(\d+)\.(transformer_layer|mtp_model_layer)\.", r"mtp.\1.layer."),
    (r"^mtp\.layers\.(\d+)\.enorm\.", r"mtp.\1.token_norm."),
    (r"^mtp\.layers\.(\d+)\.hnorm\.", r"mtp.\1.hidden_norm."),
    (r"^mtp\.layers\.(\d+)\.eh_proj\.", r"mtp.\1.project."),
    (r"^mtp\.layers\.(\d+)\.final_layernorm\.", r"mtp.\1.final_norm."),
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".norm1."),  # Transformer Engine's fused layers
    (r"\.mlp\.linear_fc1\.layer_norm_", ".norm2."),
    (r"\.self_attention\.", ".attention."),
    (r"\.linear_proj\.", ".o."),
    (r"\.([qk])_layernorm\.", r".\1_norm."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.pre_mlp_layernorm\.", ".norm2."),
    (r"\.mlp\.experts\.experts\.", ".mlp.experts."),
    (r"\.shared_experts\.", ".shared."),
    (r"\.linear_fc1\.", ".up."),
    (r"\.linear_fc2\.", ".down."),
    (r"\.activation_func\.", ".scalars."),
)
HUGGING_FACE = (  # Llama, Qwen3, Arcee and Apertus
    (r"^lm_head\.weight$", "output"),
    (r"^model\.", ""),
    (r"^embed_tokens\.weight$", "embedding"),
    (r"^norm\.", "final_norm."),
    (r"\.self_attn\.", ".attention."),
    (r"\.([qkvo])_proj\.", r".\1."),
    (r"\.(input|attention)_layernorm\.", ".norm1."),
    (r"\.(post_attention|feedforward)_layernorm\.", ".norm2."),
    (r"\.(up|gate|down)_proj\.", r".\1."),
    (r"\.act_fn\.", ".scalars."),
)


def renamed(name: str, table: tuple[tuple[str, str], ...] = MEGATRON) -> str:
    """The oracle's name of a weight; of Megatron's fused ones a prefix of the parts' names."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def from_megatron(whole: Mapping[str, Tensor], shape: Shape, gated: bool = False) -> dict[str, Tensor]:
    """The oracle's weights from Megatron's whole tensors, as views or differentiable copies of them.

    Args:
        whole: tensors by Megatron's names, layer and expert numbers included.
        shape: heads and groups, by which queries, keys and values are interleaved.
        gated: the first linear layers hold gate and up, one after the other.
    """
    found = {}
    for key, tensor in whole.items():
        name = renamed(key)
        if ".linear_qkv." in name:
            found.update(_split_qkv(name, tensor, shape))
        elif gated and ".up." in name:
            found[name.replace(".up.", ".gate.")], found[name] = tensor.chunk(2)
        else:
            found[name] = tensor
    return found


def _split_qkv(name: str, tensor: Tensor, shape: Shape) -> dict[str, Tensor]:
    """Megatron's rows: for each group the queries that share it, its keys, its values."""
    queries = shape.heads // shape.groups
    channels = tensor.shape[0] // (shape.groups * (queries + 2))
    blocks = tensor.unflatten(0, (shape.groups, queries + 2, channels))
    parts = {"q": blocks[:, :queries], "k": blocks[:, queries : queries + 1], "v": blocks[:, queries + 1 :]}
    return {name.replace(".linear_qkv.", f".{part}."): rows.flatten(0, 2) for part, rows in parts.items()}


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The oracle's weights from a state dict of Llama's, Qwen3's, Arcee's or Apertus's names."""
    fixed = (".beta", ".eps", "inv_freq")  # constants that HF keeps among the weights
    return {renamed(key, HUGGING_FACE): tensor for key, tensor in state.items() if not key.endswith(fixed)}
