"""Writes a Hugging Face model folder: safetensors shards one tensor at a time, then all of it at once under its name.

A safetensors file is an 8-byte little-endian length, a JSON header (name: dtype, shape, byte range), then the tensors'
bytes in that order. All names and shapes are known before the first tensor is read, so that the header comes first and
memory holds one tensor, never a shard.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_act.checkpoint.resume import Finished, whole_folder
from megatron_act.errors import UserError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}

log = logging.getLogger(__name__)


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


def shard_bytes(size: str) -> int:
    """Bytes of a ``--max-shard-size`` as transformers writes it: ``5GB``, ``200MB``; UserError for anything else."""
    unit = UNITS.get(size[-2:].upper(), 0)
    try:
        found = int(float(size[:-2]) * unit)
    except (ValueError, OverflowError):
        found = 0
    if found <= 0:
        raise UserError(f"--max-shard-size: expected a size such as 5GB or 200MB, got {size!r}")
    return found


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
    """Writes all tensors, and the index where there is more than one file; keeps files that `resume` knows to be whole.

    Args:
        folder: an existing folder.
        entries: in the order in which reading them is cheapest.
        max_bytes: largest size of one file's tensors.
        wrote: called with each tensor's number of bytes.
    """
    files, finished = shards(entries, max_bytes), Finished(folder)
    for path in folder.glob("*.safetensors*"):  # of an interrupted conversion: half a file, or files of another size
        if path.name not in files:
            path.unlink()
    kept = []
    for name, group in files.items():
        if _starts_with(folder / name, _header(_ordered(group))) and finished.keeps(name):
            kept.append(name)
            wrote(sum(entry.size_bytes for entry in group))
        else:
            finished.add(name, write_file(folder / name, group, wrote))
    if kept:
        log.warning("%d of %d weight files kept from an interrupted conversion, checksums equal", len(kept), len(files))
    if len(files) > 1:
        total = sum(entry.size_bytes for entry in entries)
        weights = {entry.name: name for name, group in files.items() for entry in group}
        parameters = sum(math.prod(entry.shape) for entry in entries if entry.shape)  # constants have no dimension
        index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weights}
        write_json(folder / INDEX, index)


def _starts_with(path: Path, header: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def write_file(path: Path, entries: Sequence[Entry], wrote: Callable[[int], None]) -> str:
    """Writes one safetensors file, which takes its name when it is on the disk; returns its sha256."""
    ordered, digest = _ordered(entries), hashlib.sha256()
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:

        def put(block: bytes | memoryview) -> None:
            digest.update(block)
            file.write(block)

        put(_header(ordered))
        for entry in ordered:
            put(_values(entry))
            wrote(entry.size_bytes)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return digest.hexdigest()


def _ordered(entries: Sequence[Entry]) -> list[Entry]:
    """Wide types first, so that every tensor is aligned to its element size."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def _values(entry: Entry) -> memoryview:
    tensor = entry.read().to(entry.dtype).contiguous()
    if tuple(tensor.shape) != entry.shape:
        raise RuntimeError(f"{entry.name}: expected shape {entry.shape}, got {tuple(tensor.shape)}")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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
def complete_folder(output: Path, overwrite: bool, identity: str = "") -> Iterator[Path]:
    """A folder beside ``output`` that takes its name when the block ends without an exception (`resume.whole_folder`).

    Args:
        output: the folder to make.
        overwrite: replace an existing model folder.
        identity: of the input and options: with it, the next conversion uses an interrupted one's finished files.

    Raises:
        UserError: `check_output` refuses, the place cannot be written, or another process writes it.
    """
    check_output(output, overwrite)
    with whole_folder(output, identity) as folder:
        yield folder
