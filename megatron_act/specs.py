"""Puts ActivationMLP into Megatron's layer specs.

For an unmodified Megatron-LM ``pretrain_gpt.py``: ``--spec megatron_act.specs xielu``. One callable per
activation of the registry exists here under its name (``megatron_act.specs.xielu``, ``.crrelu``, ...).
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_act import optimizer_groups
from megatron_act.kernels import api as kernels
from megatron_act.mlp import ActivationMLP, ActivationMLPSubmodules, refuse_unsupported


def with_activation(
    spec: ModuleSpec,
    name: str,
    config: TransformerConfig,
    *,
    init: Mapping[str, float] | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> ModuleSpec:
    """A copy of a stock layer or block spec whose dense MLPs are ActivationMLPs with activation ``name``.

    ``config.activation_func`` is replaced by a function that raises, so that no part of Megatron which reads it (and
    knows nothing of this spec) computes another activation in silence.

    Args:
        spec: a layer spec, or a block spec with ``layer_specs``.
        name: a name of ``kernels.names()``.
        config: the configuration that the model will be built with.
        init: effective initial values of the scalars by name.
        backend: ``auto``, ``triton`` or ``reference``.
        recompute: keep the pre-activation only (``--recompute-activation-function``).

    Raises:
        ValueError: a configuration or spec that cannot hold the activation.
    """
    kernels.get(name)
    refuse_unsupported(config, name)
    optimizer_groups.install()
    spec = copy.copy(spec)
    if hasattr(spec, "layer_specs"):
        spec.layer_specs = [
            with_activation(layer, name, config, init=init, backend=backend, recompute=recompute)
            for layer in spec.layer_specs
        ]
        return spec
    spec.submodules = copy.copy(spec.submodules)
    spec.submodules.mlp = _with_activation_mlp(spec.submodules.mlp, name, init, backend, recompute)
    config.activation_func = _refusal(name)
    config.bias_activation_fusion = False  # Megatron's own fused kernels; ActivationMLP fuses the bias itself
    return spec


def _with_activation_mlp(
    stock: Any, name: str, init: Mapping[str, float] | None, backend: str, recompute: bool
) -> partial:
    if not (isinstance(stock, partial) and stock.func == MLP.as_mlp_submodule):
        raise ValueError(
            f"--activation {name}: expected Megatron's dense MLP in the layer spec, got {stock}: use the standard "
            "local or transformer_engine layers (without --use-transformer-engine-op-fuser)"
        )
    parts = stock.keywords["submodules"]
    submodules = ActivationMLPSubmodules(
        linear_fc1=parts.linear_fc1,
        linear_fc2=parts.linear_fc2,
        activation=name,
        activation_init=dict(init or {}),
        activation_backend=backend,
        activation_recompute=recompute,
    )
    return partial(ActivationMLP.as_mlp_submodule, submodules=submodules)


def _refusal(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"{name} lives in ActivationMLP, yet a stock Megatron module called config.activation_func")

    refuse.__name__ = name
    return refuse


def layer_spec(
    name: str, *, init: Mapping[str, float] | None = None, backend: str = "auto", recompute: bool = False
) -> Callable[..., ModuleSpec]:
    """A callable for Megatron's ``--spec`` (``GPTModelConfig.transformer_layer_spec``): stock layers, our MLP.

    Args:
        name: a name of ``kernels.names()``.
        init: effective initial values of the scalars by name.
        backend: ``auto``, ``triton`` or ``reference``.
        recompute: keep the pre-activation only (``--recompute-activation-function``).
    """

    def build(config: Any, vp_stage: int | None = None) -> ModuleSpec:
        from megatron.training.models.gpt import default_layer_spec

        stock = default_layer_spec(config, vp_stage)
        return with_activation(stock, name, config.transformer, init=init, backend=backend, recompute=recompute)

    build.__name__ = name
    build.__doc__ = f"GPT layer spec with {name}: ``--spec megatron_act.specs {name}``."
    return build


globals().update({name: layer_spec(name) for name in kernels.names()})
