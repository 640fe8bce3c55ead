"""Faults of a rank, each at a given iteration: a signal, a hang, a NaN, a disk without room.

As a program it is the entry point with one fault in each start, for torchrun, which restarts it:

    fault.py '[{"kind": "signal", ...}]' --cpu ...
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from megatron_act import pretrain_gpt  # noqa: E402  takes the backend from sys.argv, also in Megatron's save processes

DISK = 20_000  # bytes that a checkpoint's file may have


def prepare(kind: str, iteration: int, rank: int, **more: Any) -> None:
    """Arms one fault.

    Args:
        kind: ``signal`` (``number``, ``to_parent``), ``hang`` (``seconds``), ``nan`` (``micro_batch``, ``row``),
            ``disk``, or ``late`` (``minutes``).
        iteration: counted from 1, the step in which it happens; for ``disk`` the one that is saved.
        rank: of the rank that has it.
    """
    if int(os.environ["RANK"]) == rank:
        {"signal": _signal, "hang": _hang, "nan": _nan, "disk": _disk, "late": _late}[kind](iteration, **more)


def _in_step(iteration: int, act: Any) -> None:
    """Calls ``act(micro_batch, output)`` after each forward pass of one iteration; it returns the output."""
    from megatron.training import get_args

    from megatron_act import training_run

    original, calls = training_run.forward_step, []

    def step(data_iterator: Any, model: Any) -> Any:
        output, loss = original(data_iterator, model)
        if get_args().curr_iteration + 1 == iteration:
            output = act(len(calls), output)
            calls.append(output)
        return output, loss

    training_run.forward_step = step


def _signal(iteration: int, number: int, to_parent: bool = False) -> None:
    def act(micro_batch: int, output: Any) -> Any:
        if number == signal.SIGKILL:
            os.killpg(0, number)  # under torchrun, the rank with the process that Megatron's saves have started
        if micro_batch == 0:
            os.kill(os.getppid() if to_parent else os.getpid(), number)
        return output

    _in_step(iteration, act)


def _hang(iteration: int, seconds: float) -> None:
    """For ever, of which ``seconds`` have passed when it begins."""
    from megatron_act.watchdog import Watchdog

    original, dogs = Watchdog.mark, []

    def mark(dog: Watchdog, place: str | None = None) -> None:
        original(dog, place)
        dogs[:] = [dog]

    def get_lost(micro_batch: int, output: Any) -> Any:
        dogs[0].last -= seconds
        time.sleep(600)
        return output

    Watchdog.mark = mark
    _in_step(iteration, get_lost)


def _nan(iteration: int, micro_batch: int, row: int) -> None:
    def act(call: int, output: Any) -> Any:
        if call == micro_batch:
            output = output.clone()
            output[row, 5] = float("nan")
        return output

    _in_step(iteration, act)


def _disk(iteration: int) -> None:
    """A limit on a file's size stands for the disk: the write fails in its middle, and leaves what was written."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = FileSystemWriterAsync.write_preloaded_data

    def write(*args: Any, write_bucket: Any, **kwargs: Any) -> Any:
        small = Path(write_bucket[0]).parent.name == f"iter_{iteration:07d}"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, limits[1]) if small else limits)
        try:
            return original(*args, write_bucket=write_bucket, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


def _late(iteration: int, minutes: float) -> None:
    """The training began ``minutes`` earlier than it did, as of one iteration."""
    from megatron.training import training as megatron_loop

    def act(micro_batch: int, output: Any) -> Any:
        megatron_loop._TRAIN_START_TIME -= 60 * minutes
        return output

    _in_step(iteration, act)


if __name__ == "__main__":
    faults = json.loads(sys.argv.pop(1))[int(os.environ["TORCHELASTIC_RESTART_COUNT"]) :]
    pretrain_gpt.cpu_backend.install()
    if faults:
        prepare(**faults[0])
    sys.exit(pretrain_gpt._entry())
