"""Bad input, however it is bad, is one line and exit code 2; large input takes bounded memory; a full disk is said."""

import errno
import json
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_support import (
    ROOT,
    call_tool,
    command,
    read_documents,
    reference_ids,
    reference_tokenizer,
    run_tool,
    same_files,
    sample_texts,
    tokenizer_folder,
    write_parquet,
)
from tokenizers import Tokenizer, models

from megatron_act.data import parquet, sample_path, task
from megatron_act.data.columns import BATCH_ROWS
from megatron_act.data.preprocess import preprocess
from megatron_act.data.tokenizer import load_encoder, open_tokenizer

INVALID_UTF8 = pa.StringArray.from_buffers(
    2, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00\x04\x00\x00\x00"), pa.py_buffer(b"ok\xff\xfe")
)
LONE_SURROGATE = pa.StringArray.from_buffers(
    1, pa.py_buffer(b"\x00\x00\x00\x00\x05\x00\x00\x00"), pa.py_buffer(b"a\xed\xa0\x80b")
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
    "a lone surrogate": (table(text=LONE_SURROGATE), [], "expected intact rows of UTF-8 text"),
    "no dump column": (table(text=["a"]), ["--dump", "CC-MAIN-2024-10"], "expected a column 'dump' of type string"),
    "no such dump": (
        table(text=["a"], dump=["CC-MAIN-2024-1"]),
        ["--dump", "CC-MAIN-2024-10"],
        "got 0 (dropped: 1 dump)",
    ),
    "an empty shard": (table(text=["a", "b"]), ["--shards", "3"], "expected documents in part 'all', shard 0, got 0"),
    "no rows": (table(text=pa.array([], pa.string())), [], "expected at least one row, got 0 rows"),
    "only null and empty": (table(text=[None, ""]), [], "got 0 (dropped: 1 empty_text, 1 null_text)"),
    "no score column": (table(text=["a"]), ["--min-score", "3"], "expected a column 'score' of type number"),
    "score of strings": (
        table(text=["a"], score=["b"]),
        ["--min-score", "3"],
        "expected column 'score' of type number, got string",
    ),
    "two text columns": (
        lambda path: pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path),
        [],
        "expected one column 'text', got 2 of that name",
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
    assert_refused(call_tool("--input", tmp_path / "in.parquet", *arguments), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_seen_by_a_worker_is_the_same_error(tmp_path: Path) -> None:
    """In a process of its own, with two workers; whatever the other worker has done is kept, and said."""
    broken_middle(tmp_path / "in.parquet")
    arguments = ["--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out", "--workers", 2]
    result = run_tool("--input", tmp_path / "in.parquet", *arguments)
    assert_refused(result, "expected intact rows")
    kept = {path.name for path in tmp_path.iterdir()} - {"in.parquet"}
    assert kept <= {"out.work"} and ("--resume goes on" in result.stderr) == bool(kept)


def test_a_document_is_never_cut_or_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches end by rows or by bytes: documents around both limits come out as they went in."""
    limit = 50_000
    monkeypatch.setattr(task, "BATCH_BYTES", limit)
    monkeypatch.setattr(parquet, "BATCH_BYTES", limit)
    long = " ".join(sample_texts())
    texts = [*["a b"] * (BATCH_ROWS - 1), long[:limit], "c", long[: limit - 1], "d", "e", long[: limit + 1], "f"]
    write_parquet(tmp_path / "in.parquet", row_group_size=5000, text=texts)
    preprocess([tmp_path / "in.parquet"], tokenizer_folder("bpe"), tmp_path / "out")
    assert read_documents(tmp_path / "out") == [[*ids, 0] for ids in reference_ids("bpe", texts)]


PEAK = """
import atexit, runpy, sys
atexit.register(lambda: print(*[line for line in open("/proc/self/status") if "VmHWM" in line], file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def peak_memory(source: Path, out: Path) -> int:
    """Largest resident set of a run on one source, in MB."""
    line = command("--input", source, "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", out)
    line[1:1] = ["-c", PEAK]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return int(result.stderr.split()[1]) >> 10


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """One row group of 3 MB and one of 200 MB."""
    for name, copies in (("small", 1), ("large", 60)):
        text = pa.chunked_array([pa.array(sample_texts())] * copies)
        pq.write_table(pa.table({"text": text}), tmp_path / f"{name}.parquet", row_group_size=10**9, compression="zstd")
    small, large = (peak_memory(tmp_path / f"{name}.parquet", tmp_path / name) for name in ("small", "large"))
    assert large - small < 60 and large < 400


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_document_of_100_mb(suffix: str, tmp_path: Path) -> None:
    """Goes through in little more than reading it takes, and its tokens decode to it; whole it would take 1.2 GB."""
    text = " ".join(sample_texts() * 30)
    assert len(text.encode()) > 100_000_000
    texts, source, out = ["before", text, "after"], tmp_path / f"in.{suffix}", tmp_path / "out"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), source, compression="zstd")
    else:
        source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    assert peak_memory(source, out) < 800
    tokens = np.fromfile(f"{out}.bin", "<u2")
    ends = np.flatnonzero(tokens == 0)
    assert len(ends) == 3 and ends[-1] == len(tokens) - 1
    ids, decode = tokens[ends[0] + 1 : ends[1]], reference_tokenizer("bpe").decode
    assert text.startswith(decode(ids[:300_000].tolist()).rstrip("\ufffd"))
    assert text.endswith(decode(ids[-300_000:].tolist()).lstrip("\ufffd"))
    encoder = load_encoder(open_tokenizer(tokenizer_folder("bpe")))
    once, twice = (len(encoder.encode([" ".join(sample_texts() * n)])[0]) for n in (1, 2))
    assert len(ids) == once + 29 * (twice - once)


@pytest.mark.parametrize(("limit_kb", "kept"), [(200, 0), (700, 4)])
def test_a_full_disk(limit_kb: int, kept: int, tmp_path: Path) -> None:
    """Files may not grow past a limit: in a task, or only in joining four. Nothing whole appears; --resume goes on."""
    arguments = ["--input", sample_path(), "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out"]
    limit = limit_kb << 10
    full = run_tool(
        *arguments, "--tasks", 4, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert_refused(full, f"expected room for the output in {tmp_path}, got 'File too large'")
    assert [path.name for path in tmp_path.iterdir()] == (["out.work"] if kept else [])
    assert f"({kept} of 4 tasks are kept" in full.stderr or not kept
    assert call_tool(*arguments, "--resume").returncode == 0
    preprocess([sample_path()], tokenizer_folder("bpe"), tmp_path / "whole")
    assert same_files(tmp_path / "out", tmp_path / "whole")
    assert not list(tmp_path.glob("*.work*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(task.PartWriter, "append", full)
    result = call_tool(
        "--input", sample_path(), "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out"
    )
    assert_refused(result, f"expected room for the output in {tmp_path}, got '{os.strerror(number)}'; free some")
    assert not list(tmp_path.iterdir())


BAD_TOKENIZERS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "missing": (lambda path: None, [], "expected a tokenizer.json or a folder that holds one"),
    "an empty folder": (Path.mkdir, [], "expected a tokenizer.json or a folder that holds one"),
    "neither JSON nor a model": (write_bytes(b"hello"), [], "expected a tokenizer.json, tekken.json, SentencePiece"),
    "other JSON": (write_bytes(b"{}"), [], "expected a Hugging Face tokenizer.json"),
    "an empty vocabulary": (
        lambda path: Tokenizer(models.BPE()).save(str(path)),
        [],
        "expected the end-of-document token '<|endoftext|>' in the vocabulary of",
    ),
    "EOD in texts": (
        lambda path: path.write_bytes((tokenizer_folder("bpe") / "tokenizer.json").read_bytes()),
        ["--eod-token", "!"],
        "expected special tokens' literals in a text to stay text, got the end of document '!' (id 1)",
    ),
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
    assert_refused(call_tool("--input", sample_path(), *arguments), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_outputs(tmp_path: Path) -> None:
    """Under a file, a folder instead of a prefix, and an output that exists."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.idx").write_text("older work")
    cases = {"file/out": "expected a writable folder", "folder": "add a name", "old": "expected a new output"}
    for name, message in cases.items():
        arguments = ["--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / name]
        assert_refused(call_tool("--input", sample_path(), *arguments), message)
    assert (tmp_path / "old.idx").read_text() == "older work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "old.idx"]
