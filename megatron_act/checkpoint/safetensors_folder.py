"""Reads a Hugging Face model folder's safetensors one tensor at a time."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_act.checkpoint.resume import identity_of
from megatron_act.checkpoint.writer import INDEX, SINGLE
from megatron_act.errors import UserError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """File, shape and dtype of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsFolder:
    """All tensors of a folder by name; headers only until one is read.

    Raises:
        UserError: no safetensors in the folder, a broken file, a file of the index that is not there, or a tensor that
            is not fp32, bf16 or fp16 (quantized weights).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        for file in self._files():
            self.tensors.update(_header(file))

    @property
    def identity(self) -> str:
        """Changes when the config or a file with tensors does (`resume.identity_of`)."""
        files = sorted({stored.file for stored in self.tensors.values()})
        return identity_of(files, (self.folder / "config.json").read_bytes())

    def _files(self) -> list[Path]:
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.is_file():  # transformers too reads this one where it finds both
            return [single]
        if index.is_file():
            return [self.folder / name for name in _indexed(index)]
        raise UserError(
            f"--hf {self.folder}: expected {SINGLE} or {INDEX}, got neither: save the model with save_pretrained"
        )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as stored."""
        with safe_open(self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name)


def _indexed(index: Path) -> list[str]:
    """Names of the files that an index lists."""
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: expected an index with a weight_map, got a broken one: {error!r}") from None


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file: 8 bytes of length, then a JSON of names, dtypes and shapes."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        with safe_open(path, framework="pt") as whole:  # checks lengths and offsets
            whole.keys()
        with path.open("rb") as file:
            file.seek(8)
            content = json.loads(file.read(length))
    except (OSError, SafetensorError, struct.error, ValueError) as error:
        raise UserError(f"{path}: expected a safetensors file, got a broken one: {error}") from None
    content.pop("__metadata__", None)
    found = {}
    for name, entry in content.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: expected fp32, bf16 or fp16, got {entry['dtype']} in {name}: give the unquantized model"
            )
        found[name] = StoredTensor(path, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return found
