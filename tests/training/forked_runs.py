"""The test process's side of ``workers/forked_runs.py``: training runs that skip the imports, 3 s of each rank."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training_support import environment

WORKER = Path(__file__).parent / "workers" / "forked_runs.py"
TIMEOUT_S = 200.0


class ForkedRuns:
    """A server process from which each run's ranks are forked.

    Args:
        log: file for what the server itself prints.
        engine: with Transformer Engine's layers on the CPU (``te_cpu``).
    """

    def __init__(self, log: Path, engine: bool = False) -> None:
        self.log = log
        with log.open("w") as output:
            self.server: Any = subprocess.Popen(
                [sys.executable, str(WORKER), *(["engine"] if engine else [])],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self._answer()

    def run(self, words: Sequence[str], ranks: int, log: Path, prepare: Any = None) -> list[int]:
        """Runs the entry point with the words of a command line; returns the ranks' exit codes as they ended.

        Args:
            words: the command line.
            ranks: how many processes.
            log: file for what they print.
            prepare: module of ``workers`` and arguments of its ``prepare``, called in each rank before it starts.
        """
        request = {"words": [*words], "ranks": ranks, "log": str(log), "prepare": prepare, "timeout_s": TIMEOUT_S}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return self._answer()["codes"]

    def _answer(self) -> dict[str, Any]:
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended\n{self.log.read_text()[-3000:]}")
        return json.loads(line)


@contextlib.contextmanager
def forked_runs(log: Path, engine: bool = False) -> Iterator[ForkedRuns]:
    """A server for the duration of a context."""
    runs = ForkedRuns(log, engine)
    try:
        yield runs
    finally:
        runs.server.stdin.close()
        runs.server.wait(timeout=300)
