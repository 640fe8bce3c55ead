"""One training run as a child process: started, watched by its JSONL, stopped with all its descendants."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron_act.errors import UserError
from megatron_act.experiment.arms import Run
from megatron_act.experiment.layout import Layout
from megatron_act.experiment.progress import Progress, Tail
from megatron_act.experiment.records import RunFolder, write_record

GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
MODULE = "megatron_act.pretrain_gpt"
_ERROR_LINE = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception|Interrupt)\b.*|.*Signal \d+ \(SIG\w+\).*)$")
_SECONDARY = ("ChildFailedError", "Connection closed by peer", "Connection reset by peer", "SignalException")


class RunFailed(RuntimeError):
    """A training run ended with an error that is not bad input; the message is one line with the log's path."""


def command(run: Run, folder: RunFolder, layout: Layout) -> list[str]:
    """The whole command line of a run: torchrun, or without it for one rank, whose start takes half the time."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.ranks)]
    launcher = [sys.executable, *(torchrun if layout.ranks > 1 else [])]
    files = ["--metrics-jsonl", str(folder.metrics), "--save", str(folder.checkpoint)]
    if "--data-cache-path" not in run.words and "--mock-data" not in run.words:
        files += ["--data-cache-path", str(folder.cache)]
    saving = ["--ckpt-format", "torch_dist", "--save-interval", str(run.train_iters)]
    return [*launcher, "-m", MODULE, *run.words, *files, *saving]


class Job:
    """A run that is training.

    Args:
        run: what to train.
        folder: where; whatever an unfinished run left there is removed.
        layout: ranks and threads.
        lock: a descriptor that the child holds, so that a lock lasts as long as it lives, even without us.
        slot: which of the runs at a time this is, from 0: its GPUs and its line on a terminal.
    """

    def __init__(self, run: Run, folder: RunFolder, layout: Layout, lock: int, slot: int = 0) -> None:
        folder.clear()
        self.run, self.folder, self.layout, self.slot = run, folder, layout, slot
        self.words, self.started = command(run, folder, layout), time.monotonic()
        self.progress, self.tail = Progress(run.label, run.train_iters, position=slot), Tail(folder.metrics)
        with folder.log.open("wb") as log:
            # Its own session, so that Ctrl-C reaches this process only.
            self.process = subprocess.Popen(
                self.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(layout, slot),
                start_new_session=True,
                pass_fds=(lock,),
            )

    def poll(self) -> bool:
        """Shows progress; True when the run has ended well, and is recorded as finished.

        Raises:
            UserError: the run itself named bad input.
            RunFailed: it ended for another reason.
        """
        ended = self.process.poll() is not None
        self.progress.update(self.tail.read())
        if not ended:
            return False
        self.progress.close()
        if self.process.returncode:
            raise failure(self.run.label, self.folder.log, self.process.returncode)
        write_record(self.folder, self.run, self.words, time.monotonic() - self.started, str(self.layout))
        return True

    def stop(self) -> None:
        """Ends the run where it stands."""
        stop_tree(self.process)
        self.progress.close()


def environment(layout: Layout, slot: int) -> dict[str, str]:
    """The child's environment: this package, its share of the cores, and its GPUs where several runs share a host."""
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    env["OMP_NUM_THREADS"] = str(layout.threads_per_rank)
    env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron insists on it with tensor parallelism before Blackwell
    if layout.device == "cuda" and slot:
        visible = env.get("CUDA_VISIBLE_DEVICES", "")
        first = slot * layout.ranks
        devices = visible.split(",") if visible else [str(index) for index in range(first + layout.ranks)]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices[first : first + layout.ranks])
    return env


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
