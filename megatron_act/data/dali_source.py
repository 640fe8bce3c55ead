"""Megatron's batches as NVIDIA DALI reads them: arrays, in Megatron's order, here or in a worker process of DALI's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, default_collate


@dataclass(frozen=True)
class Batches:
    """The batches of one of Megatron's data loaders as tuples of arrays; each iteration starts at the sampler's start.

    Attributes:
        dataset: GPTDataset, MockGPTDataset or a blend of them: a number in, a dictionary of tensors out.
        sampler: Megatron's batch sampler: lists of sample numbers, those of this data-parallel rank from the first not
            yet consumed.
        again: start over at the end (``--dataloader-type cyclic``).
        fields: the dictionary's keys, in the order of the arrays.
    """

    dataset: Any
    sampler: Any
    again: bool
    fields: tuple[str, ...]

    @classmethod
    def of(cls, loader: DataLoader, again: bool) -> "Batches":
        """What ``loader`` would read, in the order in which it would."""
        return cls(loader.dataset, loader.batch_sampler, again, tuple(loader.dataset[0]))

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        for numbers in chain.from_iterable(repeat(self.sampler) if self.again else [self.sampler]):
            batch: Mapping[str, Any] = default_collate([self.dataset[number] for number in numbers])
            yield tuple(batch[field].numpy() for field in self.fields)
