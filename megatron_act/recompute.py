"""``--recompute-activation-function``: between forward and backward the MLP keeps fc1's output, not the activation's.

fc2 saves its input y for its weight gradient, the activation saves its input x: 2 F elements per token. y is a
function of x, so it is dropped after the forward pass and computed again by the same kernel, hence bit for bit, when
fc2's backward asks for it; F elements remain.

y comes back through torch's saved-tensor hooks around fc2, whatever implementation fc2 has: Megatron's
RowParallelLinear and Transformer Engine's both hand their input (or a view of it) to ``save_for_backward`` and read
it once at the start of their backward pass. Nothing of the linear layer, its collectives or its gradient accumulation
is replaced, and no gradient passes through the recomputation: it adds no collective. x itself is saved by the
activation's autograd node, so that outer hooks (``torch.utils.checkpoint``, offloading) see and serve it.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_act.fp8_options import STORE_FLAG, Fp8Options
from megatron_act.kernels import api as kernels

FLAG = "--recompute-activation-function"


class _Activation(torch.autograd.Function):
    """``kernels.apply`` that keeps its inputs and can give its value again."""

    @staticmethod
    def forward(
        ctx: Any, name: str, backend: str, x: Tensor, bias: Tensor | None, weights: Tensor | None, *raw: Tensor
    ) -> Tensor:
        ctx.name, ctx.backend, ctx.unpacked = name, backend, None
        ctx.save_for_backward(x, bias, weights, *raw)
        return kernels.apply(name, x, raw, bias=bias, weights=weights, backend=backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, bias, weights, *raw = _inputs(ctx)
        ctx.unpacked = None
        found = kernels.backward(ctx.name, grad, x, raw, bias=bias, weights=weights, backend=ctx.backend, value=False)
        return None, None, found.dx, found.dbias, found.dweights, *found.dparams


def _inputs(node: Any) -> tuple[Any, ...]:
    """What the activation saved; unpacked once, since ``torch.utils.checkpoint`` serves no second request."""
    if node.unpacked is None:
        node.unpacked = node.saved_tensors
    return node.unpacked


def apply(
    name: str,
    x: Tensor,
    raw: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``kernels.apply`` (arguments and errors are its own) with a result that ``dropped_input`` can forget."""
    return _Activation.apply(name, backend, x, bias, weights, *raw)


@dataclass(frozen=True)
class _Recipe:
    """How to get a saved view of y again."""

    node: Any  # y's autograd node, which keeps x
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def cook(self) -> Tensor:
        x, bias, weights, *raw = _inputs(self.node)
        with torch.no_grad():
            y = kernels.apply(self.node.name, x, raw, bias=bias, weights=weights, backend=self.node.backend)
        return y.as_strided(self.shape, self.stride, self.offset)


def dropped_input(y: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context for the linear layer that takes y: what it saves of y is a recipe.

    Does nothing for a y that ``apply`` did not make, or without gradients. A copy of y in another precision (FP8,
    autocast) is kept as the layer saved it.

    Args:
        y: the activation's result, any shape.
    """
    node: Any = y.grad_fn
    if not isinstance(node, _Activation._backward_cls) or y.numel() == 0:  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    address, dtype = y.untyped_storage().data_ptr(), y.dtype  # no reference to y: it must be freed

    def pack(tensor: Tensor) -> Tensor | _Recipe:
        if type(tensor) is not Tensor or tensor.dtype != dtype or tensor.untyped_storage().data_ptr() != address:
            return tensor
        return _Recipe(node, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _unpack(packed: Tensor | _Recipe) -> Tensor:
    return packed.cook() if isinstance(packed, _Recipe) else packed


def conflict(settings: Any, fp8: Fp8Options) -> str | None:
    """Why activation recompute cannot go with a configuration: one sentence with the flag to remove, or None.

    Args:
        settings: Megatron's parsed arguments or a TransformerConfig.
        fp8: what of the activation is in FP8.
    """
    experts = getattr(settings, "num_experts", None) or getattr(settings, "num_moe_experts", None)
    problems = (
        (fp8.store, f"{STORE_FLAG}: the activation would be computed again from rounded values"),
        (
            getattr(settings, "use_transformer_engine_op_fuser", False),
            "--use-transformer-engine-op-fuser: the fuser keeps fc2's input",
        ),
        (getattr(settings, "fp8", None), "--fp8-format: fc2 keeps an FP8 copy of its input, nothing would be dropped"),
        (getattr(settings, "fp4", None), "--fp4-format: fc2 keeps an FP4 copy of its input, nothing would be dropped"),
        (
            experts and getattr(settings, "moe_grouped_gemm", False),
            "--moe-grouped-gemm: grouped experts keep their activations' output",
        ),
        (
            experts and getattr(settings, "moe_shared_expert_overlap", False),
            "--moe-shared-expert-overlap: overlapped shared experts keep their activation's output",
        ),
        (
            getattr(settings, "cpu_offloading_num_layers", 0),
            "--cpu-offloading-num-layers: the pre-activation would travel for an output that is recomputed anyway",
        ),
    )
    return next((f"{FLAG} and {why}: remove one" for present, why in problems if present), None)
