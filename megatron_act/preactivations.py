"""What reaches the activations while a run trains: shares of negative pre-activations and of zero activations by layer.

    negative_fraction   of fc1's outputs with their bias (a gated MLP: of its gate's half), those below 0
    zero_fraction       of the activation's results, those that are exactly 0: ReLU^2's sparsity

A sample tells: up to `SAMPLED_TOKENS` tokens of the first micro-batch of a logged step, all columns of this
tensor-parallel rank, so that the cost does not grow with the batch. The ranks' counts are added up over the
model-parallel group (tensor and pipeline), one message of three numbers a layer.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_act.activation import TrainableActivation
from megatron_act.kernels import api as kernels

SAMPLED_TOKENS = 64


class Preactivations:
    """Counts on demand: ``watch`` before a step, ``take`` after it.

    Args:
        models: this rank's model chunks.
        num_layers: decoder layers of the whole model (prediction layers of MTP are left out).
    """

    def __init__(self, models: list[Any], num_layers: int) -> None:
        self.num_layers = num_layers
        self.waiting: set[Any] = set()
        self.counts: list[tuple[int, torch.Tensor]] = []
        self.spent = 0.0
        self.mlps = [pair for model in models for pair in _mlps(model)]
        for layer, mlp in self.mlps:
            if not hasattr(mlp, "_fused_impl"):  # te.ops shows nobody what is between its operations
                mlp.linear_fc1.register_forward_hook(self._hook(layer, mlp))

    def watch(self) -> None:
        """The next forward pass of each MLP is counted."""
        self.counts = []
        self.waiting = {mlp for _, mlp in self.mlps}

    def _hook(self, layer: int, mlp: Any) -> Callable[..., None]:
        def count(module: Any, inputs: Any, output: Any) -> None:
            if mlp in self.waiting:
                began = time.perf_counter()
                self.waiting.discard(mlp)
                self.counts.append((layer, _count(mlp, *output)))
                self.spent += time.perf_counter() - began

        return count

    def take_seconds(self) -> float:
        """Time that counting has taken since the last call (on a GPU: launching it)."""
        spent, self.spent = self.spent, 0.0
        return spent

    def take(self) -> dict[str, list[float]]:
        """The watched step's fractions by layer, empty without a watched step; collective, the same on all ranks."""
        device = torch.cuda.current_device()
        total = torch.zeros(self.num_layers, 3, dtype=torch.float32, device=device)
        for layer, counts in self.counts:
            total[layer - 1] += counts
        self.counts = []
        torch.distributed.all_reduce(total, group=mpu.get_model_parallel_group())
        rows = total.tolist()
        if not all(seen for _, _, seen in rows):
            return {}
        shares = {"negative_fraction": 0, "zero_fraction": 1}
        return {name: [round(row[column] / row[2], 6) for row in rows] for name, column in shares.items()}


def _mlps(model: Any) -> list[tuple[int, Any]]:
    """Every MLP with its layer's number: the layer's own, or its experts."""
    return [
        (layer.layer_number, mlp)
        for name, layer in model.named_modules()
        if isinstance(layer, TransformerLayer) and "mtp" not in name.split(".")
        for mlp in layer.mlp.modules()
        if hasattr(mlp, "linear_fc1") and hasattr(mlp, "linear_fc2")
    ]


@torch.no_grad()
def _count(mlp: Any, x: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    """Negative, zero and all of the sampled values, fp32 [3].

    Args:
        x: fc1's output, shape (..., columns of this rank).
        bias: fc1's, added here as the MLP does, or None.
    """
    rows = x.detach().flatten(0, -2)
    rows = rows[:: max(1, len(rows) // SAMPLED_TOKENS)]
    rows = rows if bias is None else rows + bias
    gate = rows.chunk(2, dim=-1)[0] if mlp.config.gated_linear_unit else rows
    negative, zero = (gate < 0).sum(), (_activated(mlp, gate) == 0).sum()
    return torch.stack([negative, zero, torch.full_like(zero, gate.numel())]).float()


def _activated(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """The MLP's own activation of ``x``, without the wiring of its scalars' gradients."""
    activation = getattr(mlp, "activation_func", None)
    if isinstance(activation, TrainableActivation):
        raw = [raw.detach() for raw in activation.raw_scalars()]
        return kernels.apply(activation.activation.name, x, raw, backend=activation.backend)
    return mlp.config.activation_func(x)
