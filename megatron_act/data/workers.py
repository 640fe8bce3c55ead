"""Apply a function to items in other processes and take the results in the order of the items."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from typing import Any

_function: Callable[[Any], Any]
_stop: Event


def ordered_map(build: Callable[[], Callable], items: Iterable, workers: int) -> Iterator:
    """`map(build(), items)`, in order, in `workers` processes (1: in this one).

    Args:
        build: makes the function, once per process (a place to load a tokenizer); picklable.
        items: picklable; at most 2 * workers are under way, so results never pile up.
        workers: number of processes, each with one thread of its own for the tokenizer.

    Raises:
        RuntimeError: a worker was killed (most often: out of memory). An exception of the function comes through.
    """
    if workers == 1:
        yield from map(build(), items)
        return
    context = multiprocessing.get_context("spawn")  # the tokenizer has threads: a fork could deadlock
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(build, stop)) as pool:
        try:
            yield from _drain(pool, items, 2 * workers)
        except BrokenProcessPool as error:
            raise RuntimeError("a worker process was killed, most often for memory; use fewer --workers") from error
        except BaseException:
            stop.set()  # items that have not begun return at once
            raise


def _drain(pool: ProcessPoolExecutor, items: Iterable, window: int) -> Iterator:
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(_apply, item))
        if len(waiting) == window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start(build: Callable[[], Callable], stop: Event) -> None:
    global _function, _stop
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when the tokenizer is built, below
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _stop, _function = stop, build()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed: nobody reads the results


def _apply(item: Any) -> Any:
    return None if _stop.is_set() else _function(item)
