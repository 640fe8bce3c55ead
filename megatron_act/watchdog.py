"""A rank that hangs: after ``--hang-timeout-seconds`` without progress it writes all its stacks and ends.

Progress is a forward pass of a micro-batch, in training or evaluation, or the end of a step. Every rank watches itself,
so where one hangs and the others wait for it, all of them tell where they stand: the one that is not in a collective
is the one to look at. torchrun then restarts the run. Start-up and saves, which may take long, are not watched;
collectives have Megatron's ``--distributed-timeout-minutes`` there.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from megatron.training import training as megatron_loop

FLAG = "--hang-timeout-seconds"
BACKSTOP_S = (
    10  # later faulthandler's own thread, which needs no interpreter lock, writes to stderr and ends the process
)
Function = Callable[..., Any]


class Watchdog:
    """Ends the process when ``mark`` has not been called for ``seconds``.

    Args:
        seconds: how long no progress may take.
        folder: for the stacks, ``rank_00003.txt``.
        rank: this process's.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        self.seconds, self.folder, self.rank = seconds, folder, rank
        self.last: float | None = None
        self.watched = threading.main_thread().ident
        self.place = "the first step"
        threading.Thread(target=self._watch, daemon=True, name="megatron-act watchdog").start()

    def mark(self, place: str | None = None) -> None:
        """Progress; ``place`` is named if it is the last."""
        self.place = place or self.place
        self.last = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + BACKSTOP_S, exit=True)

    def pause(self) -> None:
        """Nothing is watched until the next ``mark``."""
        self.last = None
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.seconds / 4))
            last = self.last
            if last is not None and time.monotonic() - last > self.seconds:
                self._end()

    def _end(self) -> None:
        path = self.folder / f"rank_{self.rank:05d}.txt"
        line = (
            f"> megatron-act: rank {self.rank} on {socket.gethostname()}: no progress for {self.seconds:g} s after "
            f"{self.place}; stands in {innermost(sys._current_frames().get(self.watched or 0))}; all stacks: {path}"
        )
        print(line, file=sys.stderr, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        os._exit(1)


def innermost(frame: FrameType | None) -> str:
    """``function (file.py:12), called by ...``: the two innermost frames."""
    names: list[str] = []
    while frame is not None and len(names) < 2:
        code = frame.f_code
        names.append(f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})")
        frame = frame.f_back
    return " called by ".join(names) or "an unknown place"


def install(args: Namespace, forward_step: Function) -> Function:
    """Starts watching where the flag asks for it, from the end of the first step to the end of the training loop.

    Args:
        args: Megatron's validated arguments.
        forward_step: Megatron's; returned as one that marks progress.
    """
    if not args.hang_timeout_seconds:
        return forward_step
    dog = Watchdog(args.hang_timeout_seconds, Path(args.save or ".") / "stacks", args.rank)
    megatron_loop.train = _then_paused(megatron_loop.train, dog)
    megatron_loop.save_checkpoint_and_time = _unwatched(megatron_loop.save_checkpoint_and_time, dog)
    megatron_loop.checkpoint_and_decide_exit = _marking_steps(megatron_loop.checkpoint_and_decide_exit, dog)

    def step(*step_args: Any) -> Any:
        result = forward_step(*step_args)
        if dog.last is not None:
            dog.mark()
        return result

    return step


def _then_paused(original: Function, dog: Watchdog) -> Function:
    def train(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            dog.pause()

    return train


def _unwatched(original: Function, dog: Watchdog) -> Function:
    def save(iteration: int, *args: Any, **kwargs: Any) -> None:
        watched = dog.last is not None
        dog.pause()
        original(iteration, *args, **kwargs)
        if watched:
            dog.mark(f"the save of iteration {iteration}")

    return save


def _marking_steps(original: Function, dog: Watchdog) -> Function:
    def decide(model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any) -> bool:
        exits = original(model, optimizer, scheduler, iteration, *rest)
        dog.mark(f"iteration {iteration}")
        return exits

    return decide
