"""Megatron's indexed dataset, format version 1: `.bin` is the tokens end to end, `.idx` says where documents lie.

.idx, little-endian:
    "MMIDIDX" 00 00 | version: u64 = 1 | dtype code: u8 | sequences: u64 | document marks: u64
    | length of each sequence: i32 | byte offset of each sequence: i64 | sequence number at each document's start: i64
with one sequence per document, so the last table counts 0, 1, ..., documents.

Written here and not with megatron-core's IndexedDatasetBuilder because importing that costs seconds (it loads torch and
most of Megatron) in every worker, and its tables grow as Python lists; the tests hold both files equal to its output.
"""

import hashlib
import struct
from pathlib import Path

import numpy as np

DTYPE_CODES = {"int32": 4, "uint16": 8}  # of megatron.core.datasets.indexed_dataset.DType
COPY_BYTES = 8 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 for a vocabulary below 65500, else int32: `DType.optimal_dtype` of megatron-core."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedWriter:
    """Write one `.bin`/`.idx` pair at `prefix`, taking whole files of tokens in order.

    Attributes:
        documents, tokens: counts so far.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.bin = prefix.with_name(prefix.name + ".bin")
        self.idx = prefix.with_name(prefix.name + ".idx")
        self.documents, self.tokens = 0, 0
        self._dtype = dtype
        self._lengths: list[np.ndarray] = []
        self._file = self.bin.open("wb")
        self._sha256 = hashlib.sha256()

    def append(self, shard: Path, lengths: np.ndarray) -> None:
        """Append a file of tokens already in the right dtype; lengths int32 [documents], EOD included."""
        with shard.open("rb") as source:
            while block := source.read(COPY_BYTES):
                self._file.write(block)
                self._sha256.update(block)
        self._lengths.append(lengths)
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))

    def close(self) -> None:
        """Close the token file; idempotent."""
        self._file.close()

    def finish(self) -> dict[str, dict[str, object]]:
        """Close `.bin`, write `.idx`, and describe both: {"bin": {"file", "bytes", "sha256"}, "idx": ...}."""
        self.close()
        index = self._index()
        self.idx.write_bytes(index)
        return {
            "bin": {"file": self.bin.name, "bytes": self.bin.stat().st_size, "sha256": self._sha256.hexdigest()},
            "idx": {"file": self.idx.name, "bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
        }

    def _index(self) -> bytes:
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths]).astype("<i4")
        starts = np.zeros(len(lengths), "<i8")
        np.cumsum(lengths[:-1], dtype="<i8", out=starts[1:])
        header = struct.pack("<9sQB", b"MMIDIDX\0\0", 1, DTYPE_CODES[self._dtype.name])
        counts = struct.pack("<QQ", len(lengths), len(lengths) + 1)
        marks = np.arange(len(lengths) + 1, dtype="<i8")
        return b"".join([header, counts, lengths.tobytes(), (starts * self._dtype.itemsize).tobytes(), marks.tobytes()])
