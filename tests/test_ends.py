"""How processes of a run end, and what is said of it: bad input that one rank alone sees, Ctrl-C to torchrun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFUSED = """
import sys
from megatron_act import pretrain_gpt
from megatron_act.errors import UserError
def main(argv): raise UserError("this rank's file")
pretrain_gpt.main, pretrain_gpt.FIRST_RANK_S = main, float(sys.argv[1])
sys.exit(pretrain_gpt._entry())
"""
# The run's handler, and a sleep that tells that it begins.
WAITING = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: None)
sleep = time.sleep
time.sleep = lambda seconds: (print(seconds, flush=True), sleep(seconds))
"""
RANK = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
print("started", flush=True)
time.sleep(600)
"""
LIMIT_S = 300


def start(words: list[str], **env: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_bad_input_that_only_a_later_rank_sees_is_said() -> None:
    for rank, line in (("0", "error: this rank's file\n"), ("1", "error: rank 5: this rank's file\n")):
        process = start(["-c", REFUSED, "0"], LOCAL_RANK=rank, RANK="5")
        assert process.communicate() == ("", line) and process.returncode == 2


def test_a_rank_that_waits_for_the_first_to_say_the_same_ends_by_torchruns_signal() -> None:
    """Though the run has a handler that only notes the signal."""
    process = start(["-c", WAITING + REFUSED, "600"], LOCAL_RANK="1")
    assert process.stdout is not None and process.stdout.readline() == "600.0\n"
    process.terminate()
    assert process.communicate(timeout=LIMIT_S)[1] == "" and process.returncode == -signal.SIGTERM


def test_ctrl_c_to_torchrun_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = ["-m", "megatron_act.interruption_torchrun", "--standalone", "--nproc-per-node", "1"]
    process = start([*torchrun, str(tmp_path / "rank.py")])
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 1 and "Traceback" not in errors
    assert "error: ended by SIGINT, the ranks too, without a save: SIGTERM lets them save\n" in errors
