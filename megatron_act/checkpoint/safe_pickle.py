"""Loads pickled arguments without running any code from the file and without the modules that its types come from."""

import argparse
import io
import pickle
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_act.errors import UserError

REAL = {"argparse.Namespace": argparse.Namespace}


class Foreign:
    """Stands for a value of a type that is not loaded here, e.g. one of Megatron's enums; keeps its parts."""

    def __init__(self, *parts: Any) -> None:
        self.value = parts[0] if len(parts) == 1 else parts

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r})"


def load_plain(file: io.BytesIO) -> Any:
    """What ``torch.save`` wrote, on the CPU; a dictionary or a list around one, of which the dictionary is returned.

    torch's restricted unpickler reads it; every type outside its list becomes a subclass of `Foreign` of that name.

    Raises:
        UserError: not a file of ``torch.save``, or one that needs code to run.
    """
    try:
        names = get_unsafe_globals_in_checkpoint(file)
        stands: list[Any] = [(REAL.get(name) or type(name.rpartition(".")[2], (Foreign,), {}), name) for name in names]
        file.seek(0)
        with safe_globals(stands):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"checkpoint: expected Megatron's saved arguments, got an unreadable record: {error}"
        ) from error
    return content[0] if isinstance(content, list) else content
