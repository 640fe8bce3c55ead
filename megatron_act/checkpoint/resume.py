"""What an interrupted conversion may keep: a record of finished files, and a folder that appears whole or never."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import megatron_act
from megatron_act.errors import UserError

RECORD, LOCK = ".finished.json", ".lock"
READ_BYTES = 1 << 24


def identity_of(files: Iterable[Path], *more: bytes) -> str:
    """Changes when a file does: a hash of names, sizes and times, and of ``more`` bytes."""
    digest = hashlib.sha256()
    for part in more:
        digest.update(hashlib.sha256(part).digest())
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


class Finished:
    """The finished files of an unfinished folder, by name: ``{"bytes", "sha256"}`` and what its writer adds.

    A file is recorded after its bytes reached the disk; until then it carries another name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict] = _read_record(folder).get("files", {})

    def keeps(self, name: str) -> bool:
        """Whether the file is recorded and still has the recorded size and sha256."""
        recorded, path = self.files.get(name), self.folder / name
        if recorded is None or not path.is_file() or path.stat().st_size != recorded["bytes"]:
            return False
        return _sha256(path) == recorded["sha256"]

    def add(self, name: str, sha256: str, **more: Any) -> None:
        """Records a file that is on the disk under its name."""
        self.files[name] = {"bytes": (self.folder / name).stat().st_size, "sha256": sha256, **more}
        write_record(self.folder, _read_record(self.folder) | {"files": self.files})


def _read_record(folder: Path) -> dict:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_record(folder: Path, content: dict) -> None:
    """Replaces the record in one step."""
    new = folder / f"{RECORD}.new"
    new.write_text(json.dumps(content, indent=1), encoding="utf-8")
    fsync(new)
    new.replace(folder / RECORD)
    fsync(folder)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unfinished(output: Path) -> Path:
    """Where an output is kept until it is whole: beside it, hidden."""
    return output.parent / f".{output.name}.partial"


def _replaced(output: Path) -> Path:
    return output.parent / f".{output.name}.replaced"


@contextlib.contextmanager
def whole_folder(output: Path, identity: str = "") -> Iterator[Path]:
    """A folder beside ``output`` that takes its name, replacing what is there, when the block ends without exception.

    After an exception it stays if the conversion has an identity and a file of it is finished; the next one of the same
    identity then starts from there.

    Args:
        output: the folder to make; what it holds is replaced.
        identity: of the input and of every option that changes values; empty: never keep anything.

    Raises:
        UserError: the place cannot be written, or another process is writing it.
    """
    partial, old = unfinished(output), _replaced(output)
    if old.exists() and not output.exists():  # a machine that stopped between the two renames of _publish
        old.rename(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / LOCK).open("w")
    except OSError as error:
        raise UserError(f"{output}: expected a place to write to, got {error.strerror}") from None
    with lock:
        _take(lock, output)
        _start(partial, identity)
        try:
            yield partial
            _publish(partial, output)
        except BaseException:
            if not (identity and _read_record(partial).get("files")):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _take(lock: IO[str], output: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{output}: expected to be its only writer, got a conversion that runs: wait for it") from None


def _start(partial: Path, identity: str) -> None:
    """Leaves only finished files in the folder, and none unless the same version made them from the same input."""
    wanted, record = f"{megatron_act.__version__} {identity}", _read_record(partial)
    files = record.get("files", {}) if identity and record.get("identity") == wanted else {}
    kept = {LOCK, *files}
    for path in sorted(partial.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        elif str(path.relative_to(partial)) not in kept:
            path.unlink()
    write_record(partial, {"identity": wanted, "files": files})


def _publish(partial: Path, output: Path) -> None:
    for path in partial.rglob("*"):
        fsync(path)
    for name in (RECORD, LOCK):  # late: without the record all would be done again
        (partial / name).unlink()
    fsync(partial)
    old = _replaced(output)
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    fsync(output.parent)
    shutil.rmtree(old, ignore_errors=True)
