"""Document lengths and token counts of a data set of any size, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron_act.data.inspect_index import Indexed, read
from megatron_act.errors import UserError

CHUNK_DOCUMENTS = 1 << 18
BLOCK_TOKENS = 1 << 20
LARGEST_ID = 1 << 24  # no vocabulary is larger: what is, was never a token


@dataclass(frozen=True)
class Lengths:
    """How many documents have which length: exact, of all documents.

    Attributes:
        values: int64, the lengths in tokens that occur, ascending.
        counts: int64, the number of documents of each.
    """

    values: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """Tokens per document."""
        return float((self.values * self.counts).sum() / self.counts.sum())

    def percentile(self, percent: float) -> int:
        """The least length that at least `percent` % of the documents do not exceed (nearest rank)."""
        running = np.cumsum(self.counts)
        return int(self.values[np.searchsorted(running, percent / 100 * running[-1])])


@dataclass(frozen=True)
class TokenCounts:
    """How often each id occurs.

    Attributes:
        counts: int64 [largest id seen + 1].
        seen: tokens counted: all, or those of blocks spread evenly over the file.
        total: tokens of the data set.
    """

    counts: np.ndarray
    seen: int
    total: int

    def top(self, number: int) -> np.ndarray:
        """The ids of the most frequent tokens, the most frequent first; of equals the smaller id."""
        order = np.argsort(-self.counts, kind="stable")[:number]
        return order[self.counts[order] > 0]

    def shares(self) -> np.ndarray:
        """Each occurring token's share of the tokens counted, descending."""
        return np.sort(self.counts[self.counts > 0])[::-1] / max(1, self.seen)


def measure_lengths(data: Indexed) -> Lengths:
    """The lengths of all documents, a chunk of the index at a time."""
    values, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for lengths in _document_lengths(data):
        new, times = np.unique(lengths, return_counts=True)
        merged, where = np.unique(np.concatenate([values, new]), return_inverse=True)
        summed = np.zeros(len(merged), np.int64)
        np.add.at(summed, where, np.concatenate([counts, times]))
        values, counts = merged, summed
    return Lengths(values, counts)


def _document_lengths(data: Indexed) -> Iterator[np.ndarray]:
    for first in range(0, data.documents, CHUNK_DOCUMENTS):
        marks = read(data.marks, first, first + CHUNK_DOCUMENTS + 1)
        ends = np.cumsum(read(data.lengths, int(marks[0]), int(marks[-1])), dtype=np.int64)
        yield np.diff(np.concatenate([[0], ends])[marks - marks[0]])


def count_tokens(data: Indexed, limit: int, progress: bool = True) -> TokenCounts:
    """Count the ids of all tokens, or of about `limit` where there are more.

    Raises:
        UserError: an id below 0 or beyond any vocabulary: not the tokens of a text.
    """
    total = len(data.tokens)
    starts = _block_starts(total, limit)
    counts, seen = np.zeros(0, np.int64), 0
    for start in tqdm(starts, "tokens", unit="block", leave=False, disable=None if progress else True):
        block = read(data.tokens, start, start + BLOCK_TOKENS)
        _check_ids(data, block)
        found = np.bincount(block, minlength=len(counts))
        found[: len(counts)] += counts
        counts, seen = found, seen + len(block)
    return TokenCounts(counts, seen, total)


def _block_starts(total: int, limit: int) -> list[int]:
    """First tokens of the blocks to read: one after the other, or evenly apart."""
    blocks = -(-total // BLOCK_TOKENS)
    wanted = min(blocks, max(1, limit // BLOCK_TOKENS)) if total > limit else blocks
    return [BLOCK_TOKENS * (number * blocks // wanted) for number in range(wanted)]


def _check_ids(data: Indexed, block: np.ndarray) -> None:
    low, high = int(block.min()), int(block.max())
    if low < 0 or high >= LARGEST_ID:
        got = low if low < 0 else high
        raise UserError(
            f"expected token ids from 0 to {LARGEST_ID - 1:,}, got {got:,} in {data.prefix}.bin; not tokens"
        )
