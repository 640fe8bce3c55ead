"""One interface over two encoders of a Hugging Face `tokenizer.json`: fastokens (fast), tokenizers (reference).

Both never add BOS or any other special token, never truncate or pad, and take a special token's literal in a text
(`</s>`, `<|endoftext|>`) as the plain characters that it is.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_act.errors import UserError

logger = logging.getLogger(__name__)

ENCODERS = ("auto", "fastokens", "tokenizers")
DEFAULT_EOD = "<|endoftext|>"
PROBE = (  # differences between encoders hide in these
    " leading and trailing  ",
    "a\r\n\r\n\tb  c\u00a0d\u3000e\n",
    "it's IT'S don\u2019t 12345678901 3.14 1,000",
    "e\u0301 \u00e9 \ufb01 \u0130 \ufeff \u200d \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001d518",
    "\u4f60\u597d \u3053\u3093\u306b\u3061\u306f \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\x00\x01\x7f\u0085\u2028\uffff",
    "<|endoftext|></s><s>[INST] x [/INST]<unk><pad>",
)


class Encoder(Protocol):
    """Texts in; ids uint32 [total] and offsets int64 [texts + 1] out: text i is `ids[offsets[i]:offsets[i + 1]]`."""

    name: str

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode a batch."""


class FastokensEncoder:
    """The hot path: two flat buffers, no Python object per token."""

    name = "fastokens"

    def __init__(self, file: Path) -> None:
        import fastokens

        self._tokenizer = fastokens.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        ids, offsets = self._tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)


class TokenizersEncoder:
    """The reference and the fallback: Hugging Face's own library."""

    name = "tokenizers"

    def __init__(self, file: Path) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        rows = [item.ids for item in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return np.concatenate([np.array(row, np.uint32) for row in rows] or [np.empty(0, np.uint32)]), offsets

    def vocabulary(self) -> dict[str, int]:
        """Every token, added ones included, with its id."""
        return self._tokenizer.get_vocab(with_added_tokens=True)


@dataclass(frozen=True)
class TokenizerInfo:
    """What a data set must remember of its tokenizer.

    Attributes:
        file: the `tokenizer.json`.
        vocab_size: largest id + 1, added tokens included: the number of embedding rows that the ids need.
        eod_token, eod_id: the token appended to every document.
        encoder: "fastokens" or "tokenizers".
    """

    file: Path
    vocab_size: int
    eod_token: str
    eod_id: int
    encoder: str


def load_encoder(file: Path, name: str) -> Encoder:
    """Build one encoder ("fastokens" or "tokenizers") from a `tokenizer.json`."""
    return FastokensEncoder(file) if name == "fastokens" else TokenizersEncoder(file)


def open_tokenizer(path: str | Path, eod_token: str | None = None, encoder: str = "auto") -> TokenizerInfo:
    """Check a tokenizer and decide how it will be run.

    Args:
        path: a `tokenizer.json`, or a folder that holds one.
        eod_token: end-of-document token; default: `eos_token` of a `tokenizer_config.json` beside the file (what
            Megatron's HuggingFaceTokenizer calls eod), else `<|endoftext|>`.
        encoder: "auto" takes fastokens if it loads the file and agrees with tokenizers on a set of hard strings,
            else tokenizers with one warning that says why.

    Raises:
        UserError: no such file, not a tokenizer, EOD not in the vocabulary, or a named encoder that does not fit.
    """
    file = _tokenizer_file(Path(path))
    try:
        reference = TokenizersEncoder(file)
    except Exception as error:  # the library raises bare Exception
        message = f"expected a Hugging Face tokenizer.json, got {file} ({error}); give --tokenizer a readable one"
        raise UserError(message) from error
    vocabulary = reference.vocabulary()
    eod = eod_token or _configured_eos(file.parent) or DEFAULT_EOD
    if eod not in vocabulary:
        message = (
            f"expected the end-of-document token '{eod}' in the vocabulary of {file}, got {len(vocabulary)} tokens"
        )
        raise UserError(f"{message} without it; name an existing one with --eod-token")
    chosen = _choose_encoder(file, encoder, reference)
    return TokenizerInfo(file, max(vocabulary.values()) + 1, eod, vocabulary[eod], chosen)


def _tokenizer_file(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"expected a tokenizer.json or a folder that holds one, got {path}; check --tokenizer")
    return file


def _configured_eos(folder: Path) -> str | None:
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise UserError(f"expected a JSON object in {config}, got: {error}; correct it or remove it") from error
    return eos.get("content") if isinstance(eos, dict) else eos


def _choose_encoder(file: Path, requested: str, reference: TokenizersEncoder) -> str:
    if requested == "tokenizers":
        return requested
    problem = _fastokens_problem(file, reference)
    if problem and requested == "fastokens":
        raise UserError(
            f"expected a tokenizer that fastokens can run, got {file} ({problem}); use --encoder tokenizers"
        )
    if problem:
        logger.warning("encoding with the slower tokenizers library: %s", problem)
    return "tokenizers" if problem else "fastokens"


def _fastokens_problem(file: Path, reference: TokenizersEncoder) -> str | None:
    try:
        got = FastokensEncoder(file).encode(list(PROBE))
    except ImportError:
        return "fastokens is not installed"
    except Exception as error:  # whatever keeps it from this tokenizer, the reference remains
        return f"fastokens cannot run it: {error}"
    pairs = zip(got, reference.encode(list(PROBE)), strict=True)
    same = all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    return None if same else "fastokens and tokenizers give different ids on the probe strings"
