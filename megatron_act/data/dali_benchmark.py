"""Megatron's loader and DALI's on the samples of one data set: first found equal, then timed."""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader

from megatron_act.data.dali import DaliLoader
from megatron_act.data.dali_source import Batches

COMPARED = 16  # batches compared value by value
WARM_UP = 8  # batches read before the clock starts: workers start with the first

Batch = dict[str, torch.Tensor]
Start = Callable[[], Iterator[Batch]]


@dataclass(frozen=True)
class Load:
    """What is read: sequences of `seq_length` tokens, `micro_batch_size` a batch, `batches` in each of `repeats`."""

    seq_length: int
    micro_batch_size: int
    batches: int
    repeats: int

    @property
    def samples(self) -> int:
        """As many as one loader reads in all."""
        return (WARM_UP + self.batches * self.repeats) * self.micro_batch_size


@dataclass(frozen=True)
class Row:
    """A loader's tokens per second in millions, in each repeat; `processes` read ahead (0: the training process)."""

    loader: str
    processes: int
    rates: tuple[float, ...]


def open_dataset(prefix: str, load: Load, cache: Path) -> GPTDataset:
    """Megatron's GPTDataset on `prefix`, with the attention mask left to the kernels, as on GPUs."""
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=load.seq_length,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Namespace(eod=0, pad=-1, vocab_size=None, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [load.samples, 0, 0], lambda: True, config).build()[0]


def contenders(dataset: GPTDataset, load: Load, workers: list[int]) -> dict[tuple[str, int], Start]:
    """By name and number of processes, how to start each loader on the first sample."""
    starts: dict[tuple[str, int], Start] = {}
    for count in workers:
        theirs = _megatron(dataset, load, count)
        ours = DaliLoader(Batches.of(theirs, again=False), load.micro_batch_size, count)
        starts["Megatron", count] = partial(_moved, theirs)
        starts["DALI", min(count, 1)] = partial(iter, ours)
    return starts


def _megatron(dataset: GPTDataset, load: Load, workers: int) -> DataLoader:
    """As Megatron's ``build_pretraining_data_loader`` makes it on one rank."""
    sampler: Any = MegatronPretrainingSampler(len(dataset), 0, load.micro_batch_size, 0, 1)
    pin, persistent = torch.cuda.is_available(), workers > 0
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, pin_memory=pin, persistent_workers=persistent
    )


def _moved(batches: DataLoader) -> Iterator[Batch]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for batch in batches:
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def compare(starts: dict[tuple[str, int], Start]) -> None:
    """Reads `COMPARED` batches of every loader.

    Raises:
        RuntimeError: two loaders differ in a value, type or shape.
    """
    reference: list[Batch] = []
    for name, start in starts.items():
        batches = [batch for batch, _ in zip(start(), range(COMPARED), strict=False)]
        reference = reference or batches
        for number, (got, want) in enumerate(zip(batches, reference, strict=True)):
            if not all(torch.equal(got[field], want[field]) for field in want | got):
                raise RuntimeError(f"expected equal batches, got others from {name} at batch {number}")


def measure(starts: dict[tuple[str, int], Start], load: Load) -> list[Row]:
    """Times the loaders one after the other: processes of one that fill their queues would slow down the next."""
    return [Row(loader, processes, _rates(start(), load)) for (loader, processes), start in starts.items()]


def _rates(iterator: Iterator[Batch], load: Load) -> tuple[float, ...]:
    _read(iterator, WARM_UP)
    tokens = load.batches * load.micro_batch_size * load.seq_length
    return tuple(tokens / _read(iterator, load.batches) / 1e6 for _ in range(load.repeats))


def _read(iterator: Iterator[Batch], batches: int) -> float:
    """Seconds for that many batches, the copies to the GPU included."""
    started = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| loader | reading processes | Mtok/s: median (range) |", "|---|--:|--:|"]
    for row in rows:
        spread = f"{median(row.rates):.1f} ({min(row.rates):.1f}-{max(row.rates):.1f})"
        lines.append(f"| {row.loader} | {row.processes or 'none, the training process'} | {spread} |")
    return "\n".join(lines)
