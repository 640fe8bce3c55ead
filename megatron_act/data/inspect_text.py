"""Ids back to text, for a person to read, with a tokenizer of any of the four formats or with none."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megatron_act.data.inspect_statistics import LARGEST_ID
from megatron_act.data.ranked_bpe import RankedBpe
from megatron_act.data.sentencepiece_bpe import SentencePieceModel
from megatron_act.data.tokenizer import Vocabulary, find_file, open_vocabulary


class Decoder(Protocol):
    """A tokenizer read backwards; `size` is its largest id + 1."""

    size: int

    def text(self, ids: Sequence[int]) -> str:
        """The text of several ids, special tokens included."""

    def piece(self, token: int) -> str:
        """One token: its text, or its name in the vocabulary where it is a part of a character."""


class HuggingFaceDecoder:
    """A `tokenizer.json`."""

    def __init__(self, file: Path, size: int) -> None:
        import tokenizers

        self.size = size
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))

    def text(self, ids: Sequence[int]) -> str:
        """See `Decoder`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def piece(self, token: int) -> str:
        """See `Decoder`."""
        text, name = self.text([token]), self._tokenizer.id_to_token(token)
        return name or "" if "\ufffd" in text or not text else text


class RankedDecoder:
    """A tekken.json or a rank file."""

    def __init__(self, vocabulary: RankedBpe) -> None:
        self.size, self._vocabulary = vocabulary.size, vocabulary

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        ranks, first = self._vocabulary.ranks, self._vocabulary.first_id
        specials = {number: name.encode() for name, number in self._vocabulary.specials.items()}
        return {rank + first: token for token, rank in ranks.items()} | specials

    def text(self, ids: Sequence[int]) -> str:
        """See `Decoder`."""
        return b"".join(self._bytes.get(token, b"") for token in ids).decode(errors="replace")

    def piece(self, token: int) -> str:
        """See `Decoder`."""
        raw = self._bytes.get(token, b"")
        text = raw.decode(errors="replace")
        return "".join(f"<0x{byte:02X}>" for byte in raw) if "\ufffd" in text else text


class SentencePieceDecoder:
    """A SentencePiece model."""

    def __init__(self, processor: Any) -> None:
        self.size, self._processor = processor.get_piece_size(), processor

    def text(self, ids: Sequence[int]) -> str:
        """See `Decoder`."""
        return self._processor.decode(list(ids))

    def piece(self, token: int) -> str:
        """See `Decoder`."""
        return self._processor.id_to_piece(token)


class NoDecoder:
    """Without a tokenizer ids are numbers."""

    size = LARGEST_ID

    def text(self, ids: Sequence[int]) -> str:
        """See `Decoder`."""
        return " ".join(map(str, ids))

    def piece(self, token: int) -> str:
        """See `Decoder`."""
        return ""


def open_decoder(path: str | Path, pattern: str | None = None) -> Decoder:
    """The decoder of a tokenizer's file or folder; a rank file needs no pattern to be read backwards.

    Raises:
        UserError: no such file, or not a tokenizer.
    """
    vocabulary: Vocabulary = open_vocabulary(find_file(Path(path)), pattern or "")
    if isinstance(vocabulary, RankedBpe):
        return RankedDecoder(vocabulary)
    if isinstance(vocabulary, SentencePieceModel):
        return SentencePieceDecoder(vocabulary.processor)
    size = vocabulary.size  # reads the file, and says in one line what is wrong with it
    return HuggingFaceDecoder(vocabulary.file, size)


def quoted(text: str, limit: int) -> str:
    """A text on one line in quotation marks, control characters escaped, cut to `limit` characters."""
    cut = text if len(text) <= limit else text[:limit] + "\u2026"
    escaped = json.dumps(cut, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in escaped)
