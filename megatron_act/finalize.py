"""The end of a step's backward pass: Megatron's gradient reductions, then ours, then a check of the first ones."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.utils import get_model_config
from megatron.training import print_rank_0

from megatron_act import replicas
from megatron_act.activation import TrainableActivation, activations_of
from megatron_act.parallel import GradientProbe, sum_main_gradients

VALUE_CHECKS = 2  # steps that compare the values: the first sees the start, the second what one update made of it
GRADIENT_CHECKS = 10  # at most: experts may stay without tokens, and layers that start at zero without gradients


class Finalize:
    """A ``config.finalize_model_grads_func``: Megatron's (or the one that was there), then the scalars' sum.

    Only activations with ``sums_in_backward`` False are summed here, so that no gradient is summed twice. The first
    steps are checked (``replicas``); a step whose gradients are too small to tell leaves it to the next.

    Args:
        finalize: what reduces all other gradients; None means Megatron's ``finalize_model_grads``.
    """

    def __init__(self, finalize: Callable[..., None] | None = None) -> None:
        self.finalize = finalize or finalize_model_grads
        self.calls = 0
        self.proven = False

    def __call__(self, models: Sequence[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
        self.finalize(models, num_tokens, **kwargs)
        sum_main_gradients([module for module in activations_of(models) if not module.sums_in_backward])
        if self.calls < VALUE_CHECKS or not self.proven:
            self._check(models, num_tokens)
        self.calls += 1

    def _check(self, models: Sequence[Any], num_tokens: torch.Tensor | None) -> None:
        if not can_check(models):
            self.proven = True
            return
        if not self.proven:
            self._check_gradients(models, num_tokens)
        if self.calls < VALUE_CHECKS:
            replicas.check_values(models)

    def _check_gradients(self, models: Sequence[Any], num_tokens: torch.Tensor | None) -> None:
        """Every rank must come to the same verdict: a rank that went on checking alone would wait for the others."""
        modules = [module for module in activations_of(models) if module.raw_scalars()]
        watched = all(module.probe for module in modules)
        conclusive = not modules or (watched and replicas.check_gradients(models, num_tokens))
        verdict = torch.tensor([int(conclusive)], device=torch.cuda.current_device())
        torch.distributed.all_reduce(verdict, op=torch.distributed.ReduceOp.MIN)
        self.proven = bool(verdict) or self.calls + 1 >= GRADIENT_CHECKS
        if self.proven and not verdict:
            print_rank_0(f"> megatron-act: {GRADIENT_CHECKS} steps had no scalar's gradient large enough to check")
        _set_probes(modules, on=not self.proven)


def can_check(models: Sequence[Any]) -> bool:
    """Whether gradients live, whole, in Megatron's DDP buffers."""
    return _in_ddp(models) and getattr(get_model_config(models[0]), "gtp_weight_remat_size", 1) == 1


def _in_ddp(models: Sequence[Any]) -> bool:
    return all(isinstance(model, DistributedDataParallel) for model in models)


def _set_probes(modules: Sequence[TrainableActivation], on: bool) -> None:
    for module in modules:
        module.probe = GradientProbe(module.raw_scalars()) if on else None


def watch(config: Any) -> None:
    """Puts a Finalize into a TransformerConfig, around the function that is there; changes no reduction. Idempotent."""
    if not isinstance(config.finalize_model_grads_func, Finalize):
        config.finalize_model_grads_func = Finalize(config.finalize_model_grads_func)


def install(models: list[Any]) -> list[Any]:
    """A post-wrap hook of the model config: one sum per step takes over from the sums in each backward pass.

    With a sharding wrapper (Megatron-FSDP, torch FSDP) gradients do not live in ``main_grad`` of the whole parameter:
    the sum stays in the backward pass.
    """
    watch(get_model_config(models[0]))
    if _in_ddp(models):
        for module in activations_of(models):
            module.sums_in_backward = False
    if can_check(models):
        _set_probes(activations_of(models), on=True)
        _check_at_saves()
    return models


def _check_at_saves() -> None:
    """``megatron.training`` calls ``save_checkpoint`` for every checkpoint, after synchronizing the parameters."""
    from megatron.training import training

    original = training.save_checkpoint
    if getattr(original, "checks_scalars", False):
        return

    @functools.wraps(original)
    def save_checkpoint(iteration: int, models: list[Any], *args: Any, **kwargs: Any) -> Any:
        if _in_ddp(models):
            replicas.check_values(models)
        return original(iteration, models, *args, **kwargs)

    save_checkpoint.checks_scalars = True  # type: ignore[attr-defined]
    training.save_checkpoint = save_checkpoint
