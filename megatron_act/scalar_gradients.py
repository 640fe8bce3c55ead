"""The gradient that each scalar had in the step just taken, before clipping.

Megatron leaves a step's reduced gradients in ``main_grad`` until the next step begins. Two things must be undone:
clipping has scaled them by ``clip / (norm + 1e-6)`` where that is below 1 (``megatron/core/optimizer/clip_grads.py``),
and the distributed optimizer reduces a bucket's shards only on the ranks that own them, so an owner tells the others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_act.activation import TrainableActivation, activations_of

EPSILON = 1e-6  # clip_grads.py's


def gradients(models: Sequence[Any], clip: float, norm: float | None) -> dict[int, torch.Tensor]:
    """Gradients of all raw scalars by ``id`` of the parameter, fp32 tensors of shape (1,); collective.

    Args:
        models: this rank's model chunks; anything but Megatron's DDP (FSDP) has no whole gradients: empty.
        clip: ``--clip-grad``; 0 means off.
        norm: the step's gradient norm as Megatron logs it, or None.
    """
    if not all(isinstance(model, DistributedDataParallel) for model in models):
        return {}
    undo = max(1.0, (norm + EPSILON) / clip) if norm is not None and clip > 0 else 1.0
    found: dict[int, torch.Tensor] = {}
    for model in models:
        for shared, modules in _by_sharing(model).items():
            raws = [raw for module in modules for raw in module.raw_scalars() if raw.requires_grad]
            if raws:
                values = torch.cat([_owned(model, raw) for raw in raws]) * undo
                if model.ddp_config.use_distributed_optimizer:
                    group = model.intra_dp_cp_group if shared else model.intra_expt_dp_group
                    torch.distributed.all_reduce(values, group=group)
                found.update(zip(map(id, raws), values.split(1), strict=True))
    return found


def _by_sharing(model: Any) -> dict[bool, list[TrainableActivation]]:
    """Activations by whether all data-parallel ranks share their scalars (else: experts', Megatron's ``allreduce``)."""
    found: dict[bool, list[TrainableActivation]] = {}
    for module in activations_of(model):
        for raw in module.raw_scalars()[:1]:
            found.setdefault(getattr(raw, "allreduce", True), []).append(module)
    return found


def _owned(model: Any, raw: Any) -> torch.Tensor:
    """The scalar's gradient, or 0 where another rank's shard holds it."""
    for buffer in (*model.buffers, *model.expert_parallel_buffers):
        if raw in buffer.param_index_map and model.ddp_config.use_distributed_optimizer:
            start, _, number = buffer.param_index_map[raw]
            bucket = buffer.buckets[number]
            shard = bucket.grad_data.numel() // buffer.data_parallel_world_size
            mine = (start - bucket.offset) // shard == buffer.data_parallel_group.rank()
            return raw.main_grad.float() * mine
    return raw.main_grad.float()
