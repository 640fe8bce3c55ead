"""Writes down every batch that a rank reads, before it is broadcast to the other tensor-parallel ranks."""

import os
from pathlib import Path
from typing import Any

import torch

from megatron_act import gpt_step
from megatron_act.data import dali, dali_loaders


def prepare(folder: str, without_dali: bool) -> None:
    """Arms a rank.

    Args:
        folder: for ``RANK.pt``, a list of batches, empty ones for ranks that wait for the broadcast.
        without_dali: let plain iteration stand for DALI, where that is not installed.
    """
    if without_dali:
        dali.DaliLoader._start = _iterate  # type: ignore[method-assign]
        dali.is_installed = lambda: True
        dali_loaders.version = lambda: "stand-in"
    batches: list[dict[str, Any]] = []
    file = Path(folder) / f"{os.environ['RANK']}.pt"
    original = gpt_step.get_batch_on_this_tp_rank

    def record(batch: dict[str, Any], **kwargs: Any) -> Any:
        batches.append({name: None if value is None else value.clone() for name, value in batch.items()})
        torch.save(batches, file)
        return original(batch, **kwargs)

    gpt_step.get_batch_on_this_tp_rank = record


def _iterate(loader: dali.DaliLoader) -> Any:
    for arrays in loader.batches:
        yield [dict(zip(loader.batches.fields, map(torch.from_numpy, arrays), strict=True))]
