"""Core attention for context parallelism on a CPU: each rank gathers all keys and values.

Megatron's local attention serves one context-parallel rank only. Rank r of c holds chunks r and 2 c - 1 - r of the
sequence's 2 c chunks (Megatron's load balancing), for queries as for keys.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule


class _Gather(torch.autograd.Function):
    """Concatenates the ranks' slices along dimension 0; backward: each rank gets its slice of the summed gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group, ctx.length = group, x.shape[0]
        slices = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(slices, x.contiguous(), group=group)
        return torch.cat(slices)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank() * ctx.length :][: ctx.length].clone(), None


def positions(rank: int, ranks: int, length: int) -> torch.Tensor:
    """Global positions of the ``length`` tokens of a context-parallel rank."""
    half = length // 2
    first, second = torch.arange(half) + rank * half, torch.arange(half) + (2 * ranks - 1 - rank) * half
    return torch.cat([first, second])


class GatheringAttention(MegatronModule):
    """Causal attention of local queries on the keys and values of all context-parallel ranks; no dropout."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any) -> None:
        super().__init__(config=config)
        self.group = parallel_state.get_context_parallel_group()

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **_: Any
    ) -> torch.Tensor:
        """query (sq, batch, heads, channels), key and value (sq, batch, groups, channels) to (sq, batch, hidden)."""
        length, ranks = query.shape[0], self.group.size()
        key, value = _Gather.apply(key, self.group), _Gather.apply(value, self.group)
        mine = positions(self.group.rank(), ranks, length)
        theirs = torch.cat([positions(rank, ranks, length) for rank in range(ranks)])
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # (batch, heads, sequence, channels)
        visible = mine[:, None] >= theirs[None, :]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return out.permute(2, 0, 1, 3).reshape(length, query.shape[1], -1)
