"""Mixture of experts with trainable activations: Megatron's MoE layer, its expert MLPs and their scalars.

Shared scalars (default): one set per MoE layer, used by all its routed experts, saved as
``...mlp.activation_func.<scalar>``, the dense layer's key. Every rank of a pipeline stage computes a partial gradient:
of the tokens that reached its experts, on its slice of the ffn dimension. The ranks of a stage are the product of the
tensor-parallel group and the data-and-context-parallel group, however expert parallelism divides them again
(ETP x EP x expert-data). So the sum over all of them, each once, is: over the (dense) tensor-parallel group by
``parallel``, then over the data-and-context-parallel group by Megatron's DDP, which does it for every parameter that is
not marked ``allreduce = False``. A further sum over the expert-parallel group would count twice: its ranks are among
these. DDP's factor 1 / data-and-context-parallel size is the same for dense and expert parameters.

Scalars per expert (``--activation-per-expert``): saved as ``...mlp.experts.experts.activation_func.<scalar>``, one
shard per global expert. Only the ranks that hold an expert contribute: its expert-tensor-parallel group (the slices of
its ffn dimension; summed by ``parallel``) and its expert-data-parallel group (summed by DDP for ``allreduce = False``).
Megatron marks so exactly when expert parallel > 1 or ETP != TP, else both pairs of groups coincide; the scalars copy
the mark of the expert's own weight.

An expert that gets no token runs on an empty batch: its weights and scalars get zero gradients, never None. Shared
experts (``--moe-shared-expert-intermediate-size``) are dense MLPs: they have scalars of their own,
``...mlp.shared_experts.activation_func.<scalar>``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_act.activation import TrainableActivation, activations_of
from megatron_act.mlp import ActivationMLP, ActivationMLPSubmodules, build_activation
from megatron_act.once import log_once


@dataclass
class ActivationMoESubmodules(MoESubmodules):
    """Megatron's MoE submodules; ``shared`` describes the scalars of all routed experts, None: each has its own."""

    shared: ActivationMLPSubmodules | None = None


class ActivationMoELayer(MoELayer):
    """Megatron's MoE layer; routing, dispatch and combination are its own. Holds the scalars that its experts share."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ActivationMoESubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **kwargs)
        if self.shared_experts:
            self.shared_experts.activation_func.role = "shared_experts"
        if submodules.shared:
            self.activation_func = build_activation(config, submodules.shared, pg_collection.tp)
            self.experts.share(self.activation_func)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by Megatron's TransformerLayer with its number in the whole model, from 1."""
        super().set_layer_number(layer_number)
        for activation in activations_of(self):
            activation.layer_number = layer_number


class ActivationExperts(SequentialMLP):
    """This rank's routed experts, one after the other: Megatron's SequentialMLP over ActivationMLPs."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: ActivationMLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(0, config, submodules, pg_collection, name)  # everything but the stock MLPs
        self.num_local_experts = num_local_experts
        for index in range(num_local_experts):
            expert = ExpertMLP(
                self.config,
                submodules,
                ffn_hidden_size=self.config.moe_ffn_hidden_size,
                is_expert=True,
                tp_group=self.tp_group,
                name=None if name is None else f"{name}.local_experts.{index}",
            )
            if submodules.own_scalars:
                expert.activation_func.role = f"expert_{self.ep_group.rank() * num_local_experts + index}"
            self.local_experts.append(expert)

    def share(self, activation: TrainableActivation) -> None:
        """Gives all experts the layer's activation, which stays a submodule of the layer alone."""
        for expert in self.local_experts:
            expert.__dict__["activation_func"] = activation  # not registered: no second name, no second checkpoint key


class ActivationGroupedExperts(TEGroupedMLP):
    """This rank's routed experts in Transformer Engine's grouped GEMMs; one activation call for all their tokens.

    TEGroupedMLP calls ``self.activation_func`` on the output of fc1 (bias included) and multiplies by the router's
    probabilities itself. It does not say which token is whose: scalars per expert need ActivationExperts.
    """

    def share(self, activation: TrainableActivation) -> None:
        """Takes the layer's activation, which stays a submodule of the layer alone."""
        self.__dict__["activation_func"] = activation


class ExpertMLP(ActivationMLP):
    """One routed expert; scalars of its own are reduced by DDP over the ranks over which its weights are.

    So is fc2's bias: an expert sees whole tokens of the whole sequence, whatever ranks they came from. Megatron's local
    linear layer marks it for a further sum over the tensor-parallel ranks under sequence parallelism, as if it were a
    dense layer's, which doubles it or adds up the biases of different experts.
    """

    def __init__(self, config: TransformerConfig, submodules: ActivationMLPSubmodules, **kwargs: Any) -> None:
        super().__init__(config, submodules, **kwargs)
        if self.linear_fc2.bias is not None:
            self.linear_fc2.bias.sequence_parallel = False
        if submodules.own_scalars:
            for scalar in self.activation_func.parameters():
                scalar.allreduce = getattr(self.linear_fc1.weight, "allreduce", True)


class ActivationSharedExperts(SharedExpertMLP, ActivationMLP):
    """Megatron's shared experts (gate and overlap are its own) computed by ActivationMLP, with scalars of their own."""


def moe_with_activation(
    stock: partial,
    describe: Callable[[MLPSubmodules], ActivationMLPSubmodules],
    config: TransformerConfig,
    per_expert: bool,
) -> partial:
    """An MoE layer's spec with the activation in its routed and shared experts.

    Args:
        stock: Megatron's ``partial(MoELayer, submodules=MoESubmodules(...))``.
        describe: Megatron's linear layers of an MLP to the same with the activation.
        config: the configuration that the model will be built with.
        per_expert: each routed expert has scalars of its own, instead of one set per layer.

    Raises:
        ValueError: experts that cannot hold the activation, with the flag to change.
    """
    parts = stock.keywords["submodules"]
    refuse_unsupported_experts(config, parts.experts, per_expert)
    linears = parts.experts.keywords["submodules"]
    routed = describe(linears)
    for flag in routed.activation_fp8.flags:
        log_once(f"{flag}: the activations of routed experts stay bf16")
    if parts.experts.func is TEGroupedMLP:
        experts = partial(ActivationGroupedExperts, submodules=linears)
    else:
        experts = partial(ActivationExperts, submodules=replace(routed, own_scalars=per_expert))
    submodules = ActivationMoESubmodules(
        experts=experts,
        shared_experts=_with_shared_experts(parts.shared_experts, describe),
        router=parts.router,
        shared=None if per_expert else routed,
    )
    return partial(ActivationMoELayer, **{**stock.keywords, "submodules": submodules})


def _with_shared_experts(
    stock: partial | None, describe: Callable[[MLPSubmodules], ActivationMLPSubmodules]
) -> partial | None:
    return stock and partial(ActivationSharedExperts, submodules=describe(stock.keywords["submodules"]))


def refuse_unsupported_experts(config: TransformerConfig, experts: Any, per_expert: bool) -> None:
    """Raises ValueError where experts cannot have a trainable activation, or cannot have one each."""
    kind = getattr(experts, "func", experts)
    grouped = kind is TEGroupedMLP
    problems = (
        (kind not in (SequentialMLP, TEGroupedMLP), getattr(kind, "__name__", kind), "use the training layers"),
        (grouped and per_expert, "--moe-grouped-gemm with --activation-per-expert", "remove one of them"),
        (
            grouped and config.use_transformer_engine_op_fuser,
            "fused experts",
            "remove --use-transformer-engine-op-fuser",
        ),
        (
            getattr(config, "use_grouped_gemm_for_shared_expert", False),
            "grouped shared experts",
            "remove --use-grouped-gemm-for-shared-expert",
        ),
    )
    for present, what, remedy in problems:
        if present:
            raise ValueError(
                f"--activation: expected SequentialMLP or plain TEGroupedMLP experts, got {what}: {remedy}"
            )


def is_activated(layer: TransformerLayer) -> bool:
    """Whether all MLPs of a built layer, experts and shared experts included, have this project's activation."""
    mlps = [module for module in layer.modules() if isinstance(module, MLP | TEGroupedMLP)]
    return bool(mlps) and all(isinstance(mlp, ActivationMLP | ActivationGroupedExperts) for mlp in mlps)


def conflict(args: Any) -> str | None:
    """Why parsed arguments cannot train experts with an activation: one sentence with the flag to change, or None."""
    if args.num_experts is None:
        lost = "--activation-per-expert: expected --num-experts N with it, got none: add it or remove the flag"
        return lost if args.activation_per_expert else None
    ffn, etp = args.moe_ffn_hidden_size, args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    problems = (
        (
            args.activation_per_expert and args.moe_grouped_gemm,
            "--activation-per-expert: expected experts that run one after the other, got --moe-grouped-gemm, which "
            "activates the tokens of all experts in one call: remove one of them",
        ),
        (
            args.cpu and etp > 1 and args.moe_token_dispatcher_type != "allgather",
            f"--cpu: experts split over {etp} tensor-parallel ranks exchange unequal shares, which gloo cannot gather: "
            "use --moe-token-dispatcher-type allgather or --expert-tensor-parallel-size 1",
        ),
        (
            ffn is not None and ffn % etp,
            f"--moe-ffn-hidden-size: expected a multiple of the expert-tensor-parallel size {etp}, got {ffn}",
        ),
    )
    return next((message for present, message in problems if present), None)
