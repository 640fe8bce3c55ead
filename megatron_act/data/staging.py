"""Write aside, flush to disk, then rename: a file under its final name is always whole."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_act.errors import UserError


def check_absent(finals: Sequence[Path], overwrite: bool) -> None:
    """Refuse to replace what exists, unless asked to.

    Raises:
        UserError: one of the paths exists and `overwrite` is False.
    """
    existing = [str(path) for path in finals if path.exists()]
    if existing and not overwrite:
        raise UserError(f"expected a new output, got existing {', '.join(existing)}; give another name or --overwrite")


@contextlib.contextmanager
def staging_folder(final: Path) -> Iterator[Path]:
    """A private folder `NAME.partial-XXXXXXXX` beside `final`, on the same file system, removed however the block ends.

    Missing parent folders are made, and unmade if the block fails. Only a kill -9 can leave the folder behind.

    Raises:
        UserError: the parent folder cannot be made or written.
    """
    parent = final.parent
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{final.name}.partial-", dir=parent))
    except OSError as error:
        raise UserError(
            f"expected a writable folder, got {parent} ({error.strerror}); choose another output"
        ) from error
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Sequence[Path], finals: Sequence[Path], superseded: Sequence[Path] = ()) -> None:
    """Move finished files to their final names, in the order given, each already on disk when it appears.

    What is replaced disappears first, the last of the order foremost, so that an interruption at any point never leaves
    an old and a new file side by side: give the file that makes the others look whole last.

    Args:
        superseded: files of an earlier output that have no place in this one: removed.
    """
    for path in staged:
        sync(path)
    for path in (*superseded, *reversed(finals)):
        path.unlink(missing_ok=True)
    sync(finals[0].parent)
    for path, final in zip(staged, finals, strict=True):
        os.replace(path, final)
    sync(finals[0].parent)


def publish_folder(staged: Path, final: Path) -> None:
    """Move a finished folder to its final name, replacing a folder that is there."""
    for path in (*staged.iterdir(), staged):
        sync(path)
    if final.exists():
        final.rename(staged.with_name("replaced"))  # inside the staging folder: removed with it
    staged.rename(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Have the disk hold what a file or folder holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
