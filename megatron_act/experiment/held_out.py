"""The held-out set of an experiment: which tokens, and how many bytes of text they stand for.

All runs are validated on the same tokens in the same windows (``megatron_act.full_validation``). Where the experiment
wants fewer than there are, whole documents are copied from the front until their number reaches ``held_out_tokens``.

    bits per byte = loss (nats per token) * predicted tokens / (ln 2 * bytes)

counts the end-of-document tokens' loss but no byte for them, and the bytes of the UTF-8 text that the tokens decode to,
document by document. It compares tokenizers; within one experiment it is the loss in another unit.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_act.experiment.arms import Experiment, open_tokenizer
from megatron_act.stored_tokens import StoredTokens, read, write

HASHED_TOKENS = 1 << 20  # at a time
NAME = "held_out"  # of the copy and of the description in the output folder


@dataclass(frozen=True)
class HeldOut:
    """What the validation loss is the mean over.

    Attributes:
        sha256: of the tokens as little-endian int64: the same set has the same digest, whoever stored it.
        bytes: of the decoded text; None without a tokenizer.
    """

    documents: int
    tokens: int
    bytes: int | None
    sha256: str

    def bits_per_byte(self, loss: float) -> float | None:
        """The loss in nats per predicted token as bits per byte of text."""
        return loss * (self.tokens - 1) / (math.log(2) * self.bytes) if self.bytes else None


def prepare(experiment: Experiment, output: Path) -> tuple[Experiment, HeldOut | None]:
    """Makes the held-out copy where one is wanted, and ``held_out.json``; idempotent.

    Returns:
        The experiment with its validation data as the runs see them, and the set's description; None where the
        experiment has no validation data of its own (mock data, or one set for Megatron's ``--split``).

    Raises:
        UserError: files that are no token files.
    """
    if "valid" not in experiment.data:
        return experiment, None
    if experiment.held_out_tokens:
        sets = [read(prefix) for prefix in experiment.data["valid"]]
        _copy(list(_first(sets, experiment.held_out_tokens)), output / NAME)
    experiment = placed(experiment, output)
    sets = [read(prefix) for prefix in experiment.data["valid"]]
    return experiment, _described(sets, experiment.tokenizer, output / f"{NAME}.json")


def placed(experiment: Experiment, output: Path) -> Experiment:
    """The experiment with its validation data as the runs see them, before or after `prepare` has made them."""
    if "valid" not in experiment.data or not experiment.held_out_tokens:
        return experiment
    return replace(experiment, data={**experiment.data, "valid": (str(output / NAME),)})


def _first(sets: Sequence[StoredTokens], wanted: int) -> Iterator[np.ndarray]:
    taken = 0
    for document in (document for each in sets for document in each.documents()):
        if taken >= wanted:
            return
        taken += len(document)
        yield document


def _copy(documents: list[np.ndarray], prefix: Path) -> None:
    """Writes the documents as ``prefix.bin`` and ``.idx``, unless these tokens are there already."""
    files = [prefix.with_suffix(suffix) for suffix in (".bin", ".idx")]
    if not all(file.is_file() for file in files) or files[0].read_bytes() != np.concatenate(documents).tobytes():
        write(prefix, documents)


def _described(sets: Sequence[StoredTokens], tokenizer: str | None, path: Path) -> HeldOut:
    """The description, from ``path`` where it is of the same tokens: decoding a large set takes minutes."""
    digest = hashlib.sha256()
    for each in sets:
        for start in range(0, len(each.tokens), HASHED_TOKENS):
            digest.update(each.tokens[start : start + HASHED_TOKENS].astype("<i8").tobytes())
    key = digest.hexdigest()
    try:
        known = HeldOut(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = None
    if known and known.sha256 == key and (known.bytes is None) == (tokenizer is None):
        return known
    documents, tokens = (sum(counts) for counts in zip(*((len(s.lengths), len(s.tokens)) for s in sets), strict=True))
    found = HeldOut(documents, tokens, text_bytes(sets, tokenizer) if tokenizer else None, key)
    path.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
    return found


def text_bytes(sets: Sequence[StoredTokens], tokenizer: str) -> int:
    """Bytes of UTF-8 of the documents' text, special tokens left out."""
    decode = open_tokenizer(tokenizer).decode
    return sum(
        len(decode(document.tolist(), skip_special_tokens=True).encode())
        for each in sets
        for document in each.documents()
    )
