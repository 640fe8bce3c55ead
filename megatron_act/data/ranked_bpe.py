"""Byte-pair vocabularies as ranked byte strings: tiktoken's rank files and Mistral's tekken.json.

A token's rank is both its priority when pairs merge and, plus `first_id`, its id: tekken puts its special tokens before
the ranks (1000 of them), tiktoken's encodings after. The pattern that cuts text into words is part of tekken.json; a
rank file lacks it, so it is named or given.
"""

import base64
import binascii
import json
import re
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from megatron_act.data.encoders import FastokensEncoder, TiktokenEncoder
from megatron_act.errors import UserError

TEKKEN_MARK = b'"default_num_special_tokens"'
TEKKEN_SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}  # of files that list none


@dataclass(frozen=True)
class Pattern:
    """How an encoding cuts text into words, its end-of-document token and that token's id."""

    regex: str
    eod_token: str
    eod_id: int


_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PATHS = _TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1)


def _cased(suffix: str) -> str:
    """Words of one case or capitalized, with what may follow in the same word."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{_UPPER}*{_LOWER}+{suffix}|{before}{_UPPER}+{_LOWER}*{suffix}"


PATTERNS = {
    "gpt2": Pattern(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "<|endoftext|>", 50256),
    "cl100k_base": Pattern(_CL100K, "<|endoftext|>", 100257),
    "o200k_base": Pattern(_cased(_SUFFIX) + r"|\p{N}{1,3}" + _PATHS, "<|endoftext|>", 199999),
    "llama3": Pattern(_CL100K, "<|end_of_text|>", 128001),
    "qwen": Pattern(_CL100K.replace("{1,3}", ""), "<|endoftext|>", 151643),
}
TEKKEN_REGEX = _cased("") + r"|\p{N}" + _PATHS  # as a tekken.json says itself


@dataclass(frozen=True)
class RankedBpe:
    """A vocabulary of ranks, ready to be run by tiktoken (the reference) or fastokens.

    Attributes:
        ranks: token bytes to rank, from 0 without a gap.
        specials: special tokens' ids.
        size: largest id + 1.
    """

    file: Path
    kind: str
    ranks: dict[bytes, int]
    regex: str
    first_id: int
    specials: dict[str, int]
    size: int
    default_eod: str
    reference_name: str = field(default="tiktoken", init=False)

    @cached_property
    def literals(self) -> list[str]:
        """Special tokens as they may stand in a text."""
        return list(self.specials)

    def id_of(self, token: str) -> int | None:
        """The id of a token, special or not."""
        rank = self.ranks.get(token.encode())
        return self.specials.get(token, None if rank is None else rank + self.first_id)

    def reference(self) -> TiktokenEncoder:
        """tiktoken itself."""
        import tiktoken

        shifted = {token: rank + self.first_id for token, rank in self.ranks.items()}
        return TiktokenEncoder(
            tiktoken.Encoding("file", pat_str=self.regex, mergeable_ranks=shifted, special_tokens={})
        )

    def fast(self) -> FastokensEncoder:
        """fastokens, which reads ranks from a file of its own."""
        import fastokens

        with tempfile.NamedTemporaryFile("wb", suffix=".tiktoken") as file:
            ordered = sorted(self.ranks.items(), key=lambda item: item[1])
            file.writelines(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)
            file.flush()
            tokenizer = fastokens.Tokenizer.from_tiktoken(file.name, pattern=self.regex, special_tokens={})
        return FastokensEncoder(tokenizer, self.first_id)


def is_tekken(head: bytes) -> bool:
    """Whether a file that starts like this is a tekken.json."""
    return head.lstrip()[:1] == b"{" and TEKKEN_MARK in head


def is_ranks(head: bytes) -> bool:
    """Whether a file that starts like this is one of tiktoken's."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head) is not None


def open_tekken(file: Path) -> RankedBpe:
    """Read a tekken.json.

    Raises:
        UserError: it is not one.
    """
    try:
        content = json.loads(file.read_bytes())
        config = content["config"]
        size, first_id = config["default_vocab_size"], config["default_num_special_tokens"]
        words = content["vocab"][: size - first_id]
        ranks = {base64.b64decode(word["token_bytes"]): word["rank"] for word in words}
        listed = {item["token_str"]: item["rank"] for item in content.get("special_tokens") or ()}
        specials = listed or TEKKEN_SPECIALS
        return RankedBpe(file, "tekken", _whole(file, ranks), config["pattern"], first_id, specials, size, "</s>")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"expected a tekken.json, got {file} ({error!r}); give --tokenizer a readable one") from error


def open_ranks(file: Path, pattern: str | None, eod_id: int | None) -> RankedBpe:
    """Read a rank file, to be cut by a pattern of `PATTERNS` or a regular expression of one's own.

    Args:
        eod_id: id of the end-of-document token; default: the named pattern's, else the first after the ranks.

    Raises:
        UserError: it is not one, or no pattern was given.
    """
    if pattern is None:
        raise UserError(
            f"expected --pattern with the rank file {file}, got none; give {', '.join(PATTERNS)} or a regex of your own"
        )
    ranks = _whole(file, _parse_ranks(file))
    named = PATTERNS.get(pattern, Pattern(pattern, "<|endoftext|>", len(ranks)))
    eod = named.eod_id if eod_id is None else eod_id
    if eod < len(ranks):
        raise UserError(
            f"expected an end of document beyond the {len(ranks)} ranks of {file}, got {eod}, which texts have too; "
            "correct --eod-id"
        )
    size = max(len(ranks), eod + 1)
    return RankedBpe(file, "tiktoken", ranks, named.regex, 0, {named.eod_token: eod}, size, named.eod_token)


def _parse_ranks(file: Path) -> dict[bytes, int]:
    try:
        pairs = (line.split() for line in file.read_bytes().splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise UserError(f"expected a token and a rank in each line of {file}, got {error}; fetch it again") from error


def _whole(file: Path, ranks: dict[bytes, int]) -> dict[bytes, int]:
    missing = sum(bytes([value]) not in ranks for value in range(256))
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"expected ranks from 0 without a gap and a token for each byte, got {len(ranks)} ranks, {missing} bytes "
            f"missing, in {file}; fetch it again"
        )
    return ranks
