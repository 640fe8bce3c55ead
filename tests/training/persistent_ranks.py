"""The test process's side of ``workers/persistent.py``: ranks that serve one case after the other."""

import contextlib
import json
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from drawn_cases import RANKS, Case
from oracle_state import Shard
from training_support import environment

WORKER = Path(__file__).parent / "workers" / "persistent.py"
CASE_TIMEOUT_S = 400.0  # a case takes seconds, on a busy machine tens of them
EXTRA_S = 300.0  # for the server itself: its import, or replacing ranks


class CaseFailed(Exception):
    """A case raised, ended a rank or did not answer; the message holds the tracebacks."""


@dataclass(frozen=True)
class Outcome:
    """What a case's ranks report (``losses``, ``grad_norms``) and hold."""

    ranks: list[dict[str, Any]]
    shards: list[Shard]


class PersistentRanks:
    """A server process with ``RANKS`` forked ranks, started once.

    Args:
        log: file for everything that Megatron prints.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self.server = subprocess.Popen(
                [sys.executable, str(WORKER), str(RANKS)],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self._answer(EXTRA_S)

    def run(self, case: Case, timeout_s: float = CASE_TIMEOUT_S) -> Outcome:
        """Runs a case.

        Raises:
            CaseFailed: with the ranks' tracebacks; the next case finds new ranks.
        """
        folder = Path(tempfile.mkdtemp())
        try:
            request = {"case": asdict(case), "folder": str(folder), "timeout_s": timeout_s}
            print(json.dumps(request), file=self.server.stdin, flush=True)
            answer = self._answer(timeout_s + EXTRA_S)
            if "error" in answer:
                raise CaseFailed(f"{case}\n{answer['error']}")
            files = [folder / f"shards_{rank}.pt" for rank in range(case.world)]
            return Outcome(answer["ranks"], [Shard(**fields) for file in files for fields in torch.load(file)])
        finally:
            shutil.rmtree(folder)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        output: Any = self.server.stdout
        ready, _, _ = select.select([output], [], [], timeout_s)  # one line per request: nothing waits in a buffer
        line = output.readline() if ready else ""
        if not line:
            self.server.kill()
            raise CaseFailed(f"the server {'ended' if ready else 'did not answer'}\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends server and ranks."""
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(timeout=EXTRA_S)


@contextlib.contextmanager
def persistent_ranks(log: Path) -> Iterator[PersistentRanks]:
    """Ranks for the duration of a context."""
    ranks = PersistentRanks(log)
    try:
        yield ranks
    finally:
        ranks.close()
