"""A tokenizer file of any of four formats, its end of document, and which library runs it.

    tokenizer.json (Hugging Face)     reference: tokenizers
    tekken.json (Mistral)             reference: tiktoken
    rank file (tiktoken)              reference: tiktoken, with a named or given pattern
    .model (SentencePiece)            reference: sentencepiece

fastokens takes the reference's place wherever it gives the same ids on a set of hard strings.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megatron_act.data.encoders import Encoder, FastokensEncoder, TokenizersEncoder
from megatron_act.data.probe import LITERALS, adversarial_texts, differences, leaks
from megatron_act.data.ranked_bpe import is_ranks, is_tekken, open_ranks, open_tekken
from megatron_act.data.sentencepiece_bpe import open_sentencepiece
from megatron_act.errors import UserError

logger = logging.getLogger(__name__)

ENCODERS = ("auto", "fastokens", "tokenizers", "tiktoken", "sentencepiece")
DEFAULT_EOD = "<|endoftext|>"
FOLDER_NAMES = ("tokenizer.json", "tekken.json", "tokenizer.model")  # what a folder is searched for, in this order


class Vocabulary(Protocol):
    """What each format offers (see `RankedBpe`, `SentencePieceModel`, `HuggingFaceFile`)."""

    @property
    def file(self) -> Path: ...
    @property
    def kind(self) -> str: ...
    @property
    def reference_name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def default_eod(self) -> str: ...
    @property
    def literals(self) -> list[str]: ...
    def id_of(self, token: str) -> int | None: ...
    def reference(self) -> Encoder: ...
    def fast(self) -> FastokensEncoder: ...


@dataclass(frozen=True)
class HuggingFaceFile:
    """A `tokenizer.json`; the EOD is `eos_token` of a `tokenizer_config.json` beside it, else `<|endoftext|>`."""

    file: Path
    kind: str = field(default="tokenizer.json", init=False)
    reference_name: str = field(default="tokenizers", init=False)

    @cached_property
    def _tokenizer(self) -> Any:
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(self.file))
        except Exception as error:  # the library raises bare Exception
            message = f"expected a Hugging Face tokenizer.json, got {self.file} ({error})"
            raise UserError(f"{message}; give --tokenizer a readable one") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # the model may still hold them: see `_check_literals`
        return tokenizer

    @cached_property
    def size(self) -> int:
        """Largest id + 1, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def default_eod(self) -> str:
        """See the class."""
        return _configured_eos(self.file.parent) or DEFAULT_EOD

    @property
    def literals(self) -> list[str]:
        """Added tokens as they may stand in a text."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()][:20]

    @property
    def specials(self) -> dict[str, int]:
        """Ids of the added tokens that are marked special."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def id_of(self, token: str) -> int | None:
        """The id of a token, added or not."""
        return self._tokenizer.token_to_id(token)

    def reference(self) -> TokenizersEncoder:
        """tokenizers itself."""
        return TokenizersEncoder(self._tokenizer)

    def fast(self) -> FastokensEncoder:
        """fastokens on the same file."""
        import fastokens

        tokenizer = fastokens.Tokenizer.from_file(str(self.file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return FastokensEncoder(tokenizer)


@dataclass(frozen=True)
class TokenizerInfo:
    """What a data set must remember of its tokenizer.

    Attributes:
        file: as given, or found in the folder given.
        sha256: of the file.
        vocab_size: largest id + 1, added tokens included: the number of embedding rows that the ids need.
        eod_token, eod_id: the token appended to every document.
        encoder: the library that runs it, one of `ENCODERS` but "auto".
        kind: the format: "tokenizer.json", "tekken", "tiktoken" or "sentencepiece".
        pattern: a rank file's, named or given.
    """

    file: str
    sha256: str
    vocab_size: int
    eod_token: str
    eod_id: int
    encoder: str
    kind: str = "tokenizer.json"
    pattern: str | None = None


_loaded: dict[TokenizerInfo, Encoder] = {}  # the last one: loading takes seconds, and a process has many tasks


def load_encoder(info: TokenizerInfo) -> Encoder:
    """The encoder that `open_tokenizer` decided on."""
    if info not in _loaded:
        vocabulary = open_vocabulary(Path(info.file), info.pattern, info.eod_id)
        _keep(info, vocabulary.fast() if info.encoder == "fastokens" else vocabulary.reference())
    return _loaded[info]


def _keep(info: TokenizerInfo, encoder: Encoder) -> None:
    _loaded.clear()
    _loaded[info] = encoder


def open_tokenizer(
    path: str | Path,
    eod_token: str | None = None,
    encoder: str = "auto",
    *,
    pattern: str | None = None,
    eod_id: int | None = None,
) -> TokenizerInfo:
    """Check a tokenizer and decide how it will be run.

    Args:
        path: a tokenizer of one of the four formats, or a folder with `tokenizer.json`, `tekken.json` or
            `tokenizer.model`.
        eod_token: end-of-document token; default: the format's own (see each), which is what Megatron calls eod.
        encoder: "auto" takes fastokens if it gives the reference's ids on `adversarial_texts`, else the reference with
            one warning that says why.
        pattern: for a rank file: a name of `PATTERNS` or a regular expression.
        eod_id: for a rank file: the EOD's id where it is not the named pattern's.

    Raises:
        UserError: no such file, not a tokenizer, EOD not in the vocabulary, a text that holds a special token's literal
            gives its id (so EOD would stand within documents), or a named encoder that does not fit.
    """
    file = find_file(Path(path))
    vocabulary = open_vocabulary(file, pattern, eod_id)
    size, eod = vocabulary.size, eod_token or vocabulary.default_eod
    found = vocabulary.id_of(eod)
    if found is None:
        raise UserError(
            f"expected the end-of-document token '{eod}' in the vocabulary of {file}, got {size} tokens without it; "
            "name an existing one with --eod-token"
        )
    reference = vocabulary.reference()
    _check_literals(vocabulary, reference, eod, found)
    chosen = _choose_encoder(vocabulary, reference, encoder)
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    info = TokenizerInfo(str(file), checksum, size, eod, found, chosen.name, vocabulary.kind, pattern)
    _keep(info, chosen)
    return info


def find_file(path: Path) -> Path:
    """The tokenizer that a path means: itself, or the one in that folder."""
    candidates = [path / name for name in FOLDER_NAMES] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    raise UserError(
        f"expected a tokenizer.json or a folder that holds one (or {', '.join(FOLDER_NAMES[1:])}), got {path}; "
        "check --tokenizer"
    )


def open_vocabulary(file: Path, pattern: str | None = None, eod_id: int | None = None) -> Vocabulary:
    """Read a tokenizer in the format that its first bytes show (pattern, eod_id: for a rank file)."""
    with file.open("rb") as opened:
        head = opened.read(1 << 16)
    if is_tekken(head):
        return open_tekken(file)
    if is_ranks(head):
        return open_ranks(file, pattern, eod_id)
    text = file.suffix == ".json" or head.lstrip()[:1] == b"{"
    return HuggingFaceFile(file) if text else open_sentencepiece(file)


def _configured_eos(folder: Path) -> str | None:
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise UserError(f"expected a JSON object in {config}, got: {error}; correct it or remove it") from error
    return eos.get("content") if isinstance(eos, dict) else eos


def _check_literals(vocabulary: Vocabulary, reference: Encoder, eod: str, eod_id: int) -> None:
    # the other formats' libraries make no special token of text: there only an EOD that is none could come out of it
    specials = vocabulary.specials if isinstance(vocabulary, HuggingFaceFile) else {}
    if found := leaks(reference, {eod: eod_id, **specials}, eod_id):
        text, got = found[0]
        what = f"the end of document '{eod}'" if got == eod_id else "a special token"
        raise UserError(
            f"expected special tokens' literals in a text to stay text, got {what} (id {got}) from the text '{text}' "
            f"by {vocabulary.file}; name another --eod-token, mark it special in added_tokens, or take a tokenizer "
            "whose special tokens are not in its model's vocabulary (for Unigram: the SentencePiece .model)"
        )


def _choose_encoder(vocabulary: Vocabulary, reference: Encoder, requested: str) -> Encoder:
    own = vocabulary.reference_name
    if requested == own:
        return reference
    if requested not in ("auto", "fastokens"):
        raise UserError(f"expected --encoder auto, fastokens or {own} for {vocabulary.file}, got {requested}; choose")
    try:
        return _proven_fast(vocabulary, reference)
    except _Unfit as problem:
        if requested == "fastokens":
            raise UserError(
                f"expected a tokenizer that fastokens can run, got {vocabulary.file} ({problem}); use --encoder {own}"
            ) from problem
        logger.warning("encoding with the slower %s library: %s", own, problem)
        return reference


class _Unfit(Exception):
    """Why fastokens cannot take the reference's place."""


def _proven_fast(vocabulary: Vocabulary, reference: Encoder) -> Encoder:
    try:
        fast = vocabulary.fast()
    except ImportError as error:
        raise _Unfit(f"{error.name} is not installed") from error
    except Exception as error:  # whatever keeps it from this tokenizer, the reference remains
        raise _Unfit(f"fastokens cannot run it: {error}") from error
    texts = adversarial_texts([*LITERALS, *vocabulary.literals])
    if different := differences(fast, reference, texts):
        raise _Unfit(f"fastokens gives other ids on {len(different)} of {len(texts)} hard strings")
    return fast
