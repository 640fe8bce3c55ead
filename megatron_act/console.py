"""Where a run's output goes: a person's lines on the console, everything else into one file a rank.

Inside ``split`` a rank's standard output is ``DIR/rank_00000.log``, for Megatron, libraries, native code and child
processes alike; DIR is ``--log-dir`` or ``SAVE/logs``. The console gets

* this project's lines: ``> megatron-act: ...``, a line per logged step, a line per evaluation (``step_line``);
* short forms of what Megatron says when it loads, saves or ends early (``shown``);
* standard error and logged errors, which are in the file too; native code's standard error is on the console only.

Python's warnings and whatever loggers wrote to standard error go to the file. A failure leaves its traceback in both.
Output that cannot be written (a closed terminal, a full disk) is dropped: it must not end a training run.
"""

import contextlib
import io
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_act.errors import UserError

RAW, DIR = "--megatron-log", "--log-dir"
PREFIX = "> megatron-act: "

_SHOWN = (
    (re.compile(r"(> megatron-act: .*|(?:evaluation at )?step +[\d,]+.* \| .*)"), r"\1"),
    (re.compile(r"\[(exiting program .*?)\.?\] datetime: .*"), PREFIX + r"\1"),
    (re.compile(r"  \[.*\] successfully saved checkpoint from iteration +(\d+) to (.*) \[ t .*"),
     PREFIX + r"saved step \1 to \2"),
    (re.compile(r"  successfully loaded checkpoint from (.*) \[ t .* at iteration +(\d+).*"),
     PREFIX + r"loaded step \2 from \1"),
)  # fmt: skip


def shown(line: str) -> str | None:
    """What the console gets of a line of standard output, or None."""
    matches = ((pattern.fullmatch(line), form) for pattern, form in _SHOWN)
    return next((match.expand(form) for match, form in matches if match), None)


def folder_of(args: Namespace) -> Path | None:
    """The folder of the files; None where the output stays on the console."""
    if args.megatron_log:
        return None
    if args.log_dir:
        return Path(args.log_dir)
    return Path(args.save) / "logs" if args.save else None


def conflict(args: Namespace) -> str | None:
    """Why the flags cannot be served: one sentence with what to change, or None."""
    if args.megatron_log and args.log_dir:
        return f"{RAW} and {DIR}: expected one of them, got both: the first leaves all output on the console"
    return None


@contextlib.contextmanager
def split(args: Namespace, rank: int, words: list[str]) -> Iterator[None]:
    """Sends output where it belongs, for the duration of a context.

    Args:
        args: parsed, not yet validated by Megatron.
        rank: this process's.
        words: the command line, for the file.

    Raises:
        UserError: the file cannot be written.
    """
    folder = folder_of(args)
    if folder is None:
        if rank == 0 and not args.megatron_log:
            print(f"{PREFIX}no --save and no {DIR}: Megatron's own output stays here", flush=True)
        yield
        return
    path = folder / f"rank_{rank:05d}.log"
    with _opened(path) as file, _streams(file) as (out, err), _loggers(file, out, err):
        print(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()}, process {os.getpid()}: {words}")
        if rank == 0:
            print(f"{PREFIX}Megatron's own output is in {folder}/rank_*.log ({RAW} leaves it here)")
        try:
            yield
        except BaseException as error:
            _tell(error, path, file)
            raise


def _opened(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = io.BufferedWriter(_Raw(path, "a"))
        return io.TextIOWrapper(lines, encoding="utf-8", errors="backslashreplace", line_buffering=True)
    except OSError as error:
        raise UserError(
            f"{path}: expected a file that can be written, got {error.strerror}: give another {DIR}, or {RAW}"
        ) from None


class _Raw(io.FileIO):
    """A file that takes everything; what the disk does not take is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _tell(error: BaseException, path: Path, file: TextIO) -> None:
    """What ended a run, in the file; on the console, where the file is: the traceback follows there."""
    if isinstance(error, SystemExit) and not error.code:
        return
    traceback.print_exception(error, file=file)
    if not isinstance(error, UserError):
        where = f"{os.environ.get('RANK', '0')} on {socket.gethostname()}"
        print(f"{PREFIX}rank {where} ends by {type(error).__name__}; its whole output: {path}", file=sys.stderr)


class _Stream:
    """A text stream into ``file``, some of whose lines go to ``console`` too, in the form that ``form`` gives them."""

    def __init__(self, file: TextIO, console: TextIO, form: Callable[[str], str | None]) -> None:
        self.file, self.console, self.form = file, console, form
        self.begun = threading.local()  # each thread's own line: print ends it by a second write

    def write(self, text: str) -> int:
        _write(self.file, text)
        *lines, self.begun.line = (getattr(self.begun, "line", "") + text).split("\n")
        for line in lines:
            if (form := self.form(line)) is not None:
                _write(self.console, form + "\n")
        return len(text)

    def flush(self) -> None:
        for stream in (self.file, self.console):
            _write(stream, "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _nothing(line: str) -> str | None:
    return None


def _write(stream: TextIO, text: str) -> None:
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()


@contextlib.contextmanager
def _streams(file: TextIO) -> Iterator[tuple[TextIO, TextIO]]:
    """Descriptor 1 is the file; ``sys.stdout`` and ``sys.stderr`` tell the console; yields what they were."""
    out, err = sys.stdout, sys.stderr
    out.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace") as console:
        os.dup2(file.fileno(), 1)
        streams: Any = _Stream(file, console, shown), _Stream(file, err, str)
        sys.stdout, sys.stderr = streams
        try:
            yield out, err
        finally:
            _write(out, "")
            sys.stdout, sys.stderr = out, err
            for stream, plain in zip(streams, (out, err), strict=True):  # as may handlers that were made meanwhile
                stream.file, stream.console, stream.form = plain, plain, _nothing
            os.dup2(console.fileno(), 1)


@contextlib.contextmanager
def _loggers(file: TextIO, out: TextIO, err: TextIO) -> Iterator[None]:
    """Warnings become log records; loggers that wrote to the terminal write to the file, errors to both."""
    errors = logging.StreamHandler(err)
    errors.setLevel(logging.ERROR)
    errors.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    moved = list(_handlers_of({out, err, sys.__stdout__, sys.__stderr__}))
    owners = {logging.getLogger(), *(logger for logger, _, _ in moved if not logger.propagate)}
    for _, handler, _ in moved:
        handler.setStream(file)
    for logger in owners:
        logger.addHandler(errors)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger in owners:
            logger.removeHandler(errors)
        for _, handler, stream in moved:
            handler.setStream(stream)


def _handlers_of(streams: set[Any]) -> Iterator[tuple[logging.Logger, Any, TextIO]]:
    """Handlers that write to one of them, with their loggers and streams."""
    for logger in (logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                yield logger, handler, handler.stream
