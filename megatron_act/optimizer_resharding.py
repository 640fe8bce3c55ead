"""Optimizer state saved by one kind of optimizer, loaded into another; ``install`` adds it to Megatron's own loading.

Megatron-Core 0.19 stores a parameter's moments under its name and global shape, whatever the layout, but reads them
only into optimizers like those that wrote them (``optimizer.py``, ``ChainedOptimizer``):

- Experts that are spread over ranks (expert parallel > 1, or expert tensor parallel != tensor parallel) are trained by
  an optimizer of their own, and two optimizers' groups and step counts are stored in another structure than one's.
- The distributed optimizer (``--dist-ckpt-optim-fully-reshardable``) calls the main copy of a parameter ``param`` and
  keeps the step count in its groups; a plain one under bf16 calls it ``fp32_param``, in fp32 the model's parameter is
  it, and torch's Adam keeps the step count beside the moments.

So where kind or number differ, the tensors are requested by the names they were saved under, and groups and step counts
are set by hand. Nothing else changes: a checkpoint of the same kind takes Megatron's way, and what is saved is always
Megatron's. Only the distributed optimizer's default format (``dp_reshardable``) has no names: it stores the memory of
its buffers, which another layout cuts otherwise.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, param_group_identifier_keys
from megatron.training import get_args

from megatron_act.checkpoint.optimizer import ADAM, RESHARDABLE, SHARDING, conflict, format_of, precision_of

SAVED, MOVED = "megatron_act_saved_optimizer", "megatron_act_moved_state"
MAIN_COPIES = ("fp32_param", "param")
STATE = "optimizer.state."
EXPERT = "is_expert_parallel"

State = dict[Any, Any]

_installed = False


@dataclass(frozen=True)
class SavedOptimizer:
    """What a checkpoint holds of its optimizer besides tensors.

    Attributes:
        form: the distributed optimizer's format, None: plain optimizers.
        args: the arguments of the run that saved it.
        states: one state per optimizer, without tensors and sharded objects.
    """

    form: str | None
    args: Namespace = field(repr=False)
    states: tuple[State, ...] = field(repr=False)

    @classmethod
    def of(cls, common: Mapping[str, Any], metadata: dict[str, Any]) -> "SavedOptimizer":
        """From a checkpoint's common state and content metadata."""
        state, args = common["optimizer"], common["args"]
        several = all(isinstance(key, int) for key in state)
        states = tuple(state[key] for key in sorted(state)) if several else (state,)
        return cls(format_of(args, metadata), args, states)

    @property
    def groups(self) -> list[State]:
        """All parameter groups' settings, each with its ``step``."""
        found = []
        for state in self.states:
            inner = state.get("optimizer", state)
            step = inner.get("state", {}).get("common_step")
            found += [{"step": step, **group} for group in inner.get("param_groups", ())]
        return found

    def group_like(self, group: State) -> State:
        """The settings of the group with a given one's identity; experts' and dense parameters' count as the same.

        Raises:
            RuntimeError: it has none, as after a change of the learning rate's bounds or weight decay's.
        """
        keys = [key for key in param_group_identifier_keys if key != EXPERT]
        same = [saved for saved in self.groups if all(saved.get(key) == group.get(key) for key in keys)]
        same.sort(key=lambda saved: saved.get(EXPERT) != group.get(EXPERT))
        if not same:
            wanted = {key: group.get(key) for key in keys}
            raise RuntimeError(f"expected a parameter group with {wanted} in the checkpoint, got {self.groups}")
        return same[0]

    @property
    def main_copy(self) -> str | None:
        """Under which name parameters' main copies are stored, None: under the model's."""
        return "param" if self.form else None if precision_of(self.args) == "fp32" else "fp32_param"


def install() -> None:
    """Extends Megatron's loading. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    dist_checkpointing.load_content_metadata = _with_saved(dist_checkpointing.load_content_metadata)
    ChainedOptimizer.sharded_state_dict = _with_move(ChainedOptimizer.sharded_state_dict)
    ChainedOptimizer.load_state_dict = _with_finish(ChainedOptimizer.load_state_dict)


def _with_saved(original: Callable[..., Any]) -> Callable[..., Any]:
    """The metadata reach ``sharded_state_dict``, the one place that can ask for other names; they say what was saved.

    A plain optimizer's metadata name no format for the distributed one to describe its state in, but it has to.
    """

    @functools.wraps(original)
    def load_content_metadata(*args: Any, preloaded_state_dict: Any = None, **kwargs: Any) -> Any:
        metadata = original(*args, preloaded_state_dict=preloaded_state_dict, **kwargs)
        if metadata is None or not _is_served(preloaded_state_dict or {}):
            return metadata
        default = {SHARDING: RESHARDABLE} if get_args().use_distributed_optimizer else {}
        return {**default, **metadata, SAVED: SavedOptimizer.of(preloaded_state_dict, metadata)}

    return load_content_metadata


def _is_served(common: Mapping[str, Any]) -> bool:
    """Whether a run of Megatron-LM's loop loads Adam's state; everything else is Megatron's own affair."""
    try:
        args = get_args()
    except AssertionError:  # a program of another loop
        return False
    loads = not (args.finetune or args.no_load_optim)
    return loads and args.optimizer == ADAM and bool(common.get("optimizer")) and "args" in common


def _with_move(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded_state_dict(self: Any, model_state: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        saved = (kwargs.get("metadata") or {}).get(SAVED)
        if not is_loading or saved is None or _is_alike(saved, self):
            return original(self, model_state, is_loading, **kwargs)
        if why := conflict(saved.args, saved.form, get_args(), moves=True):
            raise RuntimeError(why)
        self.moving = _Move(self, original(self, model_state, is_loading, **kwargs), saved)
        return {MOVED: self.moving.requests}

    return sharded_state_dict


def _with_finish(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state: Any) -> None:
        original(self, self.__dict__.pop("moving").finish(state[MOVED]) if MOVED in state else state)

    return load_state_dict


def _is_alike(saved: SavedOptimizer, chain: ChainedOptimizer) -> bool:
    distributed = any(isinstance(optimizer, DistributedOptimizer) for optimizer in chain.chained_optimizers)
    return distributed == bool(saved.form) and len(saved.states) == len(chain.chained_optimizers)


class _Move:
    """A load under way: Megatron's description of the state to fill, and what to request for it.

    Args:
        chain: the optimizers to load into.
        description: their ``sharded_state_dict``.
        saved: what the checkpoint holds.
    """

    def __init__(self, chain: ChainedOptimizer, description: State, saved: SavedOptimizer) -> None:
        self.optimizers, self.saved = chain.chained_optimizers, saved
        alone = len(self.optimizers) == 1
        self.states = [description] if alone else [description[index] for index in range(len(self.optimizers))]
        self.places: list[tuple[Any, Any]] = []
        self.requests: dict[int, ShardedBase] = {}
        for optimizer, state in zip(self.optimizers, self.states, strict=True):
            if saved.main_copy is None and isinstance(optimizer, DistributedOptimizer):
                _keep_main_copies(optimizer, state)
            self._request(state)

    def _request(self, state: State) -> None:
        for container, key, value in nested_items_iter(state):
            if isinstance(value, LocalNonpersistentObject):
                container[key] = value.unwrap()
            elif isinstance(value, ShardedBase):
                self.requests[len(self.places)] = _renamed(value, self.saved.main_copy)
                self.places.append((container, key))

    def finish(self, loaded: Mapping[int, Any]) -> State:
        """The state as its optimizers expect it, from the loaded tensors by the requests' numbers."""
        for number, (container, key) in enumerate(self.places):
            container[key] = loaded[number]
        for optimizer, state in zip(self.optimizers, self.states, strict=True):
            _set_groups(optimizer, state, self.saved)
        return self.states[0] if len(self.states) == 1 else dict(enumerate(self.states))


def _keep_main_copies(optimizer: DistributedOptimizer, state: State) -> None:
    """In fp32 a parameter is its own main copy: by the time it is copied into itself the model has been loaded."""
    params = [param for buffer in optimizer.buffers for param in buffer.param_index_map]
    for param, tensors in zip(params, state["param_state"].values(), strict=True):
        tensors["param"] = param


def _renamed(tensor: Any, main_copy: str | None) -> Any:
    for name in MAIN_COPIES:
        if main_copy and tensor.key.startswith(f"{STATE}{name}."):
            return replace(tensor, key=f"{STATE}{main_copy}.{tensor.key.removeprefix(f'{STATE}{name}.')}")
    return tensor


def _set_groups(optimizer: Any, state: State, saved: SavedOptimizer) -> None:
    """Learning rates, step count and loss scale, as saved."""
    inner = state.get("optimizer", state)
    groups = [saved.group_like(group) for group in inner["param_groups"]]
    inner["param_groups"] = [
        {key: was.get(key, value) if key not in ("params", EXPERT) else value for key, value in group.items()}
        for group, was in zip(inner["param_groups"], groups, strict=True)
    ]
    steps = {float(was["step"]) for was in groups if was["step"] is not None}
    if steps:  # an empty group's may lag behind
        _set_step(optimizer, inner, max(steps))
    if scaler := saved.states[0].get("grad_scaler"):
        state["grad_scaler"] = scaler


def _set_step(optimizer: Any, inner: State, step: float) -> None:
    """torch's Adam counts per parameter; fused ones, and Megatron for the distributed optimizer, per group."""
    if isinstance(optimizer.optimizer, torch.optim.Adam | torch.optim.AdamW) and "state" in inner:
        inner["state"]["common_step"] = torch.tensor(step)
        return
    for group in inner["param_groups"]:
        group["step"] = int(step)
