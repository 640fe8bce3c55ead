"""A run that is ended by anything goes on with --resume, doing only what is undone; nothing partial looks whole."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_support import (
    ROOT,
    call_tool,
    command,
    outputs,
    run_tool,
    same_files,
    sample_texts,
    six_files,
    tokenizer_folder,
    write_parquet,
)

from megatron_act.data import engine, sample_path, task
from megatron_act.data.filters import Filters
from megatron_act.data.preprocess import make_plan, preprocess, run
from megatron_act.data.work import locked
from megatron_act.errors import UserError

SUFFIXES = (".bin", ".idx", ".manifest.json")


def start_long_run(folder: Path, *flags: object, **options: Any) -> subprocess.Popen[str]:
    """A run with two workers and 24 tasks on 12 files: some are done, from the 12th on they wait (see `hold`)."""
    for copy in range(12):
        write_parquet(folder / f"{copy:02d}.parquet", row_group_size=50, text=sample_texts())
    hold(folder).write_text("12")
    process = start(folder, *flags, **options)
    wait_for(process, lambda: len(done(folder)) >= 2 and len(workers(process)) == 2)
    return process


def hold(folder: Path) -> Path:
    """The file that says which task is the first to wait."""
    return folder.with_name(folder.name + ".hold")


def start(folder: Path, *flags: object, **options: Any) -> subprocess.Popen[str]:
    arguments = ["--input", folder, "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", folder / "out"]
    line = command(*arguments, "--workers", 2, "--tasks", 24, *flags)
    line[1] = str(ROOT / "tests" / "held_tasks.py")
    options["env"] = {**os.environ, "HOLD": str(hold(folder))}
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def done(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("out.work/tasks/[0-9][0-9][0-9][0-9][0-9]/result.json"))


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = [int(item) for item in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def workers(process: subprocess.Popen[str]) -> list[int]:
    """What the fork server has started."""
    return [pid for pid in descendants(process.pid) if parent_of(pid) != process.pid]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 300
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_whole(folder: Path) -> None:
    """The output is what an undisturbed run makes, and nothing else is there."""
    assert outputs(folder) == {f"out{suffix}" for suffix in SUFFIXES}
    preprocess(sorted(folder.glob("*.parquet")), tokenizer_folder("bpe"), folder / "whole")
    assert same_files(folder / "out", folder / "whole")


def test_kill_9_then_resume(tmp_path: Path) -> None:
    """No final name appears, every process ends, a plain run is refused, --resume finishes; unfinished tasks only."""
    process = start_long_run(tmp_path)
    others = descendants(process.pid)
    assert len(others) >= 3  # two workers and what starts them
    process.kill()
    process.communicate()
    assert_gone(others)
    assert outputs(tmp_path) == {"out.work"}
    kept = {name: (tmp_path / "out.work/tasks" / name / "result.json").stat().st_mtime_ns for name in done(tmp_path)}
    assert 2 <= len(kept) < 24
    plain = start(tmp_path)
    assert f"expected no unfinished run, got {len(kept)} finished tasks" in plain.communicate()[1]
    assert plain.returncode == 2
    hold(tmp_path).write_text("18")
    resumed = start(tmp_path, "--resume")
    wait_for(resumed, lambda: len(done(tmp_path)) > len(kept))
    for name, changed in kept.items():
        assert (tmp_path / "out.work/tasks" / name / "result.json").stat().st_mtime_ns == changed
    hold(tmp_path).unlink()
    assert (resumed.communicate()[1], resumed.returncode) == ("", 0)
    assert_whole(tmp_path)


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """The whole run, at 5 moments from its start to its end; the 6th is left alone."""
    rng = random.Random(3)
    process = start_long_run(tmp_path)
    hold(tmp_path).unlink()
    for _ in range(5):
        time.sleep(rng.random() ** 2)
        process.kill()
        process.communicate()
        work = tmp_path / "out.work"
        published = (tmp_path / "out.manifest.json").exists()
        assert not published or not work.exists() or (work / "publishing").exists()
        process = start(tmp_path, "--resume")  # of a finished run does nothing, well
    assert (process.communicate()[1], process.returncode) == ("", 0)
    assert_whole(tmp_path)


def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    """As the kernel does when memory is short: one line, exit code 1, no process left, and --resume goes on.

    Ctrl-C's signal is ignored, as a shell has it for what it starts in the background.
    """
    process = start_long_run(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    others = descendants(process.pid)
    os.kill(workers(process)[0], signal.SIGKILL)
    errors = process.communicate(timeout=300)[1]
    assert errors.splitlines()[-1].startswith("error: unexpected WorkerKilled: a worker process was killed, most often")
    assert process.returncode == 1
    assert_gone(others)
    assert outputs(tmp_path) == {"out.work"}
    hold(tmp_path).unlink()
    resumed = start(tmp_path, "--resume")
    assert (resumed.communicate()[1], resumed.returncode) == ("", 0)
    assert_whole(tmp_path)


@pytest.mark.parametrize("notice", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(notice: signal.Signals, tmp_path: Path) -> None:
    """What is done is kept, and said; the rest is gone."""
    process = start_long_run(tmp_path)
    others = descendants(process.pid)
    process.send_signal(notice)
    errors = process.communicate(timeout=300)[1].splitlines()
    kept = len(done(tmp_path))
    assert errors == [
        f"WARNING: {kept} of 24 tasks are kept in {tmp_path}/out.work: --resume goes on",
        "error: interrupted",
    ]
    assert process.returncode == 1 and kept >= 2
    assert_gone(others)
    assert outputs(tmp_path) == {"out.work"}


def test_resume_after_a_repaired_file_does_the_rest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One damaged file of six: what came before is kept, its task and those after are done."""
    files = six_files(tmp_path)
    whole = files[3].read_bytes()
    damaged = bytearray(whole)
    damaged[10:200] = bytes(190)
    files[3].write_bytes(damaged)
    arguments = ["--input", tmp_path / "*.parquet", "--tokenizer", tokenizer_folder("bpe"), "--tasks", 6]
    arguments += ["--output-prefix", tmp_path / "out"]
    result = call_tool(*arguments)
    assert "expected intact rows" in result.stderr and "(3 of 6 tasks are kept in" in result.stderr
    assert (result.returncode, outputs(tmp_path)) == (2, {"out.work"})
    files[3].write_bytes(whole)
    numbers = []
    monkeypatch.setattr(task, "load_encoder", lambda info, real=task.load_encoder: numbers.append(1) or real(info))
    assert call_tool(*arguments, "--resume", "--tokenizer", tokenizer_folder("bpe")).returncode == 0
    assert len(numbers) == 3
    assert_whole(tmp_path)


def test_a_touched_file_is_done_again_and_a_changed_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = six_files(tmp_path)
    monkeypatch.setattr(engine, "run_task", fails_from(4))
    with pytest.raises(UserError, match="4 of 6 tasks are kept"):
        run(make_plan(files, tokenizer_folder("bpe"), tmp_path / "out", tasks=6))
    monkeypatch.undo()
    content = files[1].read_bytes()
    write_parquet(files[1], text=["other", "words"] * 100)
    with pytest.raises(UserError, match="got other tasks"):
        run(make_plan(files, tokenizer_folder("bpe"), tmp_path / "out", resume=True), resume=True)
    files[1].write_bytes(content)
    monkeypatch.setattr(engine, "run_task", fails_from(0))
    with pytest.raises(UserError, match=r"go on \(3 of 6 tasks are kept"):
        run(make_plan(files, tokenizer_folder("bpe"), tmp_path / "out", resume=True), resume=True)
    monkeypatch.undo()
    run(make_plan(files, tokenizer_folder("bpe"), tmp_path / "out", resume=True), resume=True)
    assert_whole(tmp_path)


def fails_from(number: int):  # type: ignore[no-untyped-def]
    def run_task(work, plan, rank):  # type: ignore[no-untyped-def]
        if rank >= number:
            raise UserError("expected nothing, got a failure; go on")
        return task.run_task(work, plan, rank)

    return run_task


@pytest.mark.parametrize(
    ("change", "what"),
    [({"filters": Filters(min_chars=1)}, "job"), ({"tasks": 5}, "tasks"), ({"inputs": slice(1, None)}, "tasks")],
)
def test_resume_refuses_another_run(change: dict, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = six_files(tmp_path)
    monkeypatch.setattr(engine, "run_task", fails_from(4))
    with pytest.raises(UserError):
        run(make_plan(files, tokenizer_folder("bpe"), tmp_path / "out", tasks=6))
    monkeypatch.undo()
    inputs = files[change.pop("inputs", slice(None))]
    with pytest.raises(UserError, match=f"to be this one, got other {what}"):
        run(make_plan(inputs, tokenizer_folder("bpe"), tmp_path / "out", resume=True, **change), resume=True)
    assert len(list((tmp_path / "out.work/tasks").glob("*/result.json"))) == 4
    run(make_plan(files, tokenizer_folder("bpe"), tmp_path / "out", overwrite=True))
    assert_whole(tmp_path)


def test_resume_of_what_is_finished_changes_nothing(tmp_path: Path) -> None:
    """The same command once more is content; another one still meets an output that exists."""
    files = six_files(tmp_path)
    arguments = ["--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out"]
    first = call_tool("--input", *files, *arguments)
    stamps = [Path(f"{tmp_path}/out{suffix}").stat().st_mtime_ns for suffix in SUFFIXES]
    again = call_tool("--input", *files, *arguments, "--resume")
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, first.stdout.splitlines()[0])
    assert stamps == [Path(f"{tmp_path}/out{suffix}").stat().st_mtime_ns for suffix in SUFFIXES]
    other = call_tool("--input", *files[1:], *arguments, "--resume")
    assert other.returncode == 2 and "expected a new output" in other.stderr
    assert outputs(tmp_path) == {f"out{suffix}" for suffix in SUFFIXES}


def test_two_runs_into_one_output(tmp_path: Path) -> None:
    """The second is refused while the first lives, whatever its flags, and harms nothing."""
    arguments = ["--input", sample_path(), "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out"]
    with locked(tmp_path / "out"):
        for flags in ([], ["--resume"], ["--overwrite"]):
            result = run_tool(*arguments, *flags)
            assert result.returncode == 2 and "got one that another run is using" in result.stderr
    runs = [
        subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    errors = [process.communicate()[1] for process in runs]
    codes = sorted(process.returncode for process in runs)
    assert codes == [0, 2, 2]
    allowed = ("another run is using", "expected a new output")
    assert all(not error or any(text in error for text in allowed) for error in errors)
    preprocess([sample_path()], tokenizer_folder("bpe"), tmp_path / "whole")
    assert same_files(tmp_path / "out", tmp_path / "whole") and not list(tmp_path.glob("*.work*"))


CRASH = """
import os, sys
from pathlib import Path
from megatron_act.data import staging
folder, step = Path(sys.argv[1]), int(sys.argv[2])
calls = [0]
def dies_at(real):
    def call(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == step:
            os._exit(9)
        return real(*arguments, **keywords)
    return call
os.replace, Path.unlink = dies_at(os.replace), dies_at(Path.unlink)
names = ["out.bin", "out.idx", "out.manifest.json"]
staging.publish([folder / "new" / name for name in names], [folder / name for name in names])
"""


@pytest.mark.parametrize("step", range(1, 8))
def test_death_while_publishing_never_mixes_two_outputs(step: int, tmp_path: Path) -> None:
    """It dies before each of its 6 moves (the 7th run completes): .bin beside .idx means both old or both new."""
    names = ["out.bin", "out.idx", "out.manifest.json"]
    (tmp_path / "new").mkdir()
    for name in names:
        (tmp_path / name).write_text("old")
        (tmp_path / "new" / name).write_text("new")
    result = subprocess.run([sys.executable, "-c", CRASH, tmp_path, str(step)], cwd=ROOT, env={**os.environ})
    assert result.returncode == (9 if step < 7 else 0)
    state = {name: (tmp_path / name).read_text() for name in names if (tmp_path / name).exists()}
    whole = {"out.bin", "out.idx"} <= state.keys()
    assert not whole or len(set(state.values())) == 1
    assert "out.manifest.json" not in state or whole
    assert whole == (step in (1, 2, 6, 7))


DIE_IN_RUN = """
import os, runpy, sys
from megatron_act.data import join, staging, work
module, name = sys.argv[1].split(".")
real, count = getattr(globals()[module], name), [int(sys.argv[2])]
def dies(*arguments, **keywords):
    count[0] -= 1
    if not count[0]:
        os.kill(os.getpid(), 9)
    return real(*arguments, **keywords)
setattr(globals()[module], name, dies)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("moment", ["work.sync 2", "join.write_manifest 1", "staging.sync 5", "join.finish 1"])
def test_death_at_every_stage_of_the_end_is_resumed(moment: str, tmp_path: Path) -> None:
    """While a task is published, while joining, between renames of the output, and when only the sweep is left."""
    where, count = moment.split()
    arguments = ["--input", sample_path(), "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out"]
    line = command(*arguments, "--tasks", 2)
    line[1:1] = ["-c", DIE_IN_RUN, where, count]
    assert subprocess.run(line, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert (tmp_path / "out.work").is_dir()
    result = call_tool(*arguments, "--resume", "--tasks", 2)
    assert (result.returncode, result.stderr) == (0, "")
    preprocess([sample_path()], tokenizer_folder("bpe"), tmp_path / "whole")
    assert same_files(tmp_path / "out", tmp_path / "whole") and not list(tmp_path.glob("*.work*"))
