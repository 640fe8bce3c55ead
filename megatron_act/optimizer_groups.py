"""The scalars in Megatron's optimizers: a parameter group of their own, without weight decay, that checkpoints in bf16.

Under ``--bf16`` the scalars are the model's only fp32 parameters. Megatron-Core 0.19 cannot save an optimizer whose
groups mix fp32 and bf16 parameters: the distributed optimizer reorders a mixed group but not its index
(``distrib_optimizer.py``), and the plain one numbers its bf16 parameters only (``optimizer.py``,
``Float16OptimizerWithFloat16Params.sharded_state_dict``). Nor can the distributed one load fp32 parameters, in any
precision: it copies into views of them with gradients enabled (``load_parameter_state_from_dp_reshardable``). Nor
can it save a buffer so small that a data-parallel rank's share of it holds no parameter ("empty bucket encountered"):
under bf16 the scalars have a buffer of their own, 64 elements for each, so that 16 scalars on 32 ranks are enough.
``install`` repairs all of this, for any entry point: it is called when an ActivationMLP enters a layer spec.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer.optimizer_config import ParamKey

from megatron_act import optimizer_resharding

SCALARS = ParamKey(name="*.activation_func.*")
# Weight decay off by value too, not only by the rule for 1-D parameters; this also makes the group's identity, by which
# Megatron pairs saved groups with current ones, differ from that of norms and biases.
NO_DECAY = {"start_wd": 0.0, "end_wd": 0.0}

_installed = False


def config_overrides() -> dict[ParamKey, dict[str, float]]:
    """For callers of ``megatron.core.optimizer.get_megatron_optimizer``: merge this into ``config_overrides``."""
    return {SCALARS: dict(NO_DECAY)}


def install() -> None:
    """Gives the scalars their group in ``megatron.training``, repairs both optimizers' checkpoints. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    _patch_config()
    _patch_saving()
    _patch_padding()
    optimizer_resharding.install()
    load = DistributedOptimizer.load_parameter_state_from_dp_reshardable
    DistributedOptimizer.load_parameter_state_from_dp_reshardable = torch.no_grad()(load)


def _patch_config() -> None:
    """``megatron.training`` has no hook for parameter groups; it calls this function when it builds the optimizer."""
    from megatron.training import training

    original = training.get_megatron_optimizer_config

    @functools.wraps(original)
    def with_scalars(args: Any) -> Any:
        config, overrides = original(args)
        return config, {**(overrides or {}), **config_overrides()}

    training.get_megatron_optimizer_config = with_scalars


def _patch_saving() -> None:
    original = Float16OptimizerWithFloat16Params.sharded_state_dict

    @functools.wraps(original)
    def with_fp32_groups(self: Any, *args: Any, **kwargs: Any) -> Any:
        """While the state is described, an fp32 parameter counts as its own fp32 copy; each group has one dtype."""
        if self.is_stub_optimizer:
            return original(self, *args, **kwargs)
        kept = self.float16_groups, self.fp32_from_float16_groups
        self.float16_groups, self.fp32_from_float16_groups = (
            [group + fp32 for group, fp32 in zip(groups, self.fp32_from_fp32_groups, strict=True)] for groups in kept
        )
        try:
            return original(self, *args, **kwargs)
        finally:
            self.float16_groups, self.fp32_from_float16_groups = kept

    Float16OptimizerWithFloat16Params.sharded_state_dict = with_fp32_groups


def _patch_padding() -> None:
    """A share without parameters gets one of no elements, so that Megatron pads it; as padding it is never loaded.

    What Megatron pads with is whatever the memory held: it becomes 0, so that equal runs save equal checkpoints.
    """
    get_state = DistributedOptimizer.get_parameter_state_dp_reshardable
    get_sharded = DistributedOptimizer.sharded_param_state_dp_reshardable

    @functools.wraps(get_state)
    def with_nothing(self: Any) -> Any:
        state, device = get_state(self), torch.cuda.current_device()
        for bucket in _buckets(state):
            if not bucket:
                nothing = {key: torch.empty(0, device=device) for key in ("param", *self.optimizer_state_keys)}
                bucket.append({**nothing, "gbuf_local_start": 0, "gbuf_local_end": 0, "padding": True})
        return state

    @functools.wraps(get_sharded)
    def without_nothing(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = get_sharded(self, *args, **kwargs)
        for bucket in _buckets(state):
            if bucket[0]["param"].local_shape == (0,):  # followed by its padding, but where the buffer has ended
                bucket[:] = bucket[1:] or [{"padding": LocalNonpersistentObject(True)}]
            for padding in (part for part in bucket if part["padding"].unwrap()):
                _clear(padding)
        return state

    DistributedOptimizer.get_parameter_state_dp_reshardable = with_nothing
    DistributedOptimizer.sharded_param_state_dp_reshardable = without_nothing


def _clear(padding: dict[str, Any]) -> None:
    for value in padding.values():
        if isinstance(value, ShardedTensor):
            value.data.zero_()


def _buckets(state: dict[Any, Any]) -> Iterator[list[dict[str, Any]]]:
    """All buckets of a distributed optimizer's state, which has the buffers under their numbers."""
    for buffer, dtypes in state.items():
        if isinstance(buffer, int):
            for buckets in dtypes.values():
                yield from buckets
