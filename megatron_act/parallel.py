"""Gradients of the activation's scalars across tensor-parallel ranks: a sum, exactly once.

The first linear layer of the MLP is column parallel, so each tensor-parallel rank sees its own slice of the ffn
dimension and computes a partial dL/d(scalar), with sequence parallelism or without it. The gradient of the replicated
scalar is the SUM of these partials. Megatron-Core 0.19 reduces no such parameter by itself
(``megatron/core/distributed/finalize_model_grads.py`` averages, or sums under sequence parallelism only).

Two ways, of which each activation uses one: inside its own backward pass (``sum_gradients_over_group``: right under
any training loop) or once per step for the whole model (``sum_main_gradients``: fewer collectives, needs a hook).
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

if TYPE_CHECKING:
    from megatron_act.activation import TrainableActivation


def sum_gradients_over_group(
    scalars: Sequence[torch.Tensor], group: torch.distributed.ProcessGroup | None
) -> tuple[torch.Tensor, ...]:
    """Identity in the forward pass; in the backward pass each scalar's gradient is summed over ``group``.

    The scalars of one layer travel in one tensor: one all-reduce of ``4 * len(scalars)`` bytes per layer and
    micro-batch.

    Args:
        scalars: raw parameters, each of shape (1,) and of one dtype.
        group: the tensor-parallel group over which the ffn dimension is split.

    Returns:
        One tensor of shape (1,) per scalar, equal to the input.
    """
    if not scalars:
        return ()
    stacked = copy_to_tensor_model_parallel_region(torch.cat(list(scalars)), group=group)
    return tuple(stacked.split(1))


def sum_over_group(
    partials: Sequence[torch.Tensor], group: torch.distributed.ProcessGroup | None
) -> tuple[torch.Tensor, ...]:
    """The gradients that ``sum_gradients_over_group`` would send back, from the partial ones of this rank."""
    if not partials:
        return ()
    stacked = reduce_from_tensor_model_parallel_region(torch.cat(list(partials)), group=group)
    return tuple(stacked.split(1))


def sum_main_gradients(activations: Sequence["TrainableActivation"]) -> None:
    """Sums ``main_grad`` of the scalars of all ``activations`` in place: one all-reduce per distinct group.

    To be called after Megatron's data-parallel reduction, never before: an overlapped reduce-scatter may still be
    reading the gradient buffers until ``finish_grad_sync`` returns. Afterwards it is right with the distributed
    optimizer too: tensor-parallel peers have buffers of equal layout, so the rank that owns a scalar's shard meets its
    owning peers (and what non-owners hold is never read). As the last operation on the gradient it also leaves the
    same bits on every peer, whatever order the data-parallel collectives of different peers added in.
    """
    by_group: dict[torch.distributed.ProcessGroup, list[torch.Tensor]] = {}
    for activation in activations:
        scalars: list[Any] = activation.raw_scalars()  # with the main_grad that DDP gives them
        grads = [raw.main_grad for raw in scalars if raw.requires_grad]
        by_group.setdefault(activation.tp_group, []).extend(grads)
    for group, grads in by_group.items():
        if group.size() == 1 or not grads:
            continue
        coalesced = torch.cat(grads)
        torch.distributed.all_reduce(coalesced, group=group)
        for grad, total in zip(grads, coalesced.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total)


class GradientProbe:
    """Adds up one activation's local partial gradients, before any reduction and beside Megatron's buffers.

    Attributes:
        totals: per scalar an fp64 tensor (2, numel): the sum of the partials and of their absolute values.
    """

    def __init__(self, scalars: Sequence[torch.Tensor]) -> None:
        self.totals = [torch.zeros(2, raw.numel(), dtype=torch.float64, device=raw.device) for raw in scalars]

    def watch(self, scalars: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Returns views of ``scalars`` for the kernel; the gradients that it sends back are added up."""
        views = tuple(raw.view_as(raw) for raw in scalars)
        for view, total in zip(views, self.totals, strict=True):
            if view.requires_grad:
                view.register_hook(partial(_add, total))
        return views

    def add(self, partials: Sequence[torch.Tensor]) -> None:
        """Adds gradients that did not pass through ``watch``."""
        for partial_grad, total in zip(partials, self.totals, strict=True):
            _add(total, partial_grad)

    def reset(self) -> None:
        """Forgets what was added up."""
        for total in self.totals:
            total.zero_()


def _add(total: torch.Tensor, grad: torch.Tensor) -> None:
    total += torch.stack([grad, grad.abs()]).reshape(total.shape)
