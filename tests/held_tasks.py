"""tools/preprocess_fineweb_edu.py with tasks that wait for the test: from the number in the file $HOLD on.

So a run is under way for as long as a test needs, however slow the machine.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import preprocess_fineweb_edu

from megatron_act.data import engine


class HeldStep(engine.EncodeStep):
    """The step of every task."""

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        """Wait, then do the task."""
        while rank >= first_held():
            time.sleep(0.01)
        super().run(data, rank, world_size)


def first_held() -> float:
    """The first task that may not begin."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(Path(os.environ["HOLD"]).read_text())
    return float("inf")


if __name__ == "__main__":
    engine.EncodeStep = HeldStep  # type: ignore[misc]
    sys.exit(preprocess_fineweb_edu.main())
