"""Jobs in processes of this machine: no death of one, at any moment, leaves the others waiting for it.

multiprocessing's own pool starts another process in place of a killed one, and waits for ever for the job that it had.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")


class WorkerKilled(RuntimeError):
    """A worker process ended without a word, most often for lack of memory."""


def each(job: Callable[[Item], None], items: Iterable[Item], workers: int) -> None:
    """Call `job` with each item, in `workers` processes, and return when all have returned.

    Args:
        job: what can be pickled, as the items can. It ends with this process, Ctrl-C's signal does not reach it.

    Raises:
        WorkerKilled: a process was killed, at whatever it was. The others are ended.
        Exception: the first that a job raised, as this process's own. The others are ended too.
    """
    _start_forkserver()
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, initializer=_start_watch) as pool:
        try:
            for done in as_completed([pool.submit(job, item) for item in items]):
                done.result()
        except BaseException as error:
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise WorkerKilled(
                    "a worker process was killed, most often for memory; go on with --resume and fewer --workers"
                ) from error
            raise


def _start_forkserver() -> None:
    """Have workers ignore Ctrl-C, which reaches the whole group: this process decides."""
    if threading.current_thread() is not threading.main_thread():
        return  # may not change a handler
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _start_watch() -> None:
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # it was killed: a run that goes on with its work must not find this one at it
