"""Writes a Hugging Face model folder: safetensors shards one tensor at a time, then all of it at once under its name.

A safetensors file is an 8-byte little-endian length, a JSON header (name: dtype, shape, byte range), then the tensors'
bytes in that order. All names and shapes are known before the first tensor is read, so that the header comes first and
memory holds one tensor, never a shard.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_act.errors import UserError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its header now, its values when ``read`` is called."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards(entries: Sequence[Entry], max_bytes: int) -> dict[str, list[Entry]]:
    """Distributes tensors over files in order; a tensor above ``max_bytes`` gets a file of its own.

    Returns:
        Entries by file name, Hugging Face's names: ``model.safetensors``, or ``model-00001-of-0000N.safetensors``.
    """
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.size_bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.size_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def write_model(folder: Path, entries: Sequence[Entry], max_bytes: int, wrote: Callable[[int], None]) -> None:
    """Writes all tensors, and the index where there is more than one file.

    Args:
        folder: an existing folder.
        entries: in the order in which reading them is cheapest.
        max_bytes: largest size of one file's tensors.
        wrote: called with each tensor's number of bytes.
    """
    files = shards(entries, max_bytes)
    for name, group in files.items():
        write_file(folder / name, group, wrote)
    if len(files) > 1:
        total = sum(entry.size_bytes for entry in entries)
        weights = {entry.name: name for name, group in files.items() for entry in group}
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        write_json(folder / INDEX, index)


def write_file(path: Path, entries: Sequence[Entry], wrote: Callable[[int], None]) -> None:
    """Writes one safetensors file; wide types first, so that every tensor is aligned to its element size."""
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with path.open("wb") as file:
        file.write(_header(ordered))
        for entry in ordered:
            tensor = entry.read().to(entry.dtype).contiguous()
            if tuple(tensor.shape) != entry.shape:
                raise RuntimeError(f"{entry.name}: expected shape {entry.shape}, got {tuple(tensor.shape)}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            wrote(entry.size_bytes)


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.size_bytes
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_json(path: Path, content: dict) -> None:
    """Writes JSON the way Hugging Face does: two spaces, a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_output(output: Path, overwrite: bool) -> None:
    """Refuses a folder that must not be replaced: without ``overwrite`` any, with it one that holds no model.

    Raises:
        UserError: the output exists.
    """
    if not output.exists():
        return
    if not overwrite:
        raise UserError(
            f"--output {output}: expected a new folder, got an existing one: choose another or add --overwrite"
        )
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
        raise UserError(
            f"--output {output}: expected a model folder to overwrite (config.json in it), got something else"
        )


@contextlib.contextmanager
def complete_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name when the block ends without an exception.

    Raises:
        UserError: `check_output` refuses, or the place cannot be written.
    """
    check_output(output, overwrite)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"--output {output}: expected a place to write to, got {error.strerror}") from None
    try:
        yield partial
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
