"""Puts ActivationMLP into Megatron's layer specs.

For an unmodified Megatron-LM ``pretrain_gpt.py``: ``--spec megatron_act.specs xielu``. One callable per
activation of the registry exists here under its name (``megatron_act.specs.xielu``, ``.crrelu``, ...).
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args, print_rank_0

from megatron_act import finalize, mtp, optimizer_groups, te
from megatron_act.experts import moe_with_activation
from megatron_act.fp8_options import BF16, Fp8Options
from megatron_act.kernels import api as kernels
from megatron_act.mlp import ActivationMLP, ActivationMLPSubmodules, refuse_unsupported
from megatron_act.norms import stock_spec


def with_activation(
    spec: ModuleSpec,
    name: str,
    config: TransformerConfig,
    *,
    init: Mapping[str, float] | None = None,
    backend: str = "auto",
    recompute: bool = False,
    fp8: Fp8Options = BF16,
    per_expert: bool = False,
) -> ModuleSpec:
    """A copy of a stock layer or block spec whose MLPs, experts included, have activation ``name``.

    ``config.activation_func`` is replaced by a function that raises, so that no part of Megatron which reads it (and
    knows nothing of this spec) computes another activation in silence.

    Args:
        spec: a layer spec, or a block spec with ``layer_specs``.
        name: a name of ``kernels.names()``.
        config: the configuration that the model will be built with.
        init: effective initial values of the scalars by name.
        backend: ``auto``, ``triton`` or ``reference``.
        recompute: keep the pre-activation only (``--recompute-activation-function``).
        fp8: what of the activation is in FP8 (``--activation-fp8-output`` and its like).
        per_expert: scalars for each routed expert, instead of one set per MoE layer (``--activation-per-expert``).

    Raises:
        ValueError: a configuration or spec that cannot hold the activation.
    """
    kernels.get(name)
    refuse_unsupported(config, name)
    if config.transformer_impl == "transformer_engine" and (why := te.fuser_conflict(config)):
        raise ValueError(why)
    optimizer_groups.install()
    describe = partial(
        _describe,
        activation=name,
        activation_init=dict(init or {}),
        activation_backend=backend,
        activation_recompute=recompute,
        activation_fp8=fp8,
    )
    placed = _placed(spec, describe, config, per_expert)
    config.activation_func = _refusal(name)
    _bypass_fusion(name, config)
    return placed


def _bypass_fusion(name: str, config: TransformerConfig) -> None:
    """Switches off Megatron's fusion of bias and GELU, which is on by default, and says so: once per configuration."""
    if config.bias_activation_fusion:
        print_rank_0(f"> megatron-act: --no-bias-gelu-fusion is implied: {name} adds the bias in its own kernel")
    config.bias_activation_fusion = False


def _describe(parts: MLPSubmodules, **activation: Any) -> ActivationMLPSubmodules:
    return ActivationMLPSubmodules(linear_fc1=parts.linear_fc1, linear_fc2=parts.linear_fc2, **activation)


def _placed(spec: Any, describe: Callable, config: TransformerConfig, per_expert: bool) -> Any:
    spec = copy.copy(spec)
    if hasattr(spec, "layer_specs"):
        spec.layer_specs = [_placed(layer, describe, config, per_expert) for layer in spec.layer_specs]
        return spec
    spec.submodules = copy.copy(spec.submodules)
    spec.submodules.mlp = _with_activation_mlp(spec.submodules.mlp, describe, config, per_expert)
    return spec


def _with_activation_mlp(stock: Any, describe: Callable, config: TransformerConfig, per_expert: bool) -> partial:
    if isinstance(stock, partial) and stock.func is MoELayer:
        return moe_with_activation(stock, describe, config, per_expert)
    kind = _mlp_class(stock)
    if kind is not None:
        return partial(kind.as_mlp_submodule, submodules=describe(stock.keywords["submodules"]))
    raise ValueError(
        f"--activation: expected Megatron's MLP or MoE layer in the layer spec, got {stock}: use the standard "
        "local or transformer_engine layers"
    )


def _mlp_class(stock: Any) -> Any:
    """Ours for Megatron's dense MLP or its op-fuser MLP, None for anything else."""
    if not isinstance(stock, partial):
        return None
    if stock.func == MLP.as_mlp_submodule:
        return ActivationMLP
    if getattr(getattr(stock.func, "__self__", None), "__name__", None) != "TEFusedMLP":
        return None
    from megatron_act.te_op import ActivationFusedMLP  # Transformer Engine is there: Megatron's class is

    return ActivationFusedMLP


def _refusal(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"{name} lives in ActivationMLP, yet a stock Megatron module called config.activation_func")

    refuse.__name__ = name
    return refuse


def _refuse_dropped_factor(config: Any) -> None:
    """megatron-core 0.19's `gpt_config_from_args` drops --rope-scaling-factor: the model would train with 8 in silence.

    Raises:
        ValueError: an entry point that has done so.
    """
    try:
        args = get_args()
    except AssertionError:  # a model built without Megatron's arguments
        return
    wanted, got = getattr(args, "rope_scaling_factor", None), getattr(config, "rope_scaling_factor", None)
    if getattr(args, "use_rope_scaling", False) and wanted != got:
        raise ValueError(
            f"--rope-scaling-factor {wanted:g}: expected a model with it, got one with {got:g}: this entry point drops "
            "the flag, as megatron-core 0.19 does; train with megatron_act.pretrain_gpt"
        )


def layer_spec(
    name: str,
    *,
    init: Mapping[str, float] | None = None,
    backend: str = "auto",
    recompute: bool = False,
    fp8: Fp8Options = BF16,
    per_expert: bool = False,
) -> Callable[..., ModuleSpec]:
    """A callable for Megatron's ``--spec`` (``GPTModelConfig.transformer_layer_spec``): stock layers, our MLP.

    Args:
        name: a name of ``kernels.names()``.
        init: effective initial values of the scalars by name.
        backend: ``auto``, ``triton`` or ``reference``.
        recompute: keep the pre-activation only (``--recompute-activation-function``).
        fp8: what of the activation is in FP8 (``--activation-fp8-output`` and its like).
        per_expert: scalars for each routed expert (``--activation-per-expert``).
    """
    options: dict[str, Any] = {
        "init": init, "backend": backend, "recompute": recompute, "fp8": fp8, "per_expert": per_expert
    }  # fmt: skip

    def place(stock: Any, config: TransformerConfig) -> Any:
        return with_activation(stock, name, config, **options)

    def build(config: Any, vp_stage: int | None = None) -> ModuleSpec:
        _refuse_dropped_factor(config)
        finalize.watch(config.transformer)
        mtp.install()
        return place(stock_spec(config, vp_stage), config.transformer)

    build.place = place  # type: ignore[attr-defined]  # for layers that Megatron builds from a spec of its own
    build.__name__ = name
    build.__doc__ = f"GPT layer spec with {name}: ``--spec megatron_act.specs {name}``."
    return build


globals().update({name: layer_spec(name) for name in kernels.names()})
