"""What the starting process sees of its workers: a bar of documents, and the death of one that was killed.

A killed worker leaves a task's folder whose lock nobody holds. multiprocessing's pool would wait for it forever.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from megatron_act.data.work import Work

POLL_SECONDS = 0.5


class WorkerKilled(RuntimeError):
    """A worker process ended without a word, most often for lack of memory."""


@contextlib.contextmanager
def watched(work: Work, total: int | None, progress: bool, local: bool) -> Iterator[None]:
    """Show progress during the block, and end it when a worker is killed.

    Args:
        total: rows of all sources; None where unknown.
        progress: show a bar on standard error when that is a terminal.
        local: workers belong to this machine; elsewhere the engine starts a killed one again.

    Raises:
        WorkerKilled: in place of waiting forever.
    """
    with tqdm(total=total, desc="tokenizing", unit="doc", disable=None if progress else True) as bar:
        watcher = _Watcher(work, bar, local)
        watcher.start()
        try:
            yield
        except KeyboardInterrupt:
            if watcher.found_dead:
                raise WorkerKilled(
                    "a worker process was killed, most often for memory; go on with --resume and fewer --workers"
                ) from None
            raise
        finally:
            watcher.end.set()
            watcher.join()


class _Watcher(threading.Thread):
    def __init__(self, work: Work, bar: tqdm, local: bool) -> None:
        super().__init__(daemon=True)
        self.work, self.bar, self.local = work, bar, local
        self.found_dead, self.end = False, threading.Event()
        self.counted: dict[Path, int] = {}
        self.unheld: set[Path] = set()

    def run(self) -> None:
        while not self.end.wait(POLL_SECONDS):
            if not self.bar.disable:
                self.bar.update(self._rows() - self.bar.n)
            if self.local and self._somebody_died():
                self.found_dead = True
                os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread
                return

    def _somebody_died(self) -> bool:
        """Whether a folder is unheld twice in a row, without an error that would end the pool anyway."""
        before, self.unheld = self.unheld, {folder for folder, held in self.work.under_way().items() if not held}
        return bool(before & self.unheld) and not self.work.errors()

    def _rows(self) -> int:
        for number in self.work.done():
            folder = self.work.task(number)
            if folder not in self.counted and (result := self.work.result(number)):
                self.counted[folder] = result["rows"]
        return sum(self.counted.values()) + sum(_noted(folder) for folder in self.work.under_way())


def _noted(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return int.from_bytes((folder / "lock").read_bytes()[:8], "little")
    return 0
