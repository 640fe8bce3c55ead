"""Writes a Megatron ``torch_dist`` checkpoint tensor by tensor: no Megatron, no GPU, no process group, no model.

``reader`` is the other direction and says what the format is. Each tensor has its global name and shape; its chunks
here are one layer, or one expert of one layer, whole: Megatron cuts what its ranks need out of them, in any layout.
"""

import hashlib
import io
import json
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_act.checkpoint.reader import COMMON, TRACKER
from megatron_act.checkpoint.resume import Finished

FILE_BYTES = 10**9  # a new file begins beyond it; what an interruption costs at most
RELEASE = "release"  # Megatron's name for weights without optimizer state: training starts at step 0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One chunk: ``row`` of the tensor ``key`` (indexes into its first dimensions), read when it is written."""

    key: str
    row: tuple[int, ...]
    rows: tuple[int, ...]  # sizes of those dimensions: layers, or layers and experts
    shape: tuple[int, ...]  # of what ``read`` returns
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where the part is in the whole tensor."""
        offsets = (*self.row, *(0 for _ in self.shape))
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size((*(1 for _ in self.row), *self.shape)))

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Chunk = tuple[MetadataIndex, Part | bytes]


def planned_files(parts: Sequence[Part], common: bytes, empty: Sequence[str]) -> dict[str, list[Chunk]]:
    """What each file of a checkpoint holds, in order: first the objects, then the parts."""
    objects = {COMMON: common} | dict.fromkeys(empty, _saved([None]))
    chunks: list[Chunk] = [(MetadataIndex(name), content) for name, content in objects.items()]
    chunks += [(MetadataIndex(part.key, part.chunk.offsets), part) for part in parts]
    groups: list[list[Chunk]] = [[]]
    filled = 0
    for chunk in chunks:
        if filled > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(chunk)
        filled += _size(chunk)
    return {f"__0_{number}.distcp": group for number, group in enumerate(groups)}


def _size(chunk: Chunk) -> int:
    return len(chunk[1]) if isinstance(chunk[1], bytes) else chunk[1].size_bytes


class _Hashed:
    """A file that is written from its beginning, and its bytes' sha256."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.length = file, hashlib.sha256(), 0

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        self.length += len(block)
        return self.file.write(block)

    def flush(self) -> None:
        self.file.flush()


def write_file(path: Path, chunks: Sequence[Chunk], wrote: Callable[[int], None]) -> tuple[list[list[int]], str]:
    """Writes one file, which takes its name when it is on the disk.

    Returns:
        Offset and length of each chunk, and the file's sha256.
    """
    spans, partial = [], path.with_name(f"{path.name}.partial")
    with partial.open("wb") as raw:
        file: Any = _Hashed(raw)
        for chunk in chunks:
            start, content = file.length, chunk[1]
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(_tensor(content), file)
            spans.append([start, file.length - start])
            wrote(_counted(chunk))
        raw.flush()
        os.fsync(raw.fileno())
    partial.replace(path)
    return spans, file.digest.hexdigest()


def _counted(chunk: Chunk) -> int:
    """Bytes of tensors, of which the progress is."""
    return 0 if isinstance(chunk[1], bytes) else _size(chunk)


def write_checkpoint(
    save: Path, parts: Sequence[Part], common: bytes, empty: Sequence[str], wrote: Callable[[int], None]
) -> Path:
    """Writes a ``release`` checkpoint into a save folder; what makes it complete comes last, the tracker after it.

    Files that `resume` knows to be whole are kept.

    Args:
        save: an existing folder, Megatron's ``--load`` of the run to come.
        parts: all chunks of all tensors, in the order in which reading them is cheapest.
        common: what Megatron keeps beside tensors (arguments, counters), as ``torch.save`` writes it.
        empty: names of objects that Megatron expects and that hold nothing (``_extra_state``).
        wrote: called with each part's number of bytes.

    Returns:
        The checkpoint's folder.
    """
    folder = save / RELEASE
    folder.mkdir(exist_ok=True)
    stored = _write_files(save, planned_files(parts, common, empty), wrote)
    objects = {name: BytesStorageMetadata() for name in (COMMON, *empty)}
    metadata = Metadata({**objects, **_tensors(parts)}, storage_data=stored)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    kind = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(kind), encoding="utf-8")
    (save / TRACKER).write_text(RELEASE, encoding="utf-8")
    return folder


def _write_files(
    save: Path, files: dict[str, list[Chunk]], wrote: Callable[[int], None]
) -> dict[MetadataIndex, _StorageInfo]:
    """Writes what is not finished; returns where each chunk is."""
    finished, kept, stored = Finished(save), 0, {}
    for file, chunks in files.items():
        name = f"{RELEASE}/{file}"
        if finished.keeps(name):
            kept += 1
            wrote(sum(map(_counted, chunks)))
        else:
            spans, sha256 = write_file(save / name, chunks, wrote)
            finished.add(name, sha256, spans=spans)
        for (index, _), span in zip(chunks, finished.files[name]["spans"], strict=True):
            stored[index] = _StorageInfo(file, *span)
    if kept:
        log.warning("%d of %d weight files kept from an interrupted conversion, checksums equal", kept, len(files))
    return stored


def _tensor(part: Part) -> Tensor:
    tensor = part.read()
    if tuple(tensor.shape) != part.shape or tensor.dtype != part.dtype:
        raise RuntimeError(f"{part.key}: expected {part.shape} {part.dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
    return tensor.reshape(part.chunk.sizes).contiguous()


def _tensors(parts: Sequence[Part]) -> dict[str, TensorStorageMetadata]:
    found: dict[str, TensorStorageMetadata] = {}
    for part in parts:
        if part.key not in found:
            properties = TensorProperties(dtype=part.dtype)
            found[part.key] = TensorStorageMetadata(properties, torch.Size((*part.rows, *part.shape)), [])
        found[part.key].chunks.append(part.chunk)
    return found


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
