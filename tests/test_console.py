"""What reaches the console and what the file, line by line, in a process of its own."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_act.console import conflict, folder_of, shown

ROOT = Path(__file__).parents[1]
SAVED = (
    "  [2026-01-02 03:04:05.678901] successfully saved checkpoint from iteration    1200 to /ck/a b [ t 1/2, p 1/1 ]"
)
PROGRAM = """
import logging, os, subprocess, sys, warnings
from argparse import Namespace
from pathlib import Path
logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)], level=logging.INFO)  # as Megatron does
library = logging.getLogger("library")
library.addHandler(logging.StreamHandler())
library.propagate = False
from megatron_act import console
from megatron_act.errors import UserError
args = Namespace(save=None, log_dir=sys.argv[1], megatron_log=False)
with console.split(args, 3, ["--these", "words"]):
    print("megatron")
    print("> megatron-act: ours")
    print("step  5/10 | loss 1.0000")
    sys.stdout.write("step  6/10 ")  # in two writes
    print("| loss 2.0000", flush=True)
    os.write(1, b"native\\n")
    subprocess.run(["echo", "child"])
    warnings.warn("careful")
    logging.info("informed")
    logging.error("broken")
    library.warning("mind")
    library.error("lost")
    print("complaint", file=sys.stderr)
    os.write(2, b"native complaint\\n")
    {end}
print("after")
"""


def run(folder: Path, end: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", PROGRAM.replace("{end}", end), str(folder / "logs")]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(words, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": path}, check=False)


def test_each_line_has_its_place(tmp_path: Path) -> None:
    done = run(tmp_path, "pass")
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        ["> megatron-act: ours", "step  5/10 | loss 1.0000", "step  6/10 | loss 2.0000", "after"],
    )
    assert done.stderr.splitlines() == ["ERROR:root:broken", "ERROR:library:lost", "complaint", "native complaint"]
    log = (tmp_path / "logs" / "rank_00003.log").read_text().splitlines()
    assert "['--these', 'words']" in log[0]
    expected = ["megatron", "> megatron-act: ours", "step  5/10 | loss 1.0000", "step  6/10 | loss 2.0000", "native"]
    assert log[1:7] == [*expected, "child"]
    assert "UserWarning: careful" in log[7]
    assert [line for line in log[8:] if line.strip() and not line.startswith("  ")] == [
        *("INFO:root:informed", "ERROR:root:broken", "mind", "lost", "complaint")
    ]


def test_a_failures_traceback_is_in_both_with_the_files_name_on_the_console(tmp_path: Path) -> None:
    done = run(tmp_path, "raise RuntimeError('of this')")
    path = tmp_path / "logs" / "rank_00003.log"
    assert done.returncode == 1 and "after" not in done.stdout
    for text in (done.stderr, path.read_text()):
        assert text.count("Traceback") == 1 and "RuntimeError: of this" in text
    assert f"ends by RuntimeError; its whole output: {path}" in done.stderr


@pytest.mark.parametrize(("end", "code", "said"), [("sys.exit(0)", 0, False), ("sys.exit(16)", 16, True)])
def test_exits(end: str, code: int, said: bool, tmp_path: Path) -> None:
    done = run(tmp_path, end)
    assert done.returncode == code
    assert ("ends by SystemExit" in done.stderr) == said


def test_a_second_start_appends(tmp_path: Path) -> None:
    run(tmp_path, "pass")
    run(tmp_path, "pass")
    assert (tmp_path / "logs" / "rank_00003.log").read_text().count("\nmegatron\n") == 2


def test_a_console_that_is_gone_does_not_end_a_run(tmp_path: Path) -> None:
    words = [sys.executable, "-c", PROGRAM.replace("{end}", "print('> megatron-act: ' + 'x' * 10**6, 'end')")]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = ["bash", "-c", 'set -o pipefail; "$@" 2>/dev/null | true', "bash", *words, str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert " end\n" in (tmp_path / "rank_00003.log").read_text()


def test_a_full_disk_does_not_end_a_run(tmp_path: Path) -> None:
    """A limit on the file's size stands for it, from the first line on; what loggers hold back counts too."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999)); print('x' * 2000)"
    done = run(tmp_path, f"{limit}; logging.info('y' * 2000); library.warning('z'); print('> megatron-act: end')")
    assert done.returncode == 0 and "> megatron-act: end\n" in done.stdout and done.stdout.endswith("after\n")
    assert "Logging error" not in done.stderr
    assert (tmp_path / "logs" / "rank_00003.log").stat().st_size == 999


def test_a_line_of_another_thread_is_not_lost_in_a_hidden_one(tmp_path: Path) -> None:
    aside = "threading.Thread(target=print, args=('> megatron-act: aside',))"
    done = run(tmp_path, f"import threading; sys.stdout.write('megatron '); t = {aside}; t.start(); t.join(); print()")
    assert done.stdout.splitlines()[-2:] == ["> megatron-act: aside", "after"]


def test_what_a_handler_of_a_run_says_after_it_goes_where_it_did_before(tmp_path: Path) -> None:
    late = "library.addHandler(logging.StreamHandler()); atexit.register(library.error, 'late')"
    done = run(tmp_path, f"import atexit; {late}")
    assert done.stderr.splitlines()[-2:] == ["late", "late"] and "Logging error" not in done.stderr


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    done = run(tmp_path, "pass")
    expected = f"UserError: {tmp_path}/logs/rank_00003.log: expected a file that can be written, got File exists: give"
    assert expected in done.stderr.splitlines()[-1] and "after" not in done.stdout


def test_megatrons_lines_in_short() -> None:
    assert shown(SAVED) == "> megatron-act: saved step 1200 to /ck/a b"
    loaded = "  successfully loaded checkpoint from /ck [ t 1/1, gtp_remat 1/1, p 1/1 ] at iteration 40"
    assert shown(loaded) == "> megatron-act: loaded step 40 from /ck"
    ended = "[exiting program after receiving SIGTERM.] datetime: 2026-01-02 03:04:05.678901 "
    assert shown(ended) == "> megatron-act: exiting program after receiving SIGTERM"
    for line in (" iteration        1/       4 | lm loss: 6.2 |", "step", "[after training is done] datetime: x", ""):
        assert shown(line) is None


def test_the_folder() -> None:
    def args(save: str | None = None, log_dir: str | None = None, megatron_log: bool = False) -> Namespace:
        return Namespace(save=save, log_dir=log_dir, megatron_log=megatron_log)

    assert folder_of(args()) is None
    assert folder_of(args(save="/ck")) == Path("/ck/logs")
    assert folder_of(args(save="/ck", log_dir="/elsewhere")) == Path("/elsewhere")
    assert folder_of(args(save="/ck", megatron_log=True)) is None
    assert conflict(args(save="/ck", megatron_log=True)) is None
    assert (conflict(args(log_dir="/x", megatron_log=True)) or "").startswith("--megatron-log and --log-dir: expected")
