"""Megatron's indexed dataset, format version 1: `.bin` is the tokens end to end, `.idx` says where documents lie.

.idx, little-endian:
    "MMIDIDX" 00 00 | version: u64 = 1 | dtype code: u8 | sequences: u64 | document marks: u64
    | length of each sequence: i32 | byte offset of each sequence: i64 | sequence number at each document's start: i64
where the last table ends with the number of sequences; with one sequence per document it counts 0, 1, ..., documents.

Written here and not with megatron-core's IndexedDatasetBuilder because importing that costs seconds (it loads torch and
most of Megatron), and its tables grow as Python lists; the tests hold both files equal to its output.
"""

import contextlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from megatron_act.data.checksum import Checksum
from megatron_act.errors import UserError

DTYPE_CODES = {  # of megatron.core.datasets.indexed_dataset.DType; text is int32 or uint16
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
COPY_BYTES = 8 << 20
ROWS = 1 << 20  # of a table, held at a time


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for a vocabulary below 65500, else int32: `DType.optimal_dtype` of megatron-core."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """`PREFIX.bin`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`PREFIX.idx`."""
    return Path(f"{prefix}.idx")


@dataclass(frozen=True)
class Table:
    """`count` numbers in a file, from byte `offset`; with no file the numbers 0, 1, ..., count - 1."""

    file: Path | None
    dtype: str
    count: int
    offset: int = 0

    def chunks(self) -> Iterator[np.ndarray]:
        """The numbers, `ROWS` at a time."""
        for start in range(0, self.count, ROWS):
            rows = min(ROWS, self.count - start)
            if self.file is None:
                yield np.arange(start, start + rows, dtype=self.dtype)
            else:
                at = self.offset + start * np.dtype(self.dtype).itemsize
                yield np.fromfile(self.file, self.dtype, rows, offset=at)


@dataclass(frozen=True)
class Part:
    """Documents that lie together: a file of tokens, the sequences' lengths, and the marks 0, ..., sequences."""

    tokens: Path
    lengths: Table
    marks: Table


def single_documents(tokens: Path, lengths: Path, documents: int) -> Part:
    """A part whose documents are one sequence each; `lengths` holds int32 [documents]."""
    return Part(tokens, Table(lengths, "<i4", documents), Table(None, "<i8", documents + 1))


def read_index(prefix: str | Path) -> tuple[Part, np.dtype]:
    """An existing data set as a part, and its dtype.

    Raises:
        UserError: no such pair, not an index of version 1, or one that is cut short or of another kind.
    """
    path, tokens = idx_path(prefix), bin_path(prefix)
    try:
        with path.open("rb") as file:
            magic, version, code, sequences, marks = HEADER.unpack(file.read(HEADER.size))
        size, kinds = path.stat().st_size, {value: name for name, value in DTYPE_CODES.items()}
        present = tokens.is_file()
    except (OSError, struct.error) as error:
        raise UserError(f"expected an index of Megatron's at {path}, got {error}; check the prefix") from error
    expected = HEADER.size + 12 * sequences + 8 * marks
    if (magic, version) != (MAGIC, 1) or code not in kinds or size != expected or not present:
        got = f"{size} bytes where {expected} follow from the header" if magic == MAGIC else "another kind of file"
        raise UserError(f"expected a whole index of Megatron's at {path} and its .bin, got {got}; check the prefix")
    lengths = Table(path, "<i4", sequences, HEADER.size)
    return Part(tokens, lengths, Table(path, "<i8", marks, HEADER.size + 12 * sequences)), np.dtype(kinds[code])


def write_pair(prefix: Path, parts: Sequence[Part], dtype: np.dtype, checksum: str | None = None) -> dict[str, dict]:
    """Write `.bin` and `.idx` of all parts, in order.

    Args:
        checksum: of the one part's tokens, if known; they are then linked, not copied, where the file system allows it.

    Returns:
        {"bin": {"file", "bytes", "checksum"}, "idx": ...}
    """
    data, index = bin_path(prefix), idx_path(prefix)
    if checksum is None or not _linked(parts[0].tokens, data):
        checksum = _hashed_file(data, lambda file: _copy([part.tokens for part in parts], file))
    of_index = _hashed_file(index, lambda file: _write_index(file, parts, dtype))
    return {
        "bin": {"file": data.name, "bytes": data.stat().st_size, "checksum": checksum},
        "idx": {"file": index.name, "bytes": index.stat().st_size, "checksum": of_index},
    }


def index_checksum(parts: Sequence[Part], dtype: np.dtype) -> str:
    """The checksum that the index of these parts must have: offsets follow from lengths."""
    hashing = _Hashing(None)
    _write_index(hashing, parts, dtype)
    return str(hashing.checksum)


def _linked(source: Path, target: Path) -> bool:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return True
    return False


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file, self.checksum = file, Checksum()

    def write(self, data: bytes | memoryview) -> None:
        """Write, if there is a file, and hash."""
        if self._file:
            self._file.write(data)
        self.checksum.update(data)


def _hashed_file(path: Path, fill: Callable[[_Hashing], None]) -> str:
    with path.open("wb") as file:
        hashing = _Hashing(file)
        fill(hashing)
    return str(hashing.checksum)


def _copy(sources: Sequence[Path], file: _Hashing) -> None:
    for source in sources:
        with source.open("rb") as opened:
            while block := opened.read(COPY_BYTES):
                file.write(block)


def _write_index(file: _Hashing, parts: Sequence[Part], dtype: np.dtype) -> None:
    sequences = sum(part.lengths.count for part in parts)
    marks = sum(part.marks.count - 1 for part in parts) + 1
    file.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype.name], sequences, marks))
    for part in parts:
        for lengths in part.lengths.chunks():
            file.write(lengths.data)
    for starts in _starts(parts, dtype.itemsize):
        file.write(starts.data)
    for chunk in _marks(parts):
        file.write(chunk.data)


def _starts(parts: Sequence[Part], itemsize: int) -> Iterator[np.ndarray]:
    """Byte offset of each sequence: int64."""
    end = 0
    for part in parts:
        for lengths in part.lengths.chunks():
            ends = end + np.cumsum(lengths, dtype="<i8") * itemsize
            starts = ends - lengths.astype("<i8") * itemsize
            end = int(ends[-1])
            yield starts


def _marks(parts: Sequence[Part]) -> Iterator[np.ndarray]:
    """Sequence number at the start of each document, then the number of sequences: int64."""
    yield np.zeros(1, "<i8")
    before = 0
    for part in parts:
        skip = 1  # each part's own leading 0
        for chunk in part.marks.chunks():
            yield chunk[skip:] + before
            skip = 0
        before += part.lengths.count
