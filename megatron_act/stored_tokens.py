"""Megatron's indexed datasets as arrays: read in stored order, written document by document, without Megatron."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_act.data.indexed import read_index, single_documents, write_pair


@dataclass(frozen=True)
class StoredTokens:
    """One ``.bin``/``.idx`` pair.

    Attributes:
        tokens: every token of the file in stored order, memory mapped, shape (tokens,).
        lengths: tokens of each document with its EOD, int32, shape (documents,).
    """

    tokens: np.ndarray
    lengths: np.ndarray

    def documents(self) -> Iterator[np.ndarray]:
        """The documents' tokens, in stored order."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        for end, length in zip(ends.tolist(), self.lengths.tolist(), strict=True):
            yield self.tokens[end - length : end]


def read(prefix: str | Path) -> StoredTokens:
    """Opens ``prefix.bin`` and ``prefix.idx``; UserError where they are no such pair."""
    part, dtype = read_index(prefix)
    lengths = np.concatenate([np.empty(0, "<i4"), *part.lengths.chunks()])
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens == 0:
        return StoredTokens(np.empty(0, dtype), lengths)
    return StoredTokens(np.memmap(part.tokens, dtype, "r", shape=(tokens,)), lengths)


class Stream:
    """The tokens of several files, one after another; only what is asked for is read.

    Args:
        prefixes: of ``.bin``/``.idx`` pairs.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        self.files = [read(prefix).tokens for prefix in prefixes]
        self.ends = np.cumsum([len(file) for file in self.files], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` (or to the end), int64."""
        parts = [
            file[max(0, start - (end - len(file))) : max(0, stop - (end - len(file)))]
            for file, end in zip(self.files, self.ends, strict=True)
        ]
        return np.concatenate(parts).astype(np.int64)


def write(prefix: Path, documents: Sequence[np.ndarray]) -> None:
    """Writes documents (of one dtype, at least one) as ``prefix.bin`` and ``prefix.idx``."""
    with tempfile.TemporaryDirectory(dir=prefix.parent) as folder:
        tokens, lengths = Path(folder) / "tokens", Path(folder) / "lengths"
        tokens.write_bytes(np.concatenate(documents).tobytes())
        lengths.write_bytes(np.array([len(document) for document in documents], "<i4").tobytes())
        write_pair(prefix, [single_documents(tokens, lengths, len(documents))], documents[0].dtype)
