"""A checkpoint is data: reading one runs no code from it.

torch unpickles two parts of a ``torch_dist`` checkpoint without restriction, and Megatron through torch: ``.metadata``
(``FileSystemReader.read_metadata``) and every value that is not a tensor, such as random states
(``DefaultLoadPlanner.load_bytes``, ``weights_only=False``). Whoever wrote the folder could run code on all ranks.
``install`` puts a look in front of both. The second honours torch's own TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1, for values
of a type that Megatron does not register with torch, in a checkpoint that you trust.
"""

import dataclasses
import io
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import get_unsafe_globals_in_checkpoint

from megatron_act.errors import UserError

_PACKAGES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")  # their dataclasses and enums
_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows what ``.metadata`` is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if "." not in name and (module == "torch" or module.startswith(_PACKAGES)):
            found = super().find_class(module, name)
            plain = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum))
            if isinstance(found, torch.dtype) or (plain and module != "torch"):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's metadata")


def read_metadata(checkpoint: Path) -> Metadata:
    """What ``.metadata`` says, as ``FileSystemReader.read_metadata`` does.

    Args:
        checkpoint: an ``iter_XXXXXXX`` folder.

    Raises:
        pickle.UnpicklingError: it needs something else than metadata's own types; broken files raise as pickle does.
    """
    with (checkpoint / ".metadata").open("rb") as file:
        return _MetadataUnpickler(file).load()


def install() -> None:
    """For Megatron in this process: its checkpoints are looked at before torch unpickles them."""
    FileSystemReader.read_metadata = _looking(FileSystemReader.read_metadata)  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _restricting(DefaultLoadPlanner.load_bytes)  # type: ignore[method-assign]


def _looking(original: Callable[..., Metadata]) -> Callable[..., Metadata]:
    def read(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
        try:
            read_metadata(Path(self.path))
        except pickle.UnpicklingError as error:
            raise UserError(_refusal(self.path, str(error))) from None
        return original(self, *args, **kwargs)

    return read


def _restricting(original: Callable[..., None]) -> Callable[..., None]:
    def load(self: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
        start = value.tell()
        try:
            torch.load(value, map_location="cpu")  # weights_only is torch's default
        except pickle.UnpicklingError as error:
            value.seek(start)
            names = " ".join(get_unsafe_globals_in_checkpoint(value)) or str(error).partition("\n")[0]
            raise UserError(_refusal(read_item.dest_index.fqn, names)) from None
        value.seek(start)
        original(self, read_item, value)

    return load


def _refusal(place: Any, reason: str) -> str:
    return f"{place}: expected a checkpoint of plain values, got one that needs code to run ({reason}): do not load it"
