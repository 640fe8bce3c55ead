"""DALI in place of Megatron's data loaders, as its ``--dataloader-type external``.

With that type Megatron uses whatever the dataset provider returns as iterators (``build_pretraining_data_loader`` of
megatron/training/datasets/data_samplers.py). Its own loader is built all the same, and never started: it says which
samples this rank reads.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from megatron.training import print_rank_0
from megatron.training.datasets.data_samplers import build_pretraining_data_loader

from megatron_act.data.dali import DaliLoader, version
from megatron_act.data.dali_source import Batches


def loaders(datasets: Sequence[Any], args: Namespace) -> tuple[DaliLoader | None, ...]:
    """Train, validation and test loaders for ``pretrain`` in place of the data sets, from where each was left.

    Args:
        datasets: the three, each None where this rank reads none (tensor-parallel rank 0 reads and broadcasts).
        args: Megatron's arguments; ``dataloader_type`` becomes "external", ``sample_order`` what it was.
    """
    if "sample_order" not in args:  # each virtual stage comes here
        args.sample_order = args.dataloader_type
        _announce(args.num_workers)
    args.dataloader_type = args.sample_order
    starts = (_consumed(args), 0 if args.skip_train else args.consumed_valid_samples, 0)
    read = (None if args.skip_train else datasets[0], *datasets[1:])
    theirs = [build_pretraining_data_loader(dataset, start) for dataset, start in zip(read, starts, strict=True)]
    args.dataloader_type = "external"
    again = args.sample_order == "cyclic"
    return tuple(loader and _in_dali(loader, again, args.num_workers) for loader in theirs)


def _in_dali(loader: Any, again: bool, workers: int) -> DaliLoader:
    return DaliLoader(Batches.of(loader, again), loader.batch_sampler.micro_batch_size, workers)


def _consumed(args: Namespace) -> int:
    """Training samples consumed before this run, of its phase where there are phases (as Megatron counts them)."""
    if not args.phase_transition_iterations:
        return args.consumed_train_samples
    phase = max(start for start in (0, *args.phase_transition_iterations) if start <= args.iteration)
    return (args.iteration - phase) * args.global_batch_size


def _announce(workers: int) -> None:
    where = "in a process of its own" if workers else "in the training process"
    print_rank_0(f"> megatron-act: NVIDIA DALI {version()} reads Megatron's samples, {where}")
