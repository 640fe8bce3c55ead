"""One bar per run, driven by its JSONL; a line every tenth where standard error is no terminal."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm


class Tail:
    """The complete new lines of a JSONL that another process writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def read(self) -> list[dict[str, Any]]:
        """Lines since the last call, parsed; none while the file does not exist."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class Progress:
    """Shows a run's iterations, loss and time left.

    Args:
        label: the run's name.
        total: iterations of the run.
        stream: where to write (default: standard error).
        position: line of the bar on a terminal, from 0, where several runs train at a time.
    """

    def __init__(self, label: str, total: int, stream: TextIO | None = None, position: int = 0) -> None:
        self.label, self.total = label, total
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.done, self.loss, self.said = 0, float("nan"), 0
        self.first: tuple[int, float] | None = None  # where the pace is measured from: start-up is not part of it
        form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        width = _columns(self.stream) if self.terminal else None
        self.bar = tqdm(
            total=total,
            desc=label,
            file=self.stream,
            bar_format=form,
            ncols=width,
            disable=not self.terminal,
            position=position,
        )

    def update(self, lines: list[dict[str, Any]]) -> None:
        """Takes new lines of the JSONL."""
        steps = [line for line in lines if line["event"] == "step"]
        if not steps:
            self.bar.refresh()
            return
        last = steps[-1]
        if self.first is None:
            self.first = (steps[0]["iteration"], time.monotonic())
            self.bar.unpause()
        if last["loss"] is not None:
            self.loss = last["loss"]
        self.bar.set_postfix_str(f"loss {self.loss:.3f}", refresh=False)
        self.bar.update(last["iteration"] - self.done)
        self.done = last["iteration"]
        if not self.terminal:
            self._say()

    def _say(self) -> None:
        tenth = 10 * self.done // self.total
        if tenth <= self.said:
            return
        self.said = tenth
        share = f"{self.label}: {100 * self.done // self.total}% ({self.done}/{self.total}), loss {self.loss:.3f}"
        print(f"{share}{self._time_left()}", file=self.stream, flush=True)

    def _time_left(self) -> str:
        assert self.first is not None
        steps, seconds = self.done - self.first[0], time.monotonic() - self.first[1]
        if steps <= 0 or self.done >= self.total:
            return ""
        return f", about {seconds * (self.total - self.done) / steps:.0f} s left"

    def close(self) -> None:
        """Ends the bar's line."""
        self.bar.close()


def _columns(terminal: TextIO) -> int:
    """The terminal's width; 80 for one that says 0 (`script`, some containers), where tqdm would print nothing."""
    return os.get_terminal_size(terminal.fileno()).columns or 80
