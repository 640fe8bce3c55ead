"""A bar of the documents that all workers have read, from what they note in the work folder."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from megatron_act.data.work import Work

POLL_SECONDS = 0.1


@contextlib.contextmanager
def shown(work: Work, rows: int | None, progress: bool) -> Iterator[None]:
    """Show progress during the block.

    Args:
        rows: of all sources; None where unknown.
        progress: show a bar on standard error when that is a terminal.
    """
    if not (progress and sys.stderr.isatty()):
        yield
        return
    with tqdm(total=rows, desc="tokenizing", unit="doc") as bar:
        end = threading.Event()
        thread = threading.Thread(target=_update, args=(bar, work, end), daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


def _update(bar: tqdm, work: Work, end: threading.Event) -> None:
    counted: dict[Path, int] = {}
    ended = False
    while not ended:
        ended = end.wait(POLL_SECONDS)
        bar.update(_rows(work, counted) - bar.n)


def _rows(work: Work, counted: dict[Path, int]) -> int:
    for number in work.done():
        folder = work.task(number)
        if folder not in counted and (result := work.result(number)):
            counted[folder] = result["rows"]
    return sum(counted.values()) + sum(_noted(folder) for folder in work.under_way())


def _noted(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return int.from_bytes((folder / "lock").read_bytes()[:8], "little")
    return 0
