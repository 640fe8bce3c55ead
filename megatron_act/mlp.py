"""Megatron's MLP with a trainable activation between its two linear layers."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_act.activation import TrainableActivation


@dataclass
class ActivationMLPSubmodules(MLPSubmodules):
    """Megatron's MLP submodules plus what a TrainableActivation needs."""

    activation: str = "xielu"
    activation_init: dict[str, float] | None = None
    activation_backend: str = "auto"


class ActivationMLP(MLP):
    """``fc2(f(fc1(x) + bias))`` with f a TrainableActivation of this layer; fc1's bias is added inside the kernel.

    fc1, fc2, their sharding and the checkpoint keys are Megatron's own; the scalars are saved as
    ``...mlp.activation_func.<scalar>``.

    Raises:
        ValueError: a configuration that cannot work, with the flag to change.
    """

    def __init__(self, config: TransformerConfig, submodules: ActivationMLPSubmodules, **kwargs: Any) -> None:
        refuse_unsupported(config, submodules.activation)
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.activation_func = TrainableActivation(
            config,
            submodules.activation,
            init=submodules.activation_init,
            backend=submodules.activation_backend,
            tp_group=self.tp_group,
        )

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the block on hidden states of shape (sequence, batch, hidden); returns (output, output bias or None)."""
        if per_token_scale is not None:
            raise ValueError("expected no per-token weights, got some: ActivationMLP does not serve routed experts yet")
        x, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(self.activation_func(x, bias))

    def set_layer_number(self, layer_number: int) -> None:
        """Called by Megatron's TransformerLayer with its number in the whole model, from 1."""
        self.activation_func.layer_number = layer_number


def refuse_unsupported(config: TransformerConfig, activation: str) -> None:
    """Raises ValueError where a configuration asks for what an MLP with ``activation`` cannot do."""
    problems = (
        (config.gated_linear_unit, "a gated MLP", "remove --swiglu (and set --ffn-hidden-size to 1.5x the gated one)"),
        (config.use_te_activation_func, "Transformer Engine's activation", "remove --use-te-activation-func"),
        (
            config.num_moe_experts is not None,
            "experts",
            "remove --num-experts: mixture of experts is not supported yet",
        ),
        (getattr(config, "use_kitchen", False), "kitchen layers", "remove --use-kitchen"),
    )
    for present, what, remedy in problems:
        if present:
            raise ValueError(f"--activation {activation}: expected a plain dense MLP, got {what}: {remedy}")
