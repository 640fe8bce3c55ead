"""The entry point, with rank 1 waiting in the middle of an iteration while a test does something to its host.

The file ``pause`` in the folder of ``PACED_FOLDER`` names the iteration, counted from 1; rank 1 makes ``paused`` there
and waits until ``pause`` is gone.
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


def prepare(folder: Path) -> None:
    """Arms the pause."""
    from megatron.training import get_args

    from megatron_act import training_run

    original, pause = training_run.forward_step, folder / "pause"

    def step(data_iterator: Any, model: Any) -> Any:
        output = original(data_iterator, model)
        if pause.is_file() and pause.read_text() == str(get_args().curr_iteration + 1):
            (folder / "paused").touch()
            while pause.is_file():
                time.sleep(0.02)
        return output

    training_run.forward_step = step


if __name__ == "__main__":
    pretrain_gpt.cpu_backend.install()
    if os.environ["RANK"] == "1":
        prepare(Path(os.environ["PACED_FOLDER"]))
    sys.exit(pretrain_gpt._entry())
