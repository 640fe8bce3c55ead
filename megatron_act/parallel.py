"""Gradients of the activation's scalars across tensor-parallel ranks: a sum, exactly once.

The first linear layer of the MLP is column parallel, so each tensor-parallel rank sees its own slice of the ffn
dimension and computes a partial dL/d(scalar), with sequence parallelism or without it. The gradient of the replicated
scalar is the SUM of these partials. Megatron-Core 0.19 reduces no such parameter by itself
(``megatron/core/distributed/finalize_model_grads.py`` averages, or sums under sequence parallelism only).
"""

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region


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
