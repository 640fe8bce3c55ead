"""Reads a Megatron ``torch_dist`` checkpoint tensor by tensor: no Megatron, no GPU, no process group, no model.

The format stores every tensor under its global name and shape, cut into chunks; which tensor- and pipeline-parallel
ranks wrote them does not matter here. Layers that are alike share one tensor with a leading layer dimension
(``decoder.layers.mlp.linear_fc1.weight`` of shape (layers, ffn, hidden)), otherwise the layer is in the name.
"""

import io
import json
import pickle
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_act.checkpoint.lengths import shortened
from megatron_act.checkpoint.restricted import read_metadata
from megatron_act.checkpoint.resume import identity_of
from megatron_act.checkpoint.safe_pickle import load_plain
from megatron_act.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
LAYERS = "decoder.layers."
COMMON = "common_state/shard_0_1"  # Megatron >= 0.19 keeps arguments and counters here, earlier versions in common.pt
NOT_MODEL = ("optimizer.", "rng_state", "rerun_state_machine_state", "common_state")


@dataclass(frozen=True)
class TensorInfo:
    """Global shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class MegatronCheckpoint:
    """A checkpoint of any tensor- and pipeline-parallel layout.

    Args:
        path: a ``--save`` folder (its tracker file names the iteration) or one ``iter_XXXXXXX`` folder in it.

    Raises:
        UserError: no such folder, no checkpoint in it, or one in another format than ``torch_dist``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = find_iteration(path)
        self._reader = FileSystemReader(self.path)
        self._metadata = self._read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def _read_metadata(self) -> Metadata:
        try:
            return read_metadata(self.path)
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
            raise UserError(
                f"{self.path}: expected a complete checkpoint, got a broken .metadata file: {error}"
            ) from error

    def check_whole(self) -> None:
        """Raises UserError for a file that is missing or shorter than ``.metadata`` says."""
        if why := shortened(self.path, self._metadata):
            raise UserError(
                f"{self.path}: expected a complete checkpoint, got a broken one ({why}): copy it again or give another "
                "iteration's folder"
            )

    @property
    def identity(self) -> str:
        """Changes when a file of the checkpoint does (`resume.identity_of`)."""
        files = sorted(path for path in self.path.iterdir() if path.is_file())
        return identity_of(files, (self.path / ".metadata").read_bytes())

    @cached_property
    def _common(self) -> dict[str, Any]:
        legacy = self.path / "common.pt"
        if legacy.is_file():
            return load_plain(io.BytesIO(legacy.read_bytes()))
        info = (self._metadata.storage_data or {}).get(MetadataIndex(COMMON))
        if info is None:
            raise UserError(
                f"{self.path}: expected Megatron's arguments in it, got none: save it with megatron.training"
            )
        with (self.path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            return load_plain(io.BytesIO(file.read(info.length)))

    @cached_property
    def args(self) -> Namespace:
        """The parsed command line that Megatron saved; values of Megatron's own types are ``safe_pickle.Foreign``."""
        args = self._common["args"]
        if not getattr(args, "group_query_attention", True):  # Megatron then ignores the count, the parser's default
            args.num_query_groups = args.num_attention_heads
        return args

    @property
    def content(self) -> dict[str, Any]:
        """What Megatron notes about the formats inside (``content_metadata``); empty in old checkpoints."""
        return self._common.get("content_metadata") or {}

    @property
    def iteration(self) -> int:
        """Optimizer steps taken when it was saved."""
        return int(self._common["iteration"])

    @cached_property
    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        entries = sorted(self._metadata.state_dict_metadata.items())
        tensors = {key: entry for key, entry in entries if not isinstance(entry, BytesStorageMetadata)}
        return {key: entry for key, entry in tensors.items() if not key.startswith(NOT_MODEL)}

    def keys(self) -> dict[str, TensorInfo]:
        """The model's tensors by name (optimizer and random state left out)."""
        return {key: self.info(key) for key in self._tensors}

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor; UserError without it."""
        stored = self._stored(name)
        return TensorInfo(tuple(stored.size), stored.properties.dtype)

    def chunks(self, name: str) -> int:
        """Into how many pieces a tensor is cut (layers x tensor-parallel ranks x fused parts)."""
        return len(self._stored(name).chunks)

    def _stored(self, name: str) -> TensorStorageMetadata:
        if name not in self._tensors:
            raise UserError(f"{self.path}: expected a tensor {name}, the checkpoint has none (see the info command)")
        return self._tensors[name]

    def tensor(self, name: str, row: tuple[int, ...] = ()) -> Tensor:
        """One whole tensor, or a row of it; memory: the result plus one stored chunk.

        Args:
            name: a key of ``keys()``.
            row: indexes into the first dimensions, which are then dropped from the result.

        Raises:
            UserError: no such tensor.
        """
        stored = self._stored(name)
        offsets = [*row, *(0 for _ in stored.size[len(row) :])]
        sizes = [*(1 for _ in row), *stored.size[len(row) :]]
        result = torch.empty(sizes, dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(name, stored, [wanted])
        self._reader.read_data(LoadPlan(items), _Into(result)).wait()
        return result.reshape(sizes[len(row) :])

    def _layer_key(self, name: str, layer: int) -> tuple[str, tuple[int, ...]]:
        if LAYERS + name in self._tensors:
            return LAYERS + name, (layer,)
        return f"{LAYERS}{layer}.{name}", ()

    def layer_info(self, name: str, layer: int) -> TensorInfo:
        """Shape and dtype of one layer's tensor; ``name`` is what follows ``decoder.layers.``."""
        key, row = self._layer_key(name, layer)
        stored = self._stored(key)
        return TensorInfo(tuple(stored.size)[len(row) :], stored.properties.dtype)

    def has_layer_tensor(self, name: str, layer: int) -> bool:
        """Whether a layer has a tensor of that name."""
        return self._layer_key(name, layer)[0] in self._tensors

    def layer_tensor(self, name: str, layer: int, row: tuple[int, ...] = ()) -> Tensor:
        """One layer's tensor, whichever way the layers are stored, or a row of it; layers count from 0."""
        key, first = self._layer_key(name, layer)
        return self.tensor(key, first + row)


class _Into(DefaultLoadPlanner):
    """A load plan whose every read item fills its part of one tensor."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.result
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return None


def has_torch_dist(path: str | Path) -> bool:
    """Whether ``path`` holds a ``torch_dist`` checkpoint (other formats have a ``.metadata`` too)."""
    try:
        kind = json.loads((find_iteration(path) / "metadata.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return False
    return kind.get("sharded_backend") == "torch_dist"


def chosen(load: str | Path, ckpt_step: int | None) -> Path:
    """What Megatron will load: the ``--load`` folder, or with ``--ckpt-step`` that iteration in it."""
    return Path(load) / f"iter_{ckpt_step:07d}" if ckpt_step else Path(load)


def find_iteration(path: str | Path) -> Path:
    """The ``iter_XXXXXXX`` folder that a save folder's tracker names, or ``path`` itself if it is one.

    Raises:
        UserError: no such folder, nothing saved in it, or not a ``torch_dist`` checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: expected a folder with a Megatron checkpoint, got {'a file' if path.exists() else 'nothing'}"
        )
    folder = path if (path / ".metadata").is_file() else _tracked(path)
    if not (folder / ".metadata").is_file():
        kind = "an incomplete folder" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: expected a torch_dist checkpoint (.metadata), got {kind}: save with --ckpt-format torch_dist"
        )
    return folder


def _tracked(path: Path) -> Path:
    tracker = path / TRACKER
    if not tracker.is_file():
        raise UserError(
            f"{path}: expected a Megatron checkpoint ({TRACKER} or .metadata), got neither: give the --save folder"
        )
    word = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if word == "release":
        return path / word
    if not word.isdigit():
        raise UserError(f"{tracker}: expected an iteration number, got {word[:40]!r}")
    return path / f"iter_{int(word):07d}"
