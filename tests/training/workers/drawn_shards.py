"""This rank's parameters as shards of whole tensors, with the gradients that its optimizer sees."""

import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from oracle_state import Shard

SPREAD = 0.1  # of the starting values


def described(chunk: Any) -> Iterator[tuple[str, ShardedTensor]]:
    """A model chunk's parameters as its sharded state dict describes them, by names with layer and expert numbers."""
    for tensor in chunk.sharded_state_dict().values():
        if isinstance(tensor, ShardedTensor):
            numbers = tensor.global_offset[: tensor.prepend_axis_num]
            yield _numbered(tensor.key, numbers), tensor


def _numbered(key: str, numbers: tuple[int, ...]) -> str:
    """``decoder.layers.mlp.experts.experts.w``, (1, 2) to ``decoder.layers.1.mlp.experts.experts.2.w``."""
    rest = list(numbers)
    for stack in ("layers.", "experts.experts."):
        if rest and re.search(rf"{stack}(?!\d)", key):
            key = key.replace(stack, f"{stack}{rest.pop(0)}.", 1)
    return key


def spread(models: list[Any]) -> list[Any]:
    """Moves every weight from where it starts (norms at 1, biases at 0, all scalars equal), replicas alike."""
    for chunk in models:
        for name, tensor in described(chunk):
            place = f"{name} {tensor.global_offset}".encode()
            rng = torch.Generator().manual_seed(zlib.crc32(place))
            with torch.no_grad():
                tensor.data.add_(torch.randn(tensor.data.shape, generator=rng), alpha=SPREAD)
    return models


def shards_of(models: list[Any], optimizer: Any) -> Iterator[Shard]:
    """Every parameter of this rank; its gradient as it is between the end of the reductions and the optimizer."""
    for chunk in models:
        unseen = {id(param): name for name, param in chunk.named_parameters()}
        for name, tensor in described(chunk.module):
            unseen.pop(id(tensor.data), None)
            first = tensor.prepend_axis_num
            start, grad = _owned(tensor.data, optimizer)
            shape, offset = tensor.global_shape[first:], tensor.global_offset[first:]
            yield Shard(name, shape, offset, tensor.data.detach().clone(), start, grad)
        if unseen:
            raise RuntimeError(f"expected all parameters in the sharded state dict, got none for {[*unseen.values()]}")


def _owned(param: Any, optimizer: Any) -> tuple[int, torch.Tensor]:
    """The flattened gradient, of a sharded optimizer the part that this rank owns, and where it begins."""
    flat = param.main_grad.detach().flatten()
    parts = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    for part in parts:
        if param in part.model_param_gbuf_map:
            mine = part._get_model_param_range_map(param)["param"]
            return mine.start, flat[mine.start : mine.end].clone()
    return 0, flat[:0] if parts else flat.clone()
