"""Checks that every rank trains the same scalars: their gradients are reduced exactly once, their values agree.

Equal values alone prove little: Adam's first step moves a scalar by the learning rate whatever the size of its
gradient, and a gradient that was summed twice is wrong on all ranks alike. So at the first step each final gradient is
compared with partials that ``parallel.GradientProbe`` collected and that are summed here, apart from Megatron.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_act.activation import TrainableActivation, activations_of

GRADIENT_TOLERANCE = 1e-3  # of the sum of the absolute partials: the order of fp32 additions differs
VALUE_TOLERANCE = 1e-5  # of max(1, |value|): ranks may add in different orders, a lost reduction shows in 1e-3
REMEDY = (
    "reduce the scalars' gradients by megatron_act alone: no sequence_parallel or average_gradients_across_tp_domain "
    "attribute on them, no all-reduce of your own, one call of finalize_model_grads_func per step"
)


@dataclass(frozen=True)
class Scalar:
    """One scalar of this rank with the groups over which it is replicated."""

    model: DistributedDataParallel
    activation: TrainableActivation
    index: int

    @property
    def param(self) -> Any:
        """The parameter, with the ``main_grad`` that Megatron's DDP has given it."""
        return self.activation.raw_scalars()[self.index]

    @property
    def label(self) -> str:
        return f"layer {self.activation.layer_number}, {self.activation.activation.params[self.index].name}"

    @property
    def groups(self) -> tuple[torch.distributed.ProcessGroup, torch.distributed.ProcessGroup]:
        """Tensor-parallel group, data-parallel group (context-parallel ranks included)."""
        shared = getattr(self.param, "allreduce", True)  # Megatron's mark: False where experts are spread over ranks
        return self.activation.tp_group, self.model.dp_cp_group if shared else self.model.expt_dp_group


def _by_groups(models: Sequence[DistributedDataParallel]) -> Iterator[tuple[tuple, list[Scalar]]]:
    found: dict[tuple, list[Scalar]] = {}
    for model in models:
        for activation in activations_of(model):
            for index, param in enumerate(activation.raw_scalars()):
                scalar = Scalar(model, activation, index)
                if param.requires_grad:
                    found.setdefault(scalar.groups, []).append(scalar)
    yield from found.items()


def check_values(models: Sequence[DistributedDataParallel]) -> None:
    """Compares each raw scalar with its replicas on tensor- and data-parallel ranks; collective, one small message.

    Raises:
        RuntimeError: replicas that differ; names layer, scalar and the extreme values.
    """
    for groups, scalars in _by_groups(models):
        values = torch.cat([scalar.param.detach().float() for scalar in scalars])
        for group, axis in zip(groups, ("tensor", "data"), strict=True):
            extremes = torch.stack([values, -values])
            torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
            _raise_on_spread(scalars, extremes, f"{group.size()} {axis}-parallel ranks")


def _raise_on_spread(scalars: list[Scalar], extremes: torch.Tensor, ranks: str) -> None:
    largest, smallest = extremes[0], -extremes[1]
    wrong = largest - smallest > VALUE_TOLERANCE * largest.abs().clamp(min=1)
    if not wrong.any():
        return
    first = int(wrong.nonzero()[0])
    label = [scalar.label for scalar in scalars for _ in range(scalar.param.numel())][first]
    raise RuntimeError(
        f"{label}: expected equal raw values on {ranks}, got {float(smallest[first]):.7g} to "
        f"{float(largest[first]):.7g} ({int(wrong.sum())} of {len(wrong)} scalars differ): {REMEDY}"
    )


def check_gradients(models: Sequence[DistributedDataParallel], num_tokens: torch.Tensor | None) -> bool:
    """Compares each scalar's final ``main_grad`` with the probes' partials, summed over all its replicas.

    Expected is ``sum over data-parallel and tensor-parallel ranks / D``, with D the tokens of the global batch under
    per-token loss, else the data-parallel size (Megatron's own convention). Collective, one small message per group.

    Args:
        models: chunks whose activations carry a probe.
        num_tokens: as given to ``finalize_model_grads``, which has summed it over the ranks since.

    Returns:
        True if at least one gradient was large enough to tell right from wrong.

    Raises:
        RuntimeError: a gradient that is not the expected one; names layer, scalar, values, their ratio and the remedy.
    """
    conclusive = False
    for groups, scalars in _by_groups(models):
        totals = torch.cat([_partials(scalar) for scalar in scalars], dim=1)
        for group in groups:
            torch.distributed.all_reduce(totals, group=group)
        divisor = scalars[0].model.dp_cp_group.size() if num_tokens is None else max(1, int(num_tokens))
        expected, bound = totals[0] / divisor, GRADIENT_TOLERANCE * totals[1] / divisor
        conclusive |= bool((expected.abs() > bound).any())
        _raise_on_difference(scalars, expected, bound)
    return conclusive


def _partials(scalar: Scalar) -> torch.Tensor:
    assert scalar.activation.probe is not None
    return scalar.activation.probe.totals[scalar.index]


def _raise_on_difference(scalars: list[Scalar], expected: torch.Tensor, bound: torch.Tensor) -> None:
    sizes = [scalar.param.numel() for scalar in scalars]
    for scalar, want, limit in zip(scalars, expected.split(sizes), bound.split(sizes), strict=True):
        if not is_final_here(scalar):
            continue
        got = scalar.param.main_grad.double()
        wrong = (got - want).abs() > limit
        if wrong.any():
            got, want = float(got[wrong][0]), float(want[wrong][0])
            tensor, data = (group.size() for group in scalar.groups)
            raise RuntimeError(
                f"{scalar.label}: expected the gradient {want:.6g}, the sum of all ranks' partials, got {got:.6g}: "
                f"ratio {got / want if want else float('inf'):.4g}, expected 1 ({tensor} tensor-parallel, {data} "
                f"data-parallel ranks; {tensor} means summed twice, another ratio not at all): {REMEDY}"
            )


def is_final_here(scalar: Scalar) -> bool:
    """Whether this rank's ``main_grad`` is the reduced one: after a reduce-scatter one data-parallel rank's is."""
    if not scalar.model.ddp_config.use_distributed_optimizer or scalar.model.force_all_reduce:
        return True
    group = scalar.model.param_to_bucket_group[scalar.param]
    bucket = next(bucket for bucket in group.buckets if scalar.param in bucket.params)
    start, _ = bucket.param_to_index[scalar.param]
    shard = bucket.grad_data.numel() // group.intra_distributed_optimizer_instance_size
    return start // shard == group.intra_distributed_optimizer_instance_rank


def refresh_values(models: Sequence[Any]) -> None:
    """Gives every rank the scalars as the optimizer left them, where parameter gathers are overlapped.

    Megatron then gathers parameters in the next forward pass only; until then a rank holds new values of its own shard
    beside old ones. What is written here is what that gather will write. Collective, one small message per group.

    Args:
        models: model chunks; those that do not overlap gathers have nothing to do.
    """
    overlapped = [model for model in models if isinstance(model, DistributedDataParallel) and _lags(model)]
    by_group: dict[Any, list[Scalar]] = {}
    for _, scalars in _by_groups(overlapped):
        for scalar in scalars:
            owners = scalar.model.param_to_bucket_group[scalar.param].intra_distributed_optimizer_instance_group
            by_group.setdefault(owners, []).append(scalar)
    for group, scalars in by_group.items():
        fresh = torch.cat([scalar.param.detach() * is_final_here(scalar) for scalar in scalars])
        torch.distributed.all_reduce(fresh, group=group)
        sizes = [scalar.param.numel() for scalar in scalars]
        for scalar, value in zip(scalars, fresh.split(sizes), strict=True):
            scalar.param.data.copy_(value)


def _lags(model: DistributedDataParallel) -> bool:
    return model.ddp_config.overlap_param_gather and model.ddp_config.use_distributed_optimizer
