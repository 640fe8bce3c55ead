"""An indexed data set of any writer, opened without reading it: memory maps of its tables and of its tokens.

The layout is described in `megatron_act.data.indexed`; a document may hold several sequences, and a multimodal data set
has one more table, of which nothing is needed here.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_act.errors import UserError

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
TOKEN_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # codes of Megatron's DType; 6, 7: floats


@dataclass(frozen=True)
class Indexed:
    """One `.bin`/`.idx` pair.

    Attributes:
        prefix: the path without suffix.
        tokens: all of `.bin`, in its own dtype.
        lengths: int32 [sequences], in tokens.
        starts: int64 [sequences], in bytes.
        marks: int64 [documents + 1], the first sequence of each document.
    """

    prefix: str
    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    marks: np.ndarray

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.marks) - 1

    def document(self, number: int, limit: int) -> tuple[np.ndarray, int]:
        """At most `limit` first tokens of a document, and how many it has."""
        first, last = int(self.marks[number]), int(self.marks[number + 1])
        parts, room = [np.empty(0, self.tokens.dtype)], limit
        for sequence in range(first, last):
            start = int(self.starts[sequence]) // self.tokens.itemsize
            parts.append(self.tokens[start : start + min(room, int(self.lengths[sequence]))])
            room -= len(parts[-1])
            if not room:
                break
        return np.concatenate(parts), int(self.lengths[first:last].sum(dtype=np.int64))


def open_indexed(prefix: str | Path) -> Indexed:
    """Open `prefix.bin` and `prefix.idx`.

    Raises:
        UserError: a file is absent, is not an index, holds no token ids, or the two do not belong together.
    """
    name = str(prefix).removesuffix(".bin").removesuffix(".idx")
    bin_path, idx_path = Path(name + ".bin"), Path(name + ".idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise UserError(f"expected an indexed data set, got no file {path}; give the path without .bin or .idx")
    dtype, sequences, marks = _header(idx_path)
    size, start = idx_path.stat().st_size, HEADER.size
    tables = start + 12 * sequences + 8 * marks
    if size not in (tables, tables + sequences):  # the second: with a mode for each sequence
        raise UserError(f"expected {tables:,} bytes in {idx_path}, got {size:,}: it is cut short or damaged; copy anew")
    lengths = _table(idx_path, "<i4", start, sequences)
    starts = _table(idx_path, "<i8", start + 4 * sequences, sequences)
    indexed = Indexed(
        name,
        _table(bin_path, dtype.str, 0, bin_path.stat().st_size // dtype.itemsize),
        lengths,
        starts,
        _table(idx_path, "<i8", start + 12 * sequences, marks),
    )
    _check_ends(indexed, bin_path)
    return indexed


def _header(path: Path) -> tuple[np.dtype, int, int]:
    """dtype of the tokens, number of sequences, number of document marks."""
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"expected an index of Megatron's, got {path}, which is none; give the path of P.bin and P.idx")
    _, version, code, sequences, marks = HEADER.unpack(head)
    if version != 1 or code not in TOKEN_DTYPES:
        got = f"version {version}, type code {code}"
        raise UserError(f"expected version 1 and an integer type of tokens in {path}, got {got}; it has no token ids")
    return np.dtype(TOKEN_DTYPES[code]), sequences, marks


def _table(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)


def read(table: np.ndarray, first: int, last: int) -> np.ndarray:
    """A part of a table, read and not mapped: pages of a map count as this process's memory until they are needed."""
    if not isinstance(table, np.memmap) or table.filename is None:
        return table[first:last]
    last = min(last, len(table))
    return np.fromfile(table.filename, table.dtype, last - first, offset=table.offset + first * table.itemsize)


def _check_ends(indexed: Indexed, path: Path) -> None:
    """What can be seen without reading the tables: where the last document and the last sequence end."""
    sequences = len(indexed.lengths)
    if not len(indexed.marks) or indexed.marks[0] != 0 or indexed.marks[-1] != sequences:
        raise UserError(
            f"expected documents from sequence 0 to {sequences} in {indexed.prefix}.idx, got others; rebuild it"
        )
    size, width = path.stat().st_size, indexed.tokens.itemsize
    end = int(indexed.starts[-1]) + int(indexed.lengths[-1]) * width if sequences else 0
    if end != size:
        raise UserError(f"expected {end:,} bytes in {path} by its index, got {size:,}; copy or build both anew")
