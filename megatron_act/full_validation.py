"""``--full-validation``: every held-out token once, in stored order, the same for every run, seed and layout.

Megatron shuffles the documents of a validation set by ``--seed`` and cuts the result into samples: two seeds see other
contexts. Its full validation reads batches of one sample, which tensor- and pipeline-parallel peers do not expect where
``--micro-batch-size`` is another, and in 0.19 it fails with a single validation set and with tensor parallelism. Here
the files of ``--valid-data-path`` are one stream; windows of ``--seq-length`` tokens, each beginning where the one
before ended, predict all of it but the first token. What fills the last window and the last batch up is masked.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.training import training as megatron_loop

from megatron_act.stored_tokens import Stream

Batch = dict[str, torch.Tensor]


class HeldOut:
    """The held-out stream as the micro-batches of this data-parallel rank.

    Args:
        args: Megatron's parsed arguments.
        rank: data-parallel rank.
        ranks: data-parallel size.
    """

    def __init__(self, args: Namespace, rank: int, ranks: int) -> None:
        self.args, self.rank, self.ranks = args, rank, ranks
        self.stream = Stream(args.valid_data_path)
        self.micro_batch = args.eval_micro_batch_size
        self.micro_batches = args.eval_global_batch_size // (self.micro_batch * ranks)

    @property
    def predicted(self) -> int:
        """Tokens with a loss: all but the first."""
        return len(self.stream) - 1

    @property
    def iterations(self) -> int:
        """Global batches that hold all windows."""
        return math.ceil(math.ceil(self.predicted / self.args.seq_length) / self.args.eval_global_batch_size)

    def batches(self) -> Iterator[Batch]:
        """The micro-batches of one pass, equally many on every rank."""
        for number in range(self.iterations * self.micro_batches):
            first = (number * self.ranks + self.rank) * self.micro_batch
            yield self.collate([self.window(first + offset) for offset in range(self.micro_batch)])

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (seq_length + 1) and loss mask (seq_length) of window ``index``, padded with masked zeros."""
        length = self.args.seq_length
        tokens = self.stream.tokens(index * length, (index + 1) * length + 1)
        known = max(0, len(tokens) - 1)
        mask = np.arange(length) < known
        return np.pad(tokens, (0, length + 1 - len(tokens))), mask

    def collate(self, windows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
        """A micro-batch as Megatron's GPT datasets give it: each field (micro batch, seq_length)."""
        tokens = torch.from_numpy(np.stack([tokens for tokens, _ in windows]))
        length = self.args.seq_length
        batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.from_numpy(np.stack([mask for _, mask in windows])).float(),
            "position_ids": torch.arange(length).expand(len(windows), length).contiguous(),
        }
        if self.args.create_attention_mask_in_dataloader:
            future = ~torch.ones(length, length, dtype=torch.bool).tril()
            batch["attention_mask"] = future.expand(len(windows), 1, length, length).contiguous()
        return batch


def serves(args: Namespace) -> bool:
    """Whether the flags ask for the full validation of local files without weights; else it stays Megatron's."""
    words = args.valid_data_path or []
    wanted = args.full_validation and not args.multiple_validation_sets
    return bool(wanted and words and all(Path(word + ".idx").is_file() for word in words))


def install(args: Namespace) -> None:
    """Takes the evaluation of Megatron's loop over where the flags ask for it; called before the data are built.

    The flag itself is put out: with it Megatron 0.19 asks ranks without a loader for its length.
    """
    if not serves(args):
        return
    args.full_validation, args.eval_iters = False, 1  # a validation set that nobody reads need not be long
    megatron_loop.evaluate = _with_fixed_batches(args, megatron_loop.evaluate)


def _with_fixed_batches(args: Namespace, original: Callable[..., Any]) -> Callable[..., Any]:
    @cache  # at the first evaluation, when the process groups exist
    def held_out() -> HeldOut:
        return HeldOut(args, mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size())

    def evaluate(step: Any, iterator: Any, models: Any, *rest: Any, **kwargs: Any) -> Any:
        batches, chunked = held_out().batches, isinstance(iterator, list)  # a list: one per virtual pipeline chunk
        fixed: Any = [batches() for _ in models] if chunked else batches()
        return original(step, fixed, models, *rest, **{**kwargs, "eval_iters": held_out().iterations})

    return evaluate
