"""Bad input is one line and exit code 2; an interruption at any moment leaves nothing that looks whole."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from data_support import ROOT, command, run_tool, sample_texts, tokenizer_folder, write_parquet

from megatron_act.data import sample_path

INVALID_UTF8 = pa.StringArray.from_buffers(
    2, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00\x04\x00\x00\x00"), pa.py_buffer(b"ok\xff\xfe")
)


def broken_middle(path: Path) -> None:
    """Intact footer, damaged pages."""
    data = bytearray(sample_path().read_bytes())
    data[100_000:300_000] = bytes(200_000)
    path.write_bytes(data)


def write_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def table(**columns: list | pa.Array) -> Callable[[Path], object]:
    return lambda path: write_parquet(path, **columns)


BAD_FILES: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "missing": (lambda path: None, [], "in.parquet (no such file"),
    "an empty folder": (Path.mkdir, [], "the folder holds no *.parquet"),
    "not parquet": (write_bytes(b"id,text\n1,hello\n"), [], "it is another kind of file"),
    "zero bytes": (write_bytes(b""), [], "the file is empty"),
    "truncated": (lambda path: path.write_bytes(sample_path().read_bytes()[:-5000]), [], "cut short or damaged"),
    "damaged pages": (broken_middle, [], "row group 0: expected intact rows"),
    "no text column": (table(content=["a"]), [], "expected a column 'text' of type string, got columns content"),
    "text of numbers": (table(text=[1, 2]), [], "expected column 'text' of type string, got int64"),
    "text of bytes": (table(text=[b"a"]), [], "expected column 'text' of type string, got binary"),
    "invalid UTF-8": (table(text=INVALID_UTF8), [], "expected intact rows of UTF-8 text"),
    "no rows": (table(text=pa.array([], pa.string())), [], "expected at least one row, got 0 rows"),
    "only null and empty": (table(text=[None, ""]), [], "got 0 (dropped: 1 empty_text, 1 null_text)"),
    "no score column": (table(text=["a"]), ["--min-score", "3"], "expected a column 'score' of type number"),
    "score of strings": (
        table(text=["a"], score=["b"]),
        ["--min-score", "3"],
        "expected column 'score' of type number, got string",
    ),
    "no id to split by": (table(text=["a"]), ["--split", "a:0.5", "b:0.5"], "expected a column 'id' of type string"),
    "a null id": (table(text=["a", "b"], id=["1", None]), ["--split", "a:1"], "expected an id in every row, got 1"),
    "an empty part": (
        table(text=["a"], id=["1"]),
        ["--split", "a:0.5", "b:0.5"],
        "expected documents in part",
    ),
    "a split that is none": (table(text=["a"]), ["--split", "a:0.5"], "expected shares that sum to 1"),
}


def assert_refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert result.returncode == 2


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_input_files(case: str, tmp_path: Path) -> None:
    make, flags, message = BAD_FILES[case]
    make(tmp_path / "in.parquet")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "new" / "out", *flags]
    assert_refused(run_tool("--input", tmp_path / "in.parquet", *arguments), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_seen_by_a_worker_is_the_same_error(tmp_path: Path) -> None:
    broken_middle(tmp_path / "in.parquet")
    arguments = ["--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out", "--workers", 2]
    assert_refused(run_tool("--input", tmp_path / "in.parquet", *arguments), "expected intact rows")
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


BAD_TOKENIZERS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "missing": (lambda path: None, [], "expected a tokenizer.json or a folder that holds one"),
    "an empty folder": (Path.mkdir, [], "expected a tokenizer.json or a folder that holds one"),
    "not JSON": (write_bytes(b"hello"), [], "expected a Hugging Face tokenizer.json"),
    "other JSON": (write_bytes(b"{}"), [], "expected a Hugging Face tokenizer.json"),
    "without EOD": (
        lambda path: path.write_bytes((tokenizer_folder("bpe") / "tokenizer.json").read_bytes()),
        ["--eod-token", "</s>"],
        "expected the end-of-document token '</s>' in the vocabulary",
    ),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_bad_tokenizers(case: str, tmp_path: Path) -> None:
    make, flags, message = BAD_TOKENIZERS[case]
    make(tmp_path / "tokenizer")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--tokenizer", tmp_path / "tokenizer", "--output-prefix", tmp_path / "out", *flags]
    assert_refused(run_tool("--input", sample_path(), *arguments), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_outputs(tmp_path: Path) -> None:
    """Under a file, a folder instead of a prefix, and an output that exists."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.idx").write_text("older work")
    cases = {"file/out": "expected a writable folder", "folder": "add a name", "old": "expected a new output"}
    for name, message in cases.items():
        arguments = ["--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / name]
        assert_refused(run_tool("--input", sample_path(), *arguments), message)
    assert (tmp_path / "old.idx").read_text() == "older work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "old.idx"]


def start_long_run(folder: Path) -> subprocess.Popen[str]:
    """A run with two workers, returned once it has begun to write tokens."""
    for copy in range(12):
        write_parquet(folder / f"{copy:02d}.parquet", row_group_size=50, text=sample_texts())
    arguments = ["--input", folder, "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", folder / "out"]
    process = subprocess.Popen(command(*arguments, "--workers", 2), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in folder.glob("out.partial-*/out.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def children(pid: int) -> list[int]:
    return [int(item) for item in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_kill_9_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    """No final name appears, the workers end with their parent, and the next run succeeds."""
    process = start_long_run(tmp_path)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    assert_gone(workers)
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".parquet"}
    assert len(names) == 1 and names.pop().startswith("out.partial-")
    write_parquet(tmp_path / "00.parquet", text=["again"])
    arguments = ["--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out"]
    assert run_tool("--input", tmp_path / "00.parquet", *arguments).returncode == 0
    assert {"out.bin", "out.idx", "out.manifest.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("notice", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_cleans_up(notice: signal.Signals, tmp_path: Path) -> None:
    process = start_long_run(tmp_path)
    workers = children(process.pid)
    process.send_signal(notice)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "error: interrupted\n")
    assert_gone(workers)
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet"}


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
