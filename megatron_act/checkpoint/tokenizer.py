"""The tokenizer that goes with an exported model: its files, its size, its special tokens."""

import json
import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_act.checkpoint.families import OWN
from megatron_act.errors import UserError

MARKERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
NOT_TOKENIZER = ("config.json", "generation_config.json", "preprocessor_config.json")
SUFFIXES = (".json", ".model", ".txt", ".jinja")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer folder. ``size`` is its largest id + 1; ``token_ids`` its bos, eos and pad.

    ``generation`` is the content of its ``generation_config.json``, if it has one.
    """

    folder: Path
    files: tuple[Path, ...]
    size: int
    token_ids: dict[str, int | None]
    generation: dict[str, Any] | None = None


def find_tokenizer(args: Namespace, folder: str | Path | None) -> Tokenizer | None:
    """The given folder's tokenizer, or that of the checkpoint's ``--tokenizer-model`` where it still is a folder.

    Raises:
        UserError: the given folder has no tokenizer that transformers reads.
    """
    if folder is not None:
        return read_tokenizer(Path(folder))
    recorded = getattr(args, "tokenizer_model", None)
    if recorded and any((Path(recorded) / marker).is_file() for marker in MARKERS):
        return read_tokenizer(Path(recorded))
    return None


def read_tokenizer(folder: Path) -> Tokenizer:
    """Opens a tokenizer folder.

    Raises:
        UserError: no such folder, or transformers cannot read it.
    """
    if not any((folder / marker).is_file() for marker in MARKERS):
        raise UserError(
            f"--tokenizer {folder}: expected a folder with tokenizer.json, got none: give the tokenizer's folder"
        )
    words = open_words(folder)
    files = sorted(
        file for file in folder.iterdir() if file.suffix in SUFFIXES and not _is_weights(file.name) and file.is_file()
    )
    size = max(words.get_vocab().values()) + 1
    return Tokenizer(folder, tuple(files), size, {name: getattr(words, name) for name in SPECIAL}, _generation(folder))


def open_words(folder: Path) -> Any:
    """The folder's tokenizer as transformers reads it; code in the folder never runs.

    Raises:
        UserError: transformers cannot read it, or not without the folder's code.
    """
    from transformers import AutoConfig, AutoTokenizer

    from megatron_act.checkpoint.configuration_megatron_act import MegatronActConfig

    AutoConfig.register(OWN, MegatronActConfig, exist_ok=True)  # AutoTokenizer looks at config.json beside the words
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--tokenizer {folder}: expected tokenizer files that transformers reads without code of the folder, "
            f"got: {error}"
        ) from error


def _generation(folder: Path) -> dict[str, Any] | None:
    file = folder / "generation_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise UserError(f"{file}: expected a JSON file, got: {error}: repair or remove it") from None


def _is_weights(name: str) -> bool:
    return name in NOT_TOKENIZER or name.endswith(".index.json")


def real_vocab_size(args: Namespace, words: Tokenizer | None, padded: int) -> int | None:
    """Rows that stand for tokens: those of the tokenizer, and those that the run's ``--vocab-size`` names besides.

    An imported model may have more rows than its tokenizer has tokens; they are the model's, not padding. None where
    neither is known. Arguments as for `unpadded_vocab_size`.
    """
    recorded = getattr(args, "vocab_size", None) or 0
    sizes = [words.size if words else 0, recorded if recorded <= padded or not words else 0]
    return max(sizes) or None


def unpadded_vocab_size(args: Namespace, words: Tokenizer | None, padded: int, given: int | None) -> int:
    """Rows of the embedding that stand for tokens.

    Megatron pads the vocabulary to a multiple of ``--make-vocab-size-divisible-by`` x tensor-parallel size; nothing
    trains the rows beyond. It records the real size only where ``--vocab-size`` was given.

    Args:
        args: Megatron's saved arguments.
        words: the tokenizer, if known.
        padded: rows in the checkpoint.
        given: what the user says, over all else.

    Raises:
        UserError: more tokens than rows, or none.
    """
    if given is not None and given < 1:
        raise UserError(f"--vocab-size: expected at least 1, got {given}")
    size = given or real_vocab_size(args, words, padded)
    if size is None:
        log.warning(
            "vocabulary size unknown: all %d rows are kept, padding included; see --tokenizer, --vocab-size", padded
        )
        return padded
    if size > padded:
        source = "--vocab-size" if given else "tokenizer"
        raise UserError(f"{source}: expected at most the checkpoint's {padded} embedding rows, got {size} tokens")
    return size
