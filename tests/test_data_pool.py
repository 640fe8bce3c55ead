"""A process killed at any moment ends the run at once, in one way; nothing waits for it."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_support import tokenizer_folder, write_parquet

from megatron_act.data import engine
from megatron_act.data.pool import WorkerKilled, each
from megatron_act.data.preprocess import make_plan, run

WORDS = ["one two three"] * 100


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


def leave_a_file(path: Path) -> None:
    path.write_text(f"{os.getpid()} {os.getppid()}")


def kill_idle_worker(folder: Path) -> None:
    """The first to come is idle soon, waiting for the next job; the second kills it, and has work left to do."""
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        while not (folder / "idle.pid").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(int((folder / "idle.pid").read_text()), signal.SIGKILL)
        time.sleep(3600)
    else:
        aside = folder / "idle"
        aside.write_text(str(os.getpid()))
        aside.rename(folder / "idle.pid")


def fail_or_sleep(number: int) -> None:
    if number == 0:
        raise ValueError("of job 0")
    time.sleep(3600)


class KilledBeforeItReports(engine.EncodeStep):
    """The task is done and on disk; whoever gave it out has not heard of it."""

    def run(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        super().run(data, rank, world_size)
        os.kill(os.getpid(), signal.SIGKILL)


def test_each_item_once_in_other_processes(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(20)]
    each(leave_a_file, files, workers=3)
    processes = {tuple(map(int, file.read_text().split())) for file in files}
    assert 1 <= len(processes) <= 3 and os.getpid() not in {pid for pid, _ in processes}


def test_killed_between_a_task_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task is done, yet the last is not reported: the run ends, and goes on to the same output."""
    source = write_parquet(tmp_path / "in.parquet", text=WORDS)
    monkeypatch.setattr(engine, "EncodeStep", KilledBeforeItReports)
    plan = make_plan([source], tokenizer_folder("bpe"), tmp_path / "out", tasks=2)
    with pytest.raises(WorkerKilled, match="go on with --resume"):
        run(plan, engine.Executor(workers=2))
    monkeypatch.undo()
    manifest = run(
        make_plan([source], tokenizer_folder("bpe"), tmp_path / "out", resume=True),
        engine.Executor(workers=2),
        resume=True,
    )
    assert manifest["outputs"][0]["documents"] == len(WORDS)


def test_killed_while_idle(tmp_path: Path) -> None:
    """It holds the lock of the queue of jobs then."""
    with pytest.raises(WorkerKilled):
        each(kill_idle_worker, [tmp_path, tmp_path], workers=2)


def test_the_first_error_ends_the_others() -> None:
    with pytest.raises(ValueError, match="of job 0"):
        each(fail_or_sleep, range(6), workers=2)
