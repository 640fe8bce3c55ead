"""Everything that a ``torch_dist`` checkpoint holds, for comparing two of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_act.checkpoint.safe_pickle import load_plain

# They tell where and how long a run ran, not what it computed.
NOT_VALUES = ("args", "rerun_state_machine")


def all_values(folder: Path) -> dict[str, Any]:
    """Tensors and objects by key: weights, moments, step counts, random states, schedules."""
    reader = checkpoint.FileSystemReader(folder)
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor(entry) else io.BytesIO()
        for key, entry in reader.read_metadata().state_dict_metadata.items()
    }
    checkpoint.load(state, storage_reader=reader, no_dist=True)
    values = {key: value if torch.is_tensor(value) else decoded(value) for key, value in state.items()}
    return {key: value for key, value in values.items() if not key.startswith(NOT_VALUES)}


def is_tensor(entry: Any) -> bool:
    return isinstance(entry, TensorStorageMetadata)


def decoded(value: Any) -> Any:
    if isinstance(value, io.BytesIO):
        value.seek(0)
        value = load_plain(value)
    parts = value[0] if isinstance(value, list) and isinstance(value[0], dict) else value
    if not isinstance(parts, dict):
        return value
    return {key: part for key, part in parts.items() if key not in NOT_VALUES}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places at which two nested values are not bit for bit the same."""
    if torch.is_tensor(one) or isinstance(one, np.ndarray):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{where}/{key}" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            found += differences(one[key], other[key], f"{where}/{key}")
        return found
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return differences(dict(enumerate(one)), dict(enumerate(other)), where)
    return [] if type(one) is type(other) and one == other else [where]
