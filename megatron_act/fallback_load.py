"""A latest checkpoint that cannot be read: the previous one is loaded, and a line says so; never random weights.

A file may be shorter than what was written to it: a disk that filled up, a machine that lost power, a copy that was cut
off. The checkpoint's own ``.metadata`` tells how long each file must be; comparing costs one look at each file, no
reading. What a length does not show, Megatron's ``--verify-integrity`` does.
"""

import json
import pickle
from argparse import Namespace
from pathlib import Path

from megatron_act.checkpoint.lengths import shortened
from megatron_act.checkpoint.reader import TRACKER, chosen
from megatron_act.checkpoint.restricted import read_metadata
from megatron_act.checkpoint.tracker import write_tracker
from megatron_act.errors import UserError

_UNREADABLE = (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError, KeyError, ValueError)


def ensure_readable(args: Namespace) -> str | None:
    """Makes the tracker of ``--load`` name a checkpoint that can be read; any number of processes may call it at once.

    Args:
        args: parsed; other formats than ``torch_dist`` are left to Megatron.

    Returns:
        One sentence about what was changed or found, or None.

    Raises:
        UserError: no readable checkpoint is left, or the one of ``--ckpt-step`` is broken.
    """
    if not args.load or args.ckpt_format != "torch_dist" or not Path(args.load).is_dir():
        return None
    folder = Path(args.load)
    if args.ckpt_step:
        _demand(chosen(folder, args.ckpt_step), "leave --ckpt-step out or name another one")
        return None
    tracker = folder / TRACKER
    if not tracker.is_file():
        return _untracked(folder)
    word = tracker.read_text(encoding="utf-8").strip()
    if word == "release":
        _demand(folder / word, "write it again or load another one")
        return None
    return _fall_back(folder, int(word))


def damage(checkpoint: Path) -> str | None:
    """Why a ``torch_dist`` checkpoint cannot be read, in a few words, or None; of other formats nothing is known.

    Args:
        checkpoint: an ``iter_XXXXXXX`` folder.
    """
    if not checkpoint.is_dir():
        return "no such folder"
    if any(checkpoint.glob("mp_rank_*")):
        return None
    try:
        json.loads((checkpoint / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "metadata.json is missing or broken"
    try:
        return shortened(checkpoint, read_metadata(checkpoint))
    except _UNREADABLE:
        return ".metadata is missing or broken"


def _demand(checkpoint: Path, remedy: str) -> None:
    if why := damage(checkpoint):
        raise UserError(f"{checkpoint}: expected a complete checkpoint, got a broken one ({why}): {remedy}")


def _untracked(folder: Path) -> str | None:
    complete = _complete(folder)
    if not complete:
        return None
    return (
        f"{folder} has no {TRACKER}, so nothing is loaded, and complete checkpoints (last {_iteration(complete[-1])}): "
        "write its number there to resume"
    )


def _fall_back(folder: Path, iteration: int) -> str | None:
    """Only to an earlier iteration: a later one is of a run that was given up when this one went back."""
    broken = folder / f"iter_{iteration:07d}"
    why = damage(broken)
    if why is None:
        return None
    readable = [found for found in _complete(folder) if _iteration(found) < iteration and damage(found) is None]
    if not readable:
        raise UserError(
            f"{broken}: expected a readable checkpoint, got a broken one ({why}) and no earlier one: restore a copy, "
            "or start from scratch with another --load"
        )
    previous = _iteration(readable[-1])
    write_tracker(folder, previous)
    return f"{broken} cannot be read ({why}): falling back to iteration {previous}, the one before"


def _complete(folder: Path) -> list[Path]:
    """Checkpoints in the order in which they were completed."""
    found = folder.glob("iter_" + "[0-9]" * 7 + "/metadata.json")
    return [file.parent for file in sorted(found, key=lambda file: (file.stat().st_mtime_ns, file))]


def _iteration(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iter_"))
