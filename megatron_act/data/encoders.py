"""One interface over the libraries that turn text into ids: fastokens (fast) and each format's own (the reference).

None adds BOS or any other special token, truncates or pads, and all take a special token's literal in a text (`</s>`,
`<|endoftext|>`) as the plain characters that it is.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Encoder(Protocol):
    """Texts in; ids uint32 [total] and offsets int64 [texts + 1] out: text i is `ids[offsets[i]:offsets[i + 1]]`."""

    name: str

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode a batch."""


class FastokensEncoder:
    """The hot path: two flat buffers, no Python object per token. `first_id` is added to every id."""

    name = "fastokens"

    def __init__(self, tokenizer: Any, first_id: int = 0) -> None:
        self._tokenizer, self._first_id = tokenizer, first_id

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        raw, bounds = self._tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        ids = np.frombuffer(raw, "<u4")
        return ids + np.uint32(self._first_id) if self._first_id else ids, np.frombuffer(bounds, "<u8").astype(np.int64)


class TokenizersEncoder:
    """Hugging Face's own library, for a `tokenizer.json`."""

    name = "tokenizers"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        return _flat([item.ids for item in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)])


class TiktokenEncoder:
    """tiktoken, for files of ranks."""

    name = "tiktoken"

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        return _flat([self._encoding.encode_ordinary(text) for text in texts])


class SentencePieceEncoder:
    """SentencePiece's own library, for its models."""

    name = "sentencepiece"

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        return _flat(self._processor.encode(texts))


def _flat(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.concatenate([np.array(row, np.uint32) for row in rows] or [np.empty(0, np.uint32)]), offsets
