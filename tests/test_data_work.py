"""The work folder and what is left beside an output: by crashes, by runs that end, by outputs that are replaced."""

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_support import outputs, six_files, tokenizer_folder

from megatron_act.data.preprocess import make_plan, run
from megatron_act.data.work import locked
from megatron_act.errors import UserError

SUFFIXES = (".bin", ".idx", ".manifest.json")


def test_what_a_finished_run_was_killed_at_goes_with_the_next(tmp_path: Path) -> None:
    files, done_before = six_files(tmp_path), tmp_path / "out.work-done-99999"
    for resume in (False, True):
        (done_before / "tasks").mkdir(parents=True)
        run(make_plan(files, tokenizer_folder("bpe"), tmp_path / "out", resume=resume), resume=resume)
        assert outputs(tmp_path) == {f"out{suffix}" for suffix in SUFFIXES}


def test_another_run_that_ends_just_now_is_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It removes the folder between this one's making and opening it."""
    opened: list[Path] = []

    def removed_at_first(path: Path, *arguments: Any, real: Any = Path.open, **options: Any) -> Any:
        if path.name == "lock" and not opened:
            opened.append(path)
            shutil.rmtree(path.parent)
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", removed_at_first)
    with locked(tmp_path / "out") as work:
        assert opened == [work.folder / "lock"] and opened[0].exists()


def test_resume_of_what_has_lost_a_file_is_no_success(tmp_path: Path) -> None:
    files = six_files(tmp_path)
    run(make_plan(files, tokenizer_folder("bpe"), tmp_path / "out"))
    os.truncate(tmp_path / "out.bin", 100)
    for damage in ("short", "gone"):
        if damage == "gone":
            (tmp_path / "out.bin").unlink()
        with pytest.raises(UserError, match="expected a new output, got existing"):
            run(make_plan(files, tokenizer_folder("bpe"), tmp_path / "out", resume=True), resume=True)


def test_a_replaced_output_leaves_no_file_of_its_own(tmp_path: Path) -> None:
    """Five shards, then three, then one pair: what a glob finds is the last."""
    files = six_files(tmp_path)
    for shards in (5, 3, None):
        run(make_plan(files, tokenizer_folder("bpe"), tmp_path / "out", shards=shards, overwrite=True))
        stems = [f"out_{i:05d}" for i in range(shards)] if shards else ["out"]
        wanted = {f"{stem}.{kind}" for stem in stems for kind in ("bin", "idx")} | {"out.manifest.json"}
        assert outputs(tmp_path) == wanted


def test_a_lock_is_looked_at_with_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS refuses an exclusive lock on a file that is open for reading only."""
    real = fcntl.flock

    def as_on_nfs(file: Any, operation: int) -> None:
        if operation & fcntl.LOCK_EX and not file.writable():
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    with locked(tmp_path / "out") as work, work.begin(0):
        assert list(work.under_way().values()) == [True]


def test_a_file_in_the_place_of_tasks_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "tasks").touch()
    with pytest.raises(UserError, match="expected a writable folder"), locked(tmp_path / "out"):
        pass
