"""Writes a Megatron ``torch_dist`` checkpoint tensor by tensor: no Megatron, no GPU, no process group, no model.

``reader`` is the other direction and says what the format is. Each tensor has its global name and shape; its chunks
here are one layer, or one expert of one layer, whole: Megatron cuts what its ranks need out of them, in any layout.
"""

import io
import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

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

FILE_BYTES = 4 * 10**9  # a new file begins beyond it
RELEASE = "release"  # Megatron's name for weights without optimizer state: training starts at step 0


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


@dataclass
class _Files:
    """The files of a checkpoint, one after the other, and where each chunk is."""

    folder: Path
    number: int = 0
    stored: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    file: IO[bytes] | None = None

    def write(self, index: MetadataIndex, content: Tensor | bytes) -> None:
        if self.file is None:
            self.file = (self.folder / self._name).open("wb")
        start = self.file.tell()
        if isinstance(content, Tensor):
            torch.save(content, self.file)
        else:
            self.file.write(content)
        self.stored[index] = _StorageInfo(self._name, start, self.file.tell() - start)
        if self.file.tell() > FILE_BYTES:
            self.close()

    @property
    def _name(self) -> str:
        return f"__0_{self.number}.distcp"

    def close(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file, self.number = None, self.number + 1


def write_checkpoint(
    save: Path, parts: Sequence[Part], common: bytes, empty: Sequence[str], wrote: Callable[[int], None]
) -> Path:
    """Writes a ``release`` checkpoint into a save folder; what makes it complete comes last, the tracker after it.

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
    folder.mkdir()
    files = _Files(folder)
    for name, content in ((COMMON, common), *((name, _saved([None])) for name in empty)):
        files.write(MetadataIndex(name), content)
    for part in parts:
        files.write(MetadataIndex(part.key, part.chunk.offsets), _tensor(part))
        wrote(part.size_bytes)
    files.close()
    objects = {name: BytesStorageMetadata() for name in (COMMON, *empty)}
    metadata = Metadata({**objects, **_tensors(parts)}, storage_data=files.stored)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    kind = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(kind), encoding="utf-8")
    (save / TRACKER).write_text(RELEASE, encoding="utf-8")
    return folder


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
