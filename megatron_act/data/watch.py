"""What the starting process sees of its workers: a bar of documents, and the death of one that was killed.

multiprocessing's pool starts another worker in its place, but waits forever for the task that it had.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import multiprocess
from tqdm import tqdm

from megatron_act.data.work import Work

POLL_SECONDS = 0.1
GONE_SECONDS = 1.0  # a pool that is being ended ends sooner
WAKE = signal.SIGUSR1  # Ctrl-C's signal is ignored where a shell started this in the background


class WorkerKilled(RuntimeError):
    """A worker process ended without a word, most often for lack of memory."""


@contextlib.contextmanager
def watched(work: Work, tasks: int, rows: int | None, progress: bool) -> Iterator[None]:
    """Show progress during the block, and end it when a worker of this process is killed.

    Args:
        tasks: how many there are.
        rows: of all sources; None where unknown.
        progress: show a bar on standard error when that is a terminal.

    Raises:
        WorkerKilled: in place of waiting forever.
    """
    silent = None if progress else True
    waking = handled(WAKE, signal.default_int_handler)  # ends what the main thread waits for, as Ctrl-C does
    with waking, tqdm(total=rows, desc="tokenizing", unit="doc", disable=silent) as bar:
        watcher = _Watcher(work, tasks, bar)
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


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Another handler of a signal for the block; only the main thread may change it, others leave it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class _Watcher(threading.Thread):
    def __init__(self, work: Work, tasks: int, bar: tqdm) -> None:
        super().__init__(daemon=True)
        self.work, self.tasks, self.bar = work, tasks, bar
        self.found_dead, self.end = False, threading.Event()
        self.counted: dict[Path, int] = {}
        self.others = _children()  # not the pool's
        self.seen: set[int] = set()
        self.complete = time.monotonic()

    def run(self) -> None:
        while not self.end.wait(POLL_SECONDS):
            if not self.bar.disable:
                self.bar.update(self._rows() - self.bar.n)
            if self._somebody_died():
                self.found_dead = True
                if signal.getsignal(WAKE) is signal.default_int_handler:
                    os.kill(os.getpid(), WAKE)
                return

    def _somebody_died(self) -> bool:
        """Whether a child has been gone for a while, though neither the end nor an error has made the pool end it."""
        living = _children() - self.others
        self.seen |= living
        if self.seen == living:
            self.complete = time.monotonic()
        if time.monotonic() - self.complete < GONE_SECONDS:
            return False
        return not self.work.errors() and len(self.work.done()) < self.tasks

    def _rows(self) -> int:
        for number in self.work.done():
            folder = self.work.task(number)
            if folder not in self.counted and (result := self.work.result(number)):
                self.counted[folder] = result["rows"]
        return sum(self.counted.values()) + sum(_noted(folder) for folder in self.work.under_way())


def _children() -> set[int]:
    return {child.pid for child in multiprocess.active_children()}


def _noted(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return int.from_bytes((folder / "lock").read_bytes()[:8], "little")
    return 0
