"""Megatron's MLP with a trainable activation between its two linear layers."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_act import fp8_grad, fp8_output, graphs, recompute
from megatron_act.activation import TrainableActivation
from megatron_act.fp8_options import BF16, Fp8Options


@dataclass
class ActivationMLPSubmodules(MLPSubmodules):
    """Megatron's MLP submodules plus what a TrainableActivation needs."""

    activation: str = "xielu"
    activation_init: dict[str, float] | None = None
    activation_backend: str = "auto"
    activation_recompute: bool = False
    activation_fp8: Fp8Options = BF16
    own_scalars: bool = True  # False: whoever builds this MLP gives it an activation (experts that share one)


class ActivationMLP(MLP):
    """``fc2(f(fc1(x) + bias))`` with f a TrainableActivation of this layer; fc1's bias is added inside the kernel.

    fc1, fc2, their sharding and the checkpoint keys are Megatron's own; the scalars are saved as
    ``...mlp.activation_func.<scalar>``.

    Raises:
        ValueError: a configuration that cannot work, with the flag to change.
    """

    def __init__(self, config: TransformerConfig, submodules: ActivationMLPSubmodules, **kwargs: Any) -> None:
        refuse_unsupported(config, submodules.activation)
        refuse_options(config, submodules)
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.fp8 = submodules.activation_fp8
        if submodules.own_scalars:
            self.activation_func = build_activation(config, submodules, self.tp_group)

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the block.

        Args:
            hidden_states: shape (sequence, batch, hidden), or (tokens, hidden) for a routed expert.
            per_token_scale: a routed expert's router probabilities, shape (tokens,); they weight the whole output.

        Returns:
            (output, output bias or None); with ``per_token_scale`` the bias is in the output already.
        """
        x, bias = self.linear_fc1(hidden_states)
        if self.activation_func.recompute:
            output, output_bias = self._without_keeping(x, bias, per_token_scale)
        else:
            quantizers = self._quantizers(x, per_token_scale)
            output, output_bias = self.linear_fc2(self.activation_func(x, bias, per_token_scale, **quantizers))
        if per_token_scale is None or output_bias is None:
            return output, output_bias
        return output + (output_bias * per_token_scale.unsqueeze(-1)).to(output.dtype), None

    def _quantizers(self, x: torch.Tensor, per_token_scale: torch.Tensor | None) -> dict[str, Any]:
        """fc2's for the activation's result and fc1's for its gradient, where they are wanted and possible."""
        found: dict[str, Any] = {}
        if self.fp8.output:
            found["fp8_output"] = fp8_output.quantizer_of(self.linear_fc2, x, per_token_scale)
        if self.fp8.grad:
            found["fp8_grad"] = fp8_grad.quantizer_of(self.linear_fc1, x, per_token_scale)
        return found

    @torch.compiler.disable  # which can trace neither the hooks nor a question to y's autograd node
    def _without_keeping(
        self, x: torch.Tensor, bias: torch.Tensor | None, per_token_scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Activation and fc2, which together keep x only (``recompute``)."""
        y = self.activation_func(x, bias, per_token_scale)
        with recompute.dropped_input(y):
            return self.linear_fc2(y)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by Megatron's TransformerLayer with its number in the whole model, from 1."""
        self.activation_func.layer_number = layer_number


def build_activation(
    config: TransformerConfig, submodules: ActivationMLPSubmodules, tp_group: torch.distributed.ProcessGroup
) -> TrainableActivation:
    """The activation that ``submodules`` describes, for an ffn dimension that is split over ``tp_group``."""
    return TrainableActivation(
        config,
        submodules.activation,
        init=submodules.activation_init,
        backend=submodules.activation_backend,
        tp_group=tp_group,
        recompute=submodules.activation_recompute,
        fp8_store=submodules.activation_fp8.store,
    )


def refuse_options(config: TransformerConfig, submodules: ActivationMLPSubmodules) -> None:
    """Raises ValueError where activation recompute or FP8 cannot go with the configuration or with each other."""
    again, fp8 = submodules.activation_recompute, submodules.activation_fp8
    if why := (again and recompute.conflict(config, fp8)) or fp8.conflict(config):
        raise ValueError(why)


def refuse_unsupported(config: TransformerConfig, activation: str) -> None:
    """Raises ValueError where a configuration asks for what an MLP with ``activation`` cannot do."""
    problems = (
        (config.gated_linear_unit, "a gated MLP", "remove --swiglu (and set --ffn-hidden-size to 1.5x the gated one)"),
        (config.use_te_activation_func, "Transformer Engine's activation", "remove --use-te-activation-func"),
        (getattr(config, "use_kitchen", False), "kitchen layers", "remove --use-kitchen"),
        (
            getattr(config, "transformer_impl", None) == "inference_optimized",
            "inference-optimized layers (their experts compute Megatron's own activations, the others are untested)",
            "use --transformer-impl transformer_engine or local, which generate too",
        ),
    )
    for present, what, remedy in problems:
        if present:
            raise ValueError(f"--activation {activation}: expected a plain MLP, got {what}: {remedy}")
    if why := graphs.conflict(config):
        raise ValueError(why)
