"""Runs every arm with torchrun, one after another; a finished run is not repeated."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_act.errors import UserError
from megatron_act.experiment.arms import Experiment, Run
from megatron_act.experiment.layout import Layout
from megatron_act.experiment.machine import describe_machine
from megatron_act.experiment.progress import Progress, Tail
from megatron_act.experiment.records import RunFolder, is_finished, run_folder, write_record

POLL_SECONDS = 0.3
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
MODULE = "megatron_act.pretrain_gpt"
_ERROR_LINE = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception|Interrupt)\b.*|.*Signal \d+ \(SIG\w+\).*)$")
_SECONDARY = ("ChildFailedError", "Connection closed by peer", "Connection reset by peer", "SignalException")


class RunFailed(RuntimeError):
    """A training run ended with an error that is not bad input; the message is one line with the log's path."""


def run_arms(experiment: Experiment, output: str | Path, layout: Layout, force: bool = False) -> None:
    """Trains every run of an experiment into ``output`` and writes ``experiment.json`` there.

    Args:
        experiment: see `arms`.
        output: folder; made with its parents. Finished runs of the same command and inputs are kept.
        layout: the machine's (`layout.detect`).
        force: run finished ones again.

    Raises:
        UserError: bad input, found here or by a run.
        RunFailed: a run ended for another reason.
    """
    output, layout = Path(output).resolve(), experiment.layout(layout)
    runs = experiment.runs(layout)
    with _locked(output) as lock:
        write_description(experiment, runs, output, layout)
        for run in runs:
            folder = run_folder(output, run)
            if is_finished(folder, run) and not force:
                print(f"{run.label}: finished already, kept", file=sys.stderr, flush=True)
                continue
            _train(run, folder, layout, lock)


def write_description(experiment: Experiment, runs: list[Run], output: Path, layout: Layout) -> None:
    """Writes ``experiment.json``: what the results and the report need besides the runs' own files."""
    entries = [
        {
            **{
                "name": run.arm.name,
                "activation": run.arm.activation,
                "seed": run.seed,
                "folder": f"runs/{run.folder}",
            },
            "flags": run.arm.flags,
            "train_iters": run.train_iters,
            "command": shlex.join(command(run, run_folder(output, run), layout)),
            "match": run.match.report(),
        }
        for run in runs
    ]
    content = {
        "name": experiment.name,
        "baseline": experiment.baseline,
        "layout": str(layout),
        "machine": describe_machine(),
        "data": {part: list(prefixes) for part, prefixes in experiment.data.items()} or "mock data",
        "runs": entries,
    }
    (output / "experiment.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def command(run: Run, folder: RunFolder, layout: Layout) -> list[str]:
    """The whole command line of a run."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.ranks)]
    files = ["--metrics-jsonl", str(folder.metrics), "--save", str(folder.checkpoint)]
    saving = ["--ckpt-format", "torch_dist", "--save-interval", str(run.train_iters)]
    return [*launcher, "-m", MODULE, *run.words, *files, *saving]


def _train(run: Run, folder: RunFolder, layout: Layout, lock: int) -> None:
    folder.clear()
    words, started = command(run, folder, layout), time.monotonic()
    progress, tail = Progress(run.label, run.train_iters), Tail(folder.metrics)
    with folder.log.open("wb") as log:
        process = _start(words, log.fileno(), layout, lock)
        try:
            while process.poll() is None:
                progress.update(tail.read())
                time.sleep(POLL_SECONDS)
            progress.update(tail.read())
        except BaseException:  # Ctrl-C above all: nothing may go on training
            stop_tree(process)
            raise
        finally:
            progress.close()
    if process.returncode:
        raise failure(run.label, folder.log, process.returncode)
    write_record(folder, run, words, time.monotonic() - started)


def _start(words: list[str], log: int, layout: Layout, lock: int) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(layout.threads_per_rank)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron insists on it with tensor parallelism before Blackwell
    # Its own session, so that Ctrl-C reaches this process only; the lock is held while torchrun lives, even without us.
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
        pass_fds=(lock,),
    )


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all its descendants: torchrun's workers lead sessions of their own, a group is not enough."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    _, alive = psutil.wait_procs(tree, timeout=GRACE_SECONDS)
    for each in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[int]:
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = os.open(output / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(f"--output: expected a folder to write, got {output}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError:
        raise UserError(f"--output: expected a folder of its own, got {output}: another run is writing there") from None
    finally:
        os.close(lock)


def failure(label: str, log: Path, code: int) -> Exception:
    """The error to raise for a run that ended with ``code``: UserError where the run itself named bad input."""
    line = error_line(log.read_text(encoding="utf-8", errors="replace"))
    if not line and code < 0:
        line = f"ended by {signal.Signals(-code).name}"
    message = f"{label}: {line or f'exit code {code}'} (log: {log})"
    known = line.startswith("error: ") and not line.startswith("error: unexpected")
    return UserError(message.replace("error: ", "", 1)) if known else RunFailed(message)


def error_line(text: str) -> str:
    """The line of a log that says why: our own one-line error, else the first exception, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error: ")]
    found = (match[1] for line in lines if (match := _ERROR_LINE.match(line)))
    primary = [line for line in found if not any(word in line for word in _SECONDARY)]
    return next(iter([*ours, *primary, *lines[-1:]]), "")
