"""The folder `P.work` beside an output: what a run has done so far, kept through any crash, used by one run at a time.

    lock          held (flock) by the process that plans, joins and publishes
    plan.json     what is done (see `plan`)
    tasks/00007/  a finished task: per part 0.bin (tokens), 0.len (int32 lengths); result.json
    tasks/00007.x7k2/  a task under way, its `lock` held by its process; left behind when that was killed
    tasks/00007.error  why the task last failed, in one line
    publishing    the output's files are being moved to their final names: a resumed run may replace them

A task's folder gets its final name when every file in it is on disk. Two processes may do the same task: whoever is
second is discarded.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_act.data import plan as plans
from megatron_act.data.plan import Plan
from megatron_act.data.staging import sync
from megatron_act.errors import UserError

GRACE_SECONDS = 5
RETRIES = 100
_held: list[IO[bytes]] = []  # locks of this process: a forked child would hold them too, and outlive it


def _let_go() -> None:
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go)


class Work:
    """The folder of one output's run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tasks = folder / "tasks"

    @property
    def plan_file(self) -> Path:
        """Where the plan is."""
        return self.folder / "plan.json"

    def task(self, number: int) -> Path:
        """A finished task's folder."""
        return self.tasks / f"{number:05d}"

    def plan(self) -> Plan:
        """The plan that was written."""
        return plans.load(self.plan_file)

    def earlier_plan(self) -> Plan | None:
        """The plan that an unfinished run left, or None."""
        return self.plan() if self.plan_file.is_file() else None

    def result(self, number: int) -> dict | None:
        """What a finished task wrote, or None."""
        try:
            return json.loads((self.task(number) / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def done(self) -> list[int]:
        """Numbers of the finished tasks."""
        return sorted(int(item.name) for item in _entries(self.tasks) if re.fullmatch(r"\d+", item.name))

    def under_way(self) -> dict[Path, bool]:
        """Folders of unfinished tasks, and whether a living process holds each."""
        folders = [item for item in _entries(self.tasks) if re.fullmatch(r"\d+\.[^.]+", item.name) and item.is_dir()]
        return {folder: _is_held(folder / "lock") for folder in folders}

    def errors(self) -> dict[int, str]:
        """Why tasks failed, by number."""
        files = [item for item in _entries(self.tasks) if item.suffix == ".error"]
        return {int(file.stem): file.read_text(encoding="utf-8") for file in sorted(files)}

    @contextlib.contextmanager
    def begin(self, number: int) -> Iterator[tuple[Path, IO[bytes]]]:
        """A folder to do a task in, published when the block ends well, and a file to note progress in.

        Raises:
            UserError: the disk is full. This and whatever the block raises is noted in `errors()`.
        """
        note = self.tasks / f"{number:05d}.error"
        note.unlink(missing_ok=True)
        try:
            with room(self.folder), self._private(number) as (folder, lock):
                yield folder, lock
                self._publish(folder, number)
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            with contextlib.suppress(OSError):
                note.write_text(kind + str(error), encoding="utf-8")
            raise

    @contextlib.contextmanager
    def _private(self, number: int) -> Iterator[tuple[Path, IO[bytes]]]:
        """A folder that others see only with its lock held."""
        folder = Path(tempfile.mkdtemp(prefix="new-", dir=self.tasks))
        with (folder / "lock").open("wb", buffering=0) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                folder = folder.rename(self.tasks / f"{number:05d}.{folder.name.removeprefix('new-')}")
                yield folder, lock
            finally:
                shutil.rmtree(folder, ignore_errors=True)  # still held: a folder that nobody holds has lost its process

    def _publish(self, folder: Path, number: int) -> None:
        for file in folder.iterdir():
            sync(file)
        sync(folder)
        with contextlib.suppress(OSError):  # another process has done the same task: its files are equal
            folder.rename(self.task(number))
        sync(self.tasks)

    def forget(self, number: int | None = None) -> None:
        """Remove a finished task, or all."""
        for item in self.done() if number is None else [number]:
            shutil.rmtree(self.task(item))

    def write_plan(self, plan: Plan) -> None:
        """Put a plan in place of the one that is there, and forget why tasks failed."""
        aside = self.plan_file.with_suffix(".new")
        aside.write_text(plans.dump(plan), encoding="utf-8")
        os.replace(aside, self.plan_file)
        for number in self.errors():
            (self.tasks / f"{number:05d}.error").unlink()


def work_folder(prefix: Path) -> Path:
    """`P.work`."""
    return prefix.with_name(prefix.name + ".work")


@contextlib.contextmanager
def locked(prefix: Path) -> Iterator[Work]:
    """The work folder of an output, made if missing and held for the block; removed if that fails with no task done.

    Raises:
        UserError: the folder cannot be made or written, or another run uses it.
    """
    folder = work_folder(prefix)
    missing = [parent for parent in folder.parents if not parent.exists()]
    lock = _acquire(folder)
    _held.append(lock)
    work = Work(folder)
    try:
        _wait_until_idle(work)
        yield work
    except BaseException:
        if _is_ours(lock, folder) and not work.done() and not any(work.under_way().values()):
            _remove(folder, missing)
        raise
    finally:
        _held.remove(lock)
        lock.close()


def _remove(folder: Path, parents: list[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for parent in parents:
        with contextlib.suppress(OSError):
            parent.rmdir()


def _wait_until_idle(work: Work) -> None:
    """Give the workers of a run that was killed the moment they need to end, then remove what they left."""
    deadline = time.monotonic() + GRACE_SECONDS
    while any(work.under_way().values()):
        if time.monotonic() > deadline:
            raise UserError(
                f"expected {work.folder} to be free, got tasks under way in it; wait for them or end their processes"
            )
        time.sleep(0.1)
    for folder in work.under_way():
        shutil.rmtree(folder)


def _is_ours(lock: IO[bytes], folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat())
    return False


def _acquire(folder: Path) -> IO[bytes]:
    attempts = 0
    while True:
        try:
            (folder / "tasks").mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("ab")
        except OSError as error:
            attempts += 1
            removed = isinstance(error, (FileNotFoundError, FileExistsError)) and folder.parent.is_dir()
            if removed and attempts < RETRIES:
                continue  # by another run that ends just now
            reason = error.strerror
            raise UserError(
                f"expected a writable folder, got {folder.parent} ({reason}); choose another output"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(
                f"expected {folder} to be free, got one that another run is using; wait for it or name another output"
            ) from None
        if _is_ours(lock, folder):
            return lock
        lock.close()  # the run that held it has finished and removed the folder


def finish(work: Work) -> None:
    """Remove the folder: at once out of sight, so that what a crash leaves of it is not taken for a run's work."""
    work.folder.rename(work.folder.with_name(f"{work.folder.name}-done-{os.getpid()}"))
    remove_finished(work.folder)


def remove_finished(folder: Path) -> None:
    """Remove what `finish` was killed at, of any run with this work folder."""
    for item in _entries(folder.parent):
        if re.fullmatch(re.escape(folder.name) + r"-done-\d+", item.name):
            shutil.rmtree(item, ignore_errors=True)


@contextlib.contextmanager
def room(folder: Path) -> Iterator[None]:
    """A full disk, quota or file-size limit as one line.

    Raises:
        UserError: in its place.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"expected room for the output in {folder.parent}, got '{error.strerror}'; free some, then use --resume"
        ) from error


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_held(lock: Path) -> bool:
    try:
        with lock.open("rb+") as file:  # NFS locks exclusively only what may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False  # finished at this moment
