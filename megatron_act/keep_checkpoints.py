"""``--keep-last-checkpoints``: which checkpoints of a ``--save`` folder are old, and how they are removed."""

import re
import shutil
from pathlib import Path

from megatron_act.checkpoint.reader import TRACKER

KEEP = "--keep-last-checkpoints"


def tracked(folder: Path) -> int | None:
    """The iteration that a folder's tracker names."""
    file = folder / TRACKER
    word = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return int(word) if word.isdigit() else None


def superseded(folder: Path, keep: int) -> list[Path]:
    """What is older than the ``keep`` last complete checkpoints up to the latest, half-written folders included.

    Later iterations are left alone, they are another run's or are being written, and so are symbolic links.
    """
    latest = tracked(folder)
    numbered = {int(path.name[5:]): path for path in folder.iterdir() if re.fullmatch(r"iter_\d{7}", path.name)}
    complete = sorted(n for n, path in numbered.items() if (path / "metadata.json").is_file() and n <= (latest or 0))
    if latest not in complete:
        return []
    oldest = complete[-keep:][0]
    return [path for n, path in sorted(numbered.items()) if n < oldest and not path.is_symlink()]


def remove(checkpoints: list[Path]) -> None:
    """Removes them, first what makes each complete: one that is half removed is never loaded."""
    for checkpoint in checkpoints:
        (checkpoint / "metadata.json").unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)
        print(f"> megatron-act: removed {checkpoint} ({KEEP})", flush=True)
