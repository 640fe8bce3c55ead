"""``--use-transformer-engine-op-fuser``: the activation as an operation of ``te.ops``, with trainable scalars.

In Transformer Engine's fuser an operation is told the quantizer of its successor's input and of its predecessor's
output gradient, so both of the activation's results are in FP8 with nothing wired by hand, and fc2 drops the half that
its backward pass does not need. Quantizers there are ``internal``: their tensors are storage objects, with MXFP8 scales
in the GEMM's order. Source: transformer_engine/pytorch/ops/{op,fuser}.py, ops/basic/activation.py (2.20);
megatron/core/extensions/transformer_engine.py (TEFusedMLP).

Imports Transformer Engine: import it only where that loads (``te.problem``).
"""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEFusedMLP
from torch import Tensor
from transformer_engine.pytorch.ops import BasicOperation

from megatron_act import fp8_function, fp8_output, te, te_buffers
from megatron_act.activation import TrainableActivation
from megatron_act.fp8_function import Plan
from megatron_act.mlp import ActivationMLP
from megatron_act.once import log_once


class ActivationOperation(BasicOperation):
    """y = f(x; scalars) between two linear operations; holds the very Parameters of ``activation``.

    The scalars' gradients are reduced over the tensor-parallel ranks as the module does it
    (``TrainableActivation.received``).

    Args:
        activation: the MLP's activation.
    """

    def __init__(self, activation: TrainableActivation) -> None:
        super().__init__()
        self.__dict__["activation"] = activation  # not a submodule: its parameters are registered here by name
        for param in activation.activation.params:
            self.register_parameter(param.name, getattr(activation, param.name))

    def op_forward(
        self,
        ctx: Any,
        input_: Tensor,
        *,
        prev_op_grad_output_quantizer: Any | None,
        next_op_input_quantizer: Any | None,
    ) -> Any:
        """y, by the quantizer of the next operation if it has one that the kernels serve."""
        x = _plain(input_, input_.dtype)
        plan = Plan(
            self.activation.activation.name,
            self.activation.backend,
            _served(next_op_input_quantizer, x),
            _served(prev_op_grad_output_quantizer, x, gradient=True),
            self.activation.fp8_store,
        )
        y, tensors, saved = fp8_function.compute(plan, x, None, self.activation.raw_scalars())
        if ctx.requires_grad:
            ctx.save_for_backward(*tensors)
            ctx.saved = saved
        return y

    def op_backward(self, ctx: Any, grad_output: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """(dx, by the quantizer of the operation before; the scalars' gradients)."""
        grad = _plain(grad_output, ctx.saved.like.dtype)
        dx, dparams, _ = fp8_function.differentiate(ctx.saved, grad, ctx.saved_tensors)
        return dx, self.activation.received(dparams)


class ActivationFusedMLP(TEFusedMLP, ActivationMLP):
    """Megatron's op-fuser MLP with a trainable activation: same weights, same checkpoint keys."""

    def _make_activation_op(self, *_: Any) -> ActivationOperation:
        return ActivationOperation(self.activation_func)


def _plain(tensor: Any, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of float; a quantized one is dequantized."""
    return (tensor.dequantize(dtype=dtype) if hasattr(tensor, "_quantizer") else tensor).contiguous()


def _served(quantizer: Any | None, x: Tensor, gradient: bool = False) -> Any | None:
    """The quantizer of a neighbour, if the kernels can fill its tensor; else None, and it quantizes itself."""
    if quantizer is None:
        return None
    what = "gradient" if gradient else "activation"
    why = te_buffers.misfit(quantizer, x, gradient) or fp8_output.unfit_recipe()
    if why is None:
        return quantizer
    log_once(f"{te.FUSER_FLAG}: {why}; the {what} stays bf16 there")
    return None
