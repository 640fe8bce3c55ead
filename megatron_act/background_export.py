"""Exports beside the training, one at a time: the newest that was asked for comes next, others are left out.

A failure is one line; the training goes on.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_act.keep_checkpoints import tracked

PROJECT = Path(__file__).resolve().parents[1]


class BackgroundExport:
    """Makes one folder again and again.

    Args:
        save: the run's ``--save`` folder.
        output: the model folder.
    """

    def __init__(self, save: Path, output: Path) -> None:
        self.save, self.output = save, output
        self.lock = threading.Lock()
        self.next: dict[str, Any] | None = None
        self.now: dict[str, Any] | None = None
        self.thread: threading.Thread | None = None
        self.process: subprocess.Popen[str] | None = None
        self.stopped = False
        self.freeing = threading.Lock()  # while ``after`` is at work
        self.after: Callable[[], None] = lambda: None  # called when a checkpoint is not needed any more

    def offer(self, record: dict[str, Any]) -> None:
        """Asks for the export of ``record["iteration"]``; returns at once."""
        with self.lock:
            self.next = record
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    def _work(self) -> None:
        while record := self._take():
            while (tracked(self.save) or 0) < record["iteration"]:  # --async-save completes it later
                time.sleep(0.2)
            self._run(record)
            with self.freeing:
                if self.stopped:  # not exported: the next start needs the checkpoint
                    return
                with self.lock:
                    self.now = None
                self.after()

    def _take(self) -> dict[str, Any] | None:
        with self.lock:
            self.now, self.next = self.next, None
            if self.now is None:
                self.thread = None
            return self.now

    def _run(self, record: dict[str, Any]) -> None:
        words = ["--load", str(self.checkpoint(record)), "--output", str(self.output), "--record", json.dumps(record)]
        path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "MEGATRON_ACT_PARENT": str(os.getpid())}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_act.best_export", *words],
                env={**os.environ, **env},
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            _, said = self.process.communicate()
            code = self.process.returncode
        except OSError as error:  # a node without room for one more process
            code, said = 1, str(error)
        if not self.stopped:
            print(f"> megatron-act: {self._outcome(record, code, said)}", flush=True)

    def _outcome(self, record: dict[str, Any], code: int, said: str) -> str:
        what = f"iteration {record['iteration']} (validation loss {record['validation_loss']:.6f})"
        if code == 0:
            return f"exported {what} to {self.output}"
        why = (said.strip().splitlines() or [f"exit code {code}"])[-1].removeprefix("error: ")
        return f"exporting {what} to {self.output} failed ({why}): training goes on"

    def checkpoint(self, record: dict[str, Any]) -> Path:
        """The folder that is exported for a record."""
        return self.save / f"iter_{record['iteration']:07d}"

    def busy(self) -> set[Path]:
        """Checkpoints that are read or will be: they must stay."""
        with self.lock:
            return {self.checkpoint(record) for record in (self.now, self.next) if record}

    def _unfinished(self) -> dict[str, Any] | None:
        with self.lock:
            return self.next or self.now

    def finish(self, seconds: float) -> None:
        """Waits for what is under way, and ends an export when the time is up; says so.

        ``after`` is waited for without a limit: what it removes is gone as a whole.
        """
        thread = self.thread
        if thread is None:
            return
        if seconds and self._unfinished():
            print(f"> megatron-act: waiting up to {seconds:g} s for the export to {self.output}", flush=True)
        thread.join(seconds)
        with self.freeing:
            record = self._unfinished()
            if record is None:
                return
            self.stopped = True
        if self.process is not None:
            self.process.kill()
        said = (
            f"the export of iteration {record['iteration']} to {self.output} is not finished: the next start makes it"
        )
        print(f"> megatron-act: {said}", flush=True)
