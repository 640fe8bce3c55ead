"""How far two stacks' answers for the same tokens are apart: logits, hidden states by layer, greedy generations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_act.errors import UserError

SMALLEST = 1e-30  # a hidden state of zeros has no relative difference


@dataclass(frozen=True)
class Place:
    """Where hidden states were compared; the largest |ours - theirs| / |theirs| of a position (2-norms)."""

    name: str
    relative_difference: float


@dataclass(frozen=True)
class Generated:
    """Greedy generations from one prompt: ``same`` of ``tokens`` agree before the first that differs.

    ``margin`` is by how much transformers preferred its token there; 0 where none differs.
    """

    tokens: int
    same: int
    margin: float


@dataclass(frozen=True)
class Verified:
    """Differences between the two models' logits over ``tokens`` positions, and what transformers generated.

    ``places`` are in the order of computation. ``greedy`` is None where the text was sampled. ``vocab_size`` counts the
    export's rows; ``wanted_vocab_size`` those that stand for tokens, None where nothing tells.
    """

    max_difference: float
    mean_difference: float
    tokens: int
    generated: str
    places: tuple[Place, ...] = ()
    greedy: Generated | None = None
    vocab_size: int | None = None
    wanted_vocab_size: int | None = None

    @property
    def same_vocabulary(self) -> bool:
        """Whether the export has a row for each token and none that is padding, as far as that is known."""
        return self.wanted_vocab_size in (None, self.vocab_size)

    def first_differing(self, tolerance: float) -> Place | None:
        """The first place whose relative difference is beyond the tolerance."""
        return next((place for place in self.places if not place.relative_difference <= tolerance), None)

    def same_generation(self, tolerance: float) -> bool:
        """Whether no token differs but one that differences of logits within the tolerance can turn."""
        return self.greedy is None or self.greedy.same == self.greedy.tokens or self.greedy.margin <= 2 * tolerance

    def equal(self, tolerance: float) -> bool:
        """Whether logits and generation are within the tolerance, vocabularies the same; never with a NaN."""
        return self.max_difference <= tolerance and self.same_generation(tolerance) and self.same_vocabulary


def compare(work: Path, wanted_vocab_size: int | None = None) -> Verified:
    """Compares what both programs left in a folder; only logits where Megatron's program left no more.

    Args:
        work: the folder.
        wanted_vocab_size: rows that stand for tokens; None where nothing tells.

    Raises:
        UserError: logits of another shape: not the same model.
    """
    theirs = np.load(work / "hf_logits.npy", mmap_mode="r")
    ours = np.load(work / "megatron_logits.npy", mmap_mode="r")[..., : theirs.shape[-1]]
    if ours.shape != theirs.shape:
        raise UserError(
            f"--hf: expected logits of shape {ours.shape} as Megatron has, got {theirs.shape}: another model"
        )
    difference = np.abs(ours - theirs)
    generated = (work / "generated.txt").read_text(encoding="utf-8")
    positions = theirs.shape[0] * theirs.shape[1]
    # a NaN must not pass a comparison: max() and mean() keep it, and NaN <= tolerance is False
    largest, mean = float(difference.max()), float(difference.mean())
    sizes = theirs.shape[-1], wanted_vocab_size
    return Verified(largest, mean, positions, generated, _places(work), _greedy(work), *sizes)


def _places(work: Path) -> tuple[Place, ...]:
    if not (work / "megatron_states.npy").is_file():
        return ()
    names = json.loads((work / "places.json").read_text(encoding="utf-8"))
    ours, theirs = (np.load(work / f"{stack}_states.npy", mmap_mode="r") for stack in ("megatron", "hf"))
    if ours.shape != theirs.shape:
        raise UserError(f"--hf: expected hidden states of shape {ours.shape} as Megatron has, got {theirs.shape}")
    return tuple(Place(name, _relative(a, b)) for name, a, b in zip(names, ours, theirs, strict=True))


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    norms = np.maximum(np.linalg.norm(theirs, axis=-1), SMALLEST)
    return float((np.linalg.norm(ours - theirs, axis=-1) / norms).max())


def _greedy(work: Path) -> Generated | None:
    if not (work / "megatron_generated.npy").is_file():
        return None
    theirs, ours = np.load(work / "generated.npy"), np.load(work / "megatron_generated.npy")
    margins = np.load(work / "margins.npy")
    apart = np.flatnonzero(theirs[-len(margins) :] != ours[-len(margins) :]) if len(margins) else np.array([])
    if not len(apart):
        return Generated(len(margins), len(margins), 0.0)
    return Generated(len(margins), int(apart[0]), float(margins[apart[0]]))


def as_json(done: Verified, tolerance: float) -> dict[str, Any]:
    """What ``verify --json`` prints."""
    first = done.first_differing(tolerance)
    return {
        "equal": done.equal(tolerance),
        "tolerance": tolerance,
        "max_difference": done.max_difference,
        "mean_difference": done.mean_difference,
        "tokens": done.tokens,
        "vocab_size": done.vocab_size,
        "wanted_vocab_size": done.wanted_vocab_size,
        "first_differing": first and first.name,
        "layers": [vars(place) for place in done.places],
        "generated": done.generated,
        "greedy": done.greedy and vars(done.greedy),
    }


def as_lines(done: Verified, tolerance: float) -> list[str]:
    """The same for people; the last line is the verdict."""
    return [
        f"largest difference  {done.max_difference:.3e} (tolerance {tolerance:g}, {done.tokens} tokens)",
        f"mean difference     {done.mean_difference:.3e}",
        f"generated           {done.generated!r}",
        f"greedy tokens       {_greedy_words(done.greedy)}",
        f"vocabulary          {_vocabulary_words(done)}",
        f"hidden states       {_place_words(done.places, done.first_differing(tolerance))}",
        _verdict(done, tolerance),
    ]


def _greedy_words(greedy: Generated | None) -> str:
    if greedy is None:
        return "not compared: the text was sampled"
    tail = "" if greedy.same == greedy.tokens else f"; transformers' margin at the first other one: {greedy.margin:.3e}"
    return f"{greedy.same} of {greedy.tokens} equal{tail}"


def _vocabulary_words(done: Verified) -> str:
    if done.wanted_vocab_size is None:
        return f"{done.vocab_size} rows, not compared: no tokenizer, and no --vocab-size in the checkpoint"
    if done.same_vocabulary:
        return f"{done.vocab_size} rows, one for each token"
    return f"{done.vocab_size} rows, expected {done.wanted_vocab_size}: export anew, or give the size with --vocab-size"


def _place_words(places: Sequence[Place], first: Place | None) -> str:
    if not places:
        return "not compared"
    if first:
        return f"first difference in {first.name}: {first.relative_difference:.3e} of its size"
    largest = max(places, key=lambda place: place.relative_difference)
    return (
        f"equal in all {len(places)} places; largest in {largest.name}: {largest.relative_difference:.3e} of its size"
    )


def _verdict(done: Verified, tolerance: float) -> str:
    if done.equal(tolerance):
        return "equal"
    first = done.first_differing(tolerance)
    if not first and not done.same_vocabulary:
        return "DIFFERENT: the export has another vocabulary than the model that Megatron trained"
    where = f", first in {first.name}" if first else ""
    return f"DIFFERENT{where}: the export is not the model that Megatron trained"
