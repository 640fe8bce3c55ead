"""Repairs the file that names a folder's latest checkpoint, where a run ended while it wrote it.

Megatron writes a checkpoint's shards, then what makes it complete (``.metadata``, ``metadata.json``), then the tracker,
so an interrupted save is never loaded and the next one overwrites it. But it opens the tracker for writing, which
empties it, and then writes: a run that is killed between the two leaves an empty file, and the next one would end with
exit code 0, as if it had finished training.
"""

import uuid
from pathlib import Path

from megatron_act.checkpoint.reader import TRACKER
from megatron_act.errors import UserError


def repair_tracker(folder: str | Path) -> str | None:
    """Makes an empty tracker name the checkpoint that was completed last.

    Every process may call it at once: each writes the same.

    Args:
        folder: a ``--load`` folder; does nothing if it has no tracker.

    Returns:
        One sentence about what was repaired, or None.

    Raises:
        UserError: a tracker that names no iteration, and is not empty or has no complete checkpoint beside it.
    """
    tracker = Path(folder) / TRACKER
    word = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else "release"
    if word.isdigit() or word == "release":
        return None
    found = Path(folder).glob("iter_" + "[0-9]" * 7 + "/metadata.json")
    complete = sorted(found, key=lambda file: (file.stat().st_mtime_ns, file))
    if word or not complete:
        raise UserError(
            f"{tracker}: expected an iteration number, got {word[:40]!r}: write the one to load, or remove it"
        )
    iteration = int(complete[-1].parent.name.removeprefix("iter_"))
    write_tracker(folder, iteration)
    return f"{tracker} was empty, as after a run that ended while it saved: set to {iteration}, completed last"


def write_tracker(folder: str | Path, iteration: int) -> None:
    """Makes a folder's tracker name an iteration: no process ever reads half of it."""
    tracker = Path(folder) / TRACKER
    written = tracker.with_name(f"{TRACKER}.{uuid.uuid4()}")  # hosts may share process numbers
    written.write_text(str(iteration), encoding="utf-8")
    written.replace(tracker)
