"""A notice that comes again when a run is over does not change how it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RANK = """
import os, signal, sys
from megatron_act import pretrain_gpt

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)  # finalizing Python has put back the defaults of the signals that had a handler

def main(argv):
    if sys.argv[1] == "handled":  # as Megatron does
        signal.signal(signal.SIGTERM, lambda *_: None)
    return 3

late, pretrain_gpt.main = Late(), main
sys.exit(pretrain_gpt._entry())
"""


def code_of(kind: str) -> int:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, "-c", RANK, kind], env={**os.environ, "PYTHONPATH": path}).returncode


def test_sigterm_after_a_run_that_handles_it_leaves_the_exit_code() -> None:
    assert code_of("handled") == 3


def test_a_run_that_does_not_handle_sigterm_dies_of_it_until_its_end() -> None:
    """And shows that the signal comes so late."""
    assert code_of("not handled") == -signal.SIGTERM
