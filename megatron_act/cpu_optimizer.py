"""Resuming Megatron's distributed optimizer with torch's AdamW, which it takes where apex and Transformer Engine lack.

Three places of ``megatron/core/optimizer/distrib_optimizer.py`` 0.19 assume the fused optimizers' bookkeeping:
``state_dict`` reads the step count of a fresh optimizer, which AdamW does not have before its first step;
``load_state_dict`` gives all parameters one step tensor, then overwrites it with the count from before the load; and
``_set_main_param_and_optimizer_states`` expects a step count among the tensors of each parameter that a reshardable
checkpoint holds, which has it in the groups.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch


def install() -> None:
    """Repairs all three; part of ``cpu_backend.install``."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_tensors = DistributedOptimizer._set_main_param_and_optimizer_states
    DistributedOptimizer._set_main_param_and_optimizer_states = _without_steps(set_tensors)
    DistributedOptimizer.state_dict = _with_state(DistributedOptimizer.state_dict)
    DistributedOptimizer.load_state_dict = _with_own_steps(DistributedOptimizer.load_state_dict)


def _with_state(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        if isinstance(self.optimizer, torch.optim.AdamW) and not self.optimizer.state:
            _start(self.optimizer)
        return original(self)

    return state_dict


def _start(optimizer: torch.optim.AdamW) -> None:
    """The state that AdamW makes at its first step, without a step."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[param] = {"step": torch.tensor(0.0), **moments}


def _with_own_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        if isinstance(self.optimizer, torch.optim.AdamW):
            step = float(state_dict["optimizer"]["param_groups"][0]["step"])
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(step)

    return load_state_dict


def _without_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        original(self, model_param, {"step": None, **tensors})  # what is no tensor is left as it is

    return set_main_param_and_optimizer_states
