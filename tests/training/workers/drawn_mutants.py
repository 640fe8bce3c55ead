"""Reductions broken on purpose, one at a time: what a comparison with the oracle must notice. And ranks that fail.

A mutant is a reduction and a kind, ``"finalize doubled"``. The reductions: the scalars' sum over tensor-parallel ranks
in the ``backward`` pass or in the ``finalize`` hook, the scalars' ``data`` parallel reduction by Megatron's DDP, the
``norms``' sum over tensor-parallel ranks under sequence parallelism, that of the ``bias`` of experts (none), and the
scalars' part in the gradient ``norm``. The project's own checks are off, so that nothing else stops the run.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state

from megatron_act import activation, finalize, replicas
from megatron_act.activation import activations_of

Hook = Callable[[list[Any]], list[Any]]
Reduce = Callable[[list[Any]], None]  # of the models, once their gradients are reduced


@contextlib.contextmanager
def broken(mutant: str) -> Iterator[list[Hook]]:
    """Breaks what ``mutant`` names for the duration of the context.

    Args:
        mutant: a reduction and a kind, ``"raises"``, ``"exits"``, ``"waits"`` (rank 1 does), or empty.

    Yields:
        Hooks for the models before they are wrapped.
    """
    reduction, _, kind = mutant.partition(" ")
    if reduction in FAULTS and torch.distributed.get_rank() == 1:
        FAULTS[reduction]()
    with contextlib.ExitStack() as stack:
        if kind:
            stack.enter_context(mock.patch.object(replicas, "check_gradients", lambda *_: True))
            stack.enter_context(mock.patch.object(replicas, "check_values", lambda *_: None))
        yield REDUCTIONS[reduction](stack, kind) if kind else []


def raise_here() -> None:
    raise RuntimeError("rank 1 fails on purpose")


FAULTS = {"raises": raise_here, "exits": lambda: os._exit(3), "waits": lambda: time.sleep(1000)}


def data_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def tensor_group() -> Any:
    return parallel_state.get_tensor_model_parallel_group()


def in_backward(stack: contextlib.ExitStack, kind: str) -> list[Hook]:
    right = activation.sum_gradients_over_group
    mutants = {
        "removed": lambda scalars, group: tuple(scalars),
        "doubled": lambda scalars, group: right(right(scalars, group), group),
        "averaged": lambda scalars, group: right([_slower(raw, group.size()) for raw in scalars], group),
        "wrong-group": lambda scalars, group: right(scalars, data_group()),
    }
    stack.enter_context(mock.patch.object(activation, "sum_gradients_over_group", mutants[kind]))
    return []


def _slower(value: torch.Tensor, divisor: int) -> torch.Tensor:
    """The same value with a gradient that is divided."""
    return value.detach() + (value - value.detach()) / divisor


def in_finalize(stack: contextlib.ExitStack, kind: str) -> list[Hook]:
    right = finalize.sum_main_gradients

    def mutant(modules: list[Any]) -> None:
        for _ in range({"removed": 0, "wrong-group": 0, "doubled": 2}.get(kind, 1)):
            right(modules)
        for module in modules:
            for raw in module.raw_scalars():
                if kind == "averaged":
                    raw.main_grad /= module.tp_group.size()
                if kind == "wrong-group":
                    torch.distributed.all_reduce(raw.main_grad, group=data_group())

    stack.enter_context(mock.patch.object(finalize, "sum_main_gradients", mutant))
    return []


def over_data(stack: contextlib.ExitStack, kind: str) -> list[Hook]:
    if kind == "wrong-group":
        return [functools.partial(_mark, scalars_of, "allreduce", None)]
    local: dict[Any, torch.Tensor] = {}

    def before(models: list[Any]) -> None:
        local.update({raw: raw.main_grad / data_group().size() for raw in scalars_of(models)})

    def after(models: list[Any]) -> None:
        for raw in scalars_of(models):
            group = data_group() if getattr(raw, "allreduce", True) else parallel_state.get_expert_data_parallel_group()
            _again(raw.main_grad, kind, group, local[raw])

    _around_reductions(stack, before, after)
    return []


def of_norms(stack: contextlib.ExitStack, kind: str) -> list[Hook]:
    def after(models: list[Any]) -> None:
        for param in norms_of(models):
            if kind in ("doubled", "wrong-group"):
                torch.distributed.all_reduce(
                    param.main_grad, group=tensor_group() if kind == "doubled" else data_group()
                )

    _around_reductions(stack, lambda models: None, after)
    if kind == "averaged":
        return [functools.partial(_mark, norms_of, "average_gradients_across_tp_domain", True)]
    return [functools.partial(_mark, norms_of, "sequence_parallel", kind == "doubled")]


def of_expert_bias(stack: contextlib.ExitStack, kind: str) -> list[Hook]:
    return [functools.partial(_mark, expert_biases_of, "sequence_parallel", True)]


def of_norm(stack: contextlib.ExitStack, kind: str) -> list[Hook]:
    return [functools.partial(_mark, scalars_of, "tensor_model_parallel", True)]


def _again(grad: torch.Tensor, kind: str, group: Any, local: torch.Tensor) -> None:
    """Makes of a reduced gradient what a removed, doubled or averaging reduction would have."""
    if kind == "removed":
        grad.copy_(local)
    elif kind == "doubled":
        torch.distributed.all_reduce(grad, group=group)
    else:
        grad /= group.size()


def _around_reductions(stack: contextlib.ExitStack, before: Reduce, after: Reduce) -> None:
    right = finalize.finalize_model_grads

    def mutant(models: list[Any], *args: Any, **kwargs: Any) -> None:
        before(models)
        right(models, *args, **kwargs)
        after(models)

    stack.enter_context(mock.patch.object(finalize, "finalize_model_grads", mutant))


def _mark(of: Callable[[list[Any]], list[Any]], name: str, value: bool | None, models: list[Any]) -> list[Any]:
    """Sets a mark on parameters by which Megatron chooses their reduction; None: the opposite of what it is."""
    for param in of(models):
        setattr(param, name, not getattr(param, name, True) if value is None else value)
    return models


def scalars_of(models: list[Any]) -> list[Any]:
    return [raw for module in activations_of(models) for raw in module.raw_scalars()]


def norms_of(models: list[Any]) -> list[Any]:
    """Weights of the norms of hidden states: those of queries and keys are summed by name."""
    named = [pair for model in models for pair in model.named_parameters()]
    return [param for name, param in named if "norm" in name and "q_layer" not in name and "k_layer" not in name]


def expert_biases_of(models: list[Any]) -> list[Any]:
    named = [pair for model in models for pair in model.named_parameters()]
    return [param for name, param in named if ".local_experts." in name and name.endswith("linear_fc2.bias")]


REDUCTIONS: dict[str, Callable[[contextlib.ExitStack, str], list[Hook]]] = {
    "backward": in_backward,
    "finalize": in_finalize,
    "data": over_data,
    "norms": of_norms,
    "bias": of_expert_bias,
    "norm": of_norm,
}
