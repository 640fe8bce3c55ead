"""Long texts in pieces: where a text may be cut so that the pieces' ids, end to end, are the ids of the whole.

The place is between a visible ASCII character and a single space before another: `dog| ate`. Each pattern of `WORDS`
cuts there whatever stands around it: none has an alternative that goes on from a visible character to a space, and none
looks back. So words left and right are the same in pieces, and BPE sees nothing but words. Llama's kind of model has no
words, it merges anywhere, but only into tokens of its vocabulary: there none may hold a space after something else.

Any other tokenizer encodes whole texts, in memory that grows with the longest.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_act.data.ranked_bpe import PATTERNS, TEKKEN_REGEX, RankedBpe
from megatron_act.data.sentencepiece_bpe import SPACE, SentencePieceModel
from megatron_act.data.tokenizer import TokenizerInfo, open_vocabulary

DEEPSEEK_REGEX = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
).replace(r"\r\n", "\r\n")
WORDS = frozenset({*(pattern.regex for pattern in PATTERNS.values()), TEKKEN_REGEX, DEEPSEEK_REGEX})
PARTS = frozenset({r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"})  # DeepSeek's: no space in a match
PLACE = re.compile(rb"[!-~](?= [!-~])")
LAST_PLACE = re.compile(rb".*[!-~](?= [!-~])", re.DOTALL)


@dataclass(frozen=True)
class Cut:
    """What all tokenizers have whose texts can be cut.

    Attributes:
        skip: bytes left out where a piece begins: 1, the space, where the tokenizer itself puts one before a text.
    """

    skip: int = 0


def cut_of(info: TokenizerInfo) -> Cut | None:
    """Whether and how texts may be cut for a tokenizer."""
    vocabulary = open_vocabulary(Path(info.file), info.pattern, info.eod_id)
    if isinstance(vocabulary, RankedBpe):
        return Cut() if vocabulary.regex in WORDS else None
    if not isinstance(vocabulary, SentencePieceModel):
        return _cut(json.loads(vocabulary.file.read_bytes()))
    try:
        return _cut(vocabulary.converted())
    except ValueError:
        return None


def pieces(text: memoryview, size: int, cut: Cut | None) -> Iterator[str]:
    """The text in pieces of about `size` bytes (at least 3), or whole where it may not be cut.

    Args:
        text: UTF-8.
        size: a piece is longer only where no place to cut comes sooner.
    """
    begin = 0
    while begin < len(text):
        end = _end(text, begin, size) if cut else len(text)
        yield str(text[begin:end], "utf-8")
        begin = end + (cut.skip if cut else 0)


def _end(text: memoryview, begin: int, size: int) -> int:
    if len(text) - begin <= size:
        return len(text)
    found = LAST_PLACE.match(text, begin, begin + size) or PLACE.search(text, begin + size - 2)
    return found.end() if found else len(text)


def _cut(tokenizer: dict[str, Any]) -> Cut | None:
    """Of a tokenizer.json."""
    model = tokenizer["model"]
    added = [token for token in tokenizer.get("added_tokens") or () if not token["special"]]  # special ones are text
    across = any(token["rstrip"] or re.search("[!-~] ", token["content"]) for token in added)
    if model["type"] != "BPE" or model.get("dropout") or across:
        return None
    changes = _steps(tokenizer.get("normalizer"), "normalizers")
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if all(step["type"] == "NFC" for step in changes):
        return Cut() if all(map(_harmless, steps)) and any(map(_makes_words, steps)) else None
    prefixed, plain = _llama(changes)
    bridges = any(re.search(f"[^{SPACE}]{SPACE}", token) for token in model["vocab"])
    return Cut(skip=int(prefixed)) if plain and not steps and not bridges else None


def _llama(changes: list[dict[str, Any]]) -> tuple[bool, bool]:
    """Whether text gets a space in front, and whether all that happens else is that spaces become `SPACE`."""
    prefixed = changes[0] == {"type": "Prepend", "prepend": SPACE}
    return prefixed, changes[prefixed:] == [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [inner for item in step[key] for inner in _steps(item, key)] if step["type"] == "Sequence" else [step]


def _makes_words(step: dict[str, Any]) -> bool:
    return step.get("use_regex", True) if step["type"] == "ByteLevel" else _regex(step) in WORDS


def _harmless(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"]
    return step["type"] == "Digits" or _regex(step) in WORDS | PARTS


def _regex(step: dict[str, Any]) -> str | None:
    """Of a step that makes each match a word."""
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex")
    return None
