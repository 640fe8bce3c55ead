"""The entry point, with rank 1 waiting in the middle of an iteration while a test does something to its host.

Files in the folder of ``PACED_FOLDER`` say what happens when, however long a process takes. The test's: ``pause`` names
an iteration, counted from 1, and rank 1 waits in it until it does so no more; ``hang`` lets the watchdogs, patient
before, end what has made no progress for ``HANG_S``. The ranks': ``rank0_in_4``, that one is in the iteration of
``pause``; ``noticed``, that rank 1 has received SIGTERM there.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from megatron_act import pretrain_gpt  # noqa: E402  takes the backend from sys.argv, also in Megatron's save processes

HANG_S = 6.0


def pause(folder: Path, rank: int) -> None:
    """Arms the pause."""
    from megatron.training import get_args, get_signal_handler

    from megatron_act import training_run

    original = training_run.forward_step

    def step(data_iterator: Any, model: Any) -> Any:
        output, iteration = original(data_iterator, model), str(get_args().curr_iteration + 1)
        if _text(folder / "pause") == iteration:
            (folder / f"rank{rank}_in_{iteration}").touch()
        while rank == 1 and _text(folder / "pause") == iteration:
            if get_signal_handler()._signal_received:
                (folder / "noticed").touch()
            time.sleep(0.02)
        return output

    training_run.forward_step = step


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def lose_patience(folder: Path) -> None:
    """Arms the watchdogs."""
    from megatron_act import watchdog

    class Watchdog(watchdog.Watchdog):
        @property
        def seconds(self) -> float:
            return HANG_S if (folder / "hang").is_file() else self.patience

        @seconds.setter
        def seconds(self, value: float) -> None:
            self.patience = value

    watchdog.Watchdog = Watchdog
    watchdog.BACKSTOP_S = 100


if __name__ == "__main__":
    pretrain_gpt.cpu_backend.install()
    pause(Path(os.environ["PACED_FOLDER"]), int(os.environ["RANK"]))
    lose_patience(Path(os.environ["PACED_FOLDER"]))
    sys.exit(pretrain_gpt._entry())
