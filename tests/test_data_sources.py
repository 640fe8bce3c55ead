"""Where documents come from: the same rows in any format and place give the same files; every fault is one line."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from data_hub import COMMIT, DATASET, Hub, serve
from data_support import ROOT, call_tool, command, same_files, sample_texts, tokenizer_folder, write_parquet

from megatron_act.data import hub as hub_module
from megatron_act.data.filters import Filters
from megatron_act.data.hub import config_url
from megatron_act.data.preprocess import preprocess
from megatron_act.data.source import iter_texts
from megatron_act.errors import UserError

ROWS = [
    {"text": text, "id": str(i), "score": i % 5, "dump": "CC-MAIN-2024-10"}
    for i, text in enumerate(sample_texts()[:300])
]
ROWS[7] = {"text": None, "id": "7", "score": 4, "dump": "CC-MAIN-2024-10"}
ROWS[8] = {"text": '\u00e9 \U0001f468 \u2028 "quoted" \\ \x00 \t', "id": "8", "score": 4, "dump": "other"}


def lines(rows: list[dict], **options: bool) -> bytes:
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()  # type: ignore[arg-type]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


FORMS: dict[str, Callable[[list[dict]], bytes]] = {
    "jsonl": lines,
    "jsonl.gz": lambda rows: gzip.compress(lines(rows[:100])) + gzip.compress(lines(rows[100:], ensure_ascii=False)),
    "jsonl.zst": lambda rows: zstd(lines(rows[:50], ensure_ascii=False)) + zstd(b"\n \n" + lines(rows[50:])[:-1]),
    "ndjson": lambda rows: lines(rows).replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_json_lines_give_the_files_of_parquet(form: str, tmp_path: Path) -> None:
    """Escaped or not, several compressed members, blank lines, no last line end; filters see the same numbers."""
    (tmp_path / f"in.{form}").write_bytes(FORMS[form](ROWS))
    write_parquet(tmp_path / "in.parquet", **{key: [row[key] for row in ROWS] for key in ROWS[0]})
    filters = Filters(min_score=1, dumps=("CC-MAIN-2024-10",))
    made = [
        preprocess([tmp_path / f"in.{suffix}"], tokenizer_folder("bpe"), tmp_path / suffix, filters=filters)
        for suffix in ("parquet", form)
    ]
    assert same_files(tmp_path / "parquet", tmp_path / form)
    assert made[0]["documents"] == made[1]["documents"]
    assert made[0]["documents"]["dropped"] == {"dump": 1, "min_score": 60, "null_text": 1}
    assert made[1]["sources"][0]["rows"] == 300


def test_a_column_of_any_name(tmp_path: Path) -> None:
    """Of other letters than ASCII, its texts too, in lines that have no escape."""
    rows = [{"t\u00e9xt": "caf\u00e9"}, {"t\u00e9xt": "\U0001f600"}]
    (tmp_path / "in.jsonl").write_bytes(lines(rows, ensure_ascii=False))
    assert list(iter_texts([tmp_path / "in.jsonl"], "t\u00e9xt")) == ["caf\u00e9", "\U0001f600"]


def test_a_folder_of_all_formats_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "b" / "1.jsonl.zst").write_bytes(zstd(lines([{"text": "second"}])))
    write_parquet(tmp_path / "in" / "c.parquet", text=["third", "fourth"])
    (tmp_path / "in" / "a.jsonl").write_bytes(lines([{"text": "first"}]))
    (tmp_path / "in" / "notes.txt").write_text("not a source")
    assert list(iter_texts([tmp_path / "in"])) == ["first", "second", "third", "fourth"]
    assert list(iter_texts([tmp_path / "in" / "c.parquet", tmp_path / "in"])) == ["third", "fourth", "first", "second"]


GOOD = lines(ROWS[:5])
BAD_LINES: dict[str, tuple[str, bytes, list[str], str]] = {
    "a cut line": ("jsonl", GOOD[:-60], [], "in.jsonl, line 5: expected a JSON object, got Unterminated string"),
    "a cut gzip": ("jsonl.gz", gzip.compress(lines(ROWS))[:-900], [], "got in.jsonl.gz (Truncated compressed stream)"),
    "a cut zstd": ("jsonl.zst", zstd(lines(ROWS))[:-900], [], "(Truncated compressed stream)"),
    "another compression": ("jsonl.zst", gzip.compress(GOOD), [], "ZSTD decompress failed"),
    "no object": ("jsonl", GOOD + b"[1, 2]\n", [], "line 6: expected an object with a column 'text'"),
    "no text": (
        "jsonl",
        b'{"content": "a"}\n',
        [],
        "line 1: expected an object with a column 'text' of type string, got keys content",
    ),
    "text of numbers": ("jsonl", b'{"text": 3}\n', [], "line 1: expected column 'text' of type string, got int"),
    "a score of words": ("jsonl", b'{"text": "a", "score": "b"}\n', ["--min-score", "1"], "type number, got str"),
    "a score that is true": ("jsonl", b'{"text": "a", "score": true}\n', ["--min-score", "1"], "type number, got bool"),
    "a lone surrogate": ("jsonl", GOOD + b'{"text": "a\\ud800b"}\n', [], "expected intact rows of UTF-8 text"),
    "broken bytes": ("jsonl", GOOD + b'{"text": "a\xff"}\n', [], "expected intact rows of UTF-8 text"),
    "nothing": ("jsonl", b"", [], "expected documents in part 'all', got 0 (dropped: none)"),
    "deep nonsense": ("jsonl", b"[" * 100_000, [], "line 1: expected a JSON object"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_json_lines(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix, content, flags, message = BAD_LINES[case]
    monkeypatch.chdir(tmp_path)
    Path(f"in.{suffix}").write_bytes(content)
    arguments = ["--tokenizer", tokenizer_folder("bpe"), "--output-prefix", "out", *flags]
    result = call_tool("--input", f"in.{suffix}", *arguments)
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.returncode == 2 and os.listdir(tmp_path) == [f"in.{suffix}"]


def test_invalid_json_text_is_dropped_on_request(tmp_path: Path) -> None:
    bad = b'{"text": "a\\ud800b"}\n{"text": "a\xff"}\n{"text": "\\ud83d\\ude00"}\n'
    (tmp_path / "in.jsonl").write_bytes(GOOD + bad)
    filters = Filters(drop_invalid_text=True)
    made = preprocess([tmp_path / "in.jsonl"], tokenizer_folder("bpe"), tmp_path / "out", filters=filters)
    assert made["documents"] == {"read": 8, "kept": 6, "dropped": {"invalid_text": 2}}
    assert list(iter_texts([tmp_path / "in.jsonl"], filters=filters)) == [*sample_texts()[:5], "\U0001f600"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """FineWeb-Edu's layout with 3 files in sample-10BT and one dump, as seen by this process and those it starts."""
    from huggingface_hub import HfFileSystem

    for number, path in enumerate(["sample/10BT/000_00000", "sample/10BT/001_00000", "data/CC-MAIN-2024-10/000"]):
        file = tmp_path / "hub" / f"{path}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(file, row_group_size=100, text=sample_texts()[number * 300 : (number + 1) * 300])
    (tmp_path / "hub" / "docs").mkdir()
    (tmp_path / "hub" / "docs" / "README.md").write_text("no documents")
    with serve(tmp_path / "hub") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        HfFileSystem.clear_instance_cache()
        yield served
    HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("config", "folder"), [("sample-10BT", "sample/10BT"), ("CC-MAIN-2024-10", "data/CC-MAIN-2024-10")]
)
def test_a_configuration_of_the_hub(config: str, folder: str, hub: Hub, tmp_path: Path) -> None:
    """The files of the same folder here, at a commit that the manifest names; nothing stays on the disk."""
    arguments = ["--hub-config", config, "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out"]
    result = call_tool(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    here = preprocess([tmp_path / "hub" / folder], tokenizer_folder("bpe"), tmp_path / "here")
    assert same_files(tmp_path / "out", tmp_path / "here")
    sources = json.loads((tmp_path / "out.manifest.json").read_text())["sources"]
    for source, local in zip(sources, here["sources"], strict=True):
        name = f"{folder}/{Path(local['file']).name}"
        checksum = "sha256:" + hashlib.sha256((tmp_path / "hub" / name).read_bytes()).hexdigest()
        file = f"hf://datasets/{DATASET}@{COMMIT}/{name}"
        assert source == {**local, "file": file, "checksum": checksum}
    assert {path.name for path in tmp_path.iterdir()} == {
        "hub",
        *(f"{n}.{s}" for n in ("out", "here") for s in ("bin", "idx", "manifest.json")),
    }


def test_a_cut_connection_is_taken_up_again(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer breaks off in the middle: that range is asked for once more, the others once."""
    monkeypatch.setattr(hub_module, "CHUNK_BYTES", 40_000)
    hub.cuts = 1
    made = preprocess([config_url(DATASET, "sample-10BT")], tokenizer_folder("bpe"), tmp_path / "out")
    assert made["documents"]["kept"] == 600
    ranges = hub.ranges()
    assert ranges[0] == ranges[1] == "bytes=0-39999" and len(ranges) - 1 == len(
        set(zip(ranges[1:], [p for _, p, w in hub.requests if w][1:], strict=True))
    )


def test_a_download_goes_on_where_a_killed_one_stopped(hub: Hub, tmp_path: Path) -> None:
    """kill -9 after some chunks, then --resume: the first range asked for starts at the bytes that lie there."""
    code = (
        "import sys, runpy; from megatron_act.data import hub; hub.CHUNK_BYTES = 20_000;"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [
        "--hub-config",
        "sample-10BT",
        "--tokenizer",
        tokenizer_folder("bpe"),
        "--output-prefix",
        tmp_path / "out",
    ]
    hub.delay = 0.2
    process = subprocess.Popen([sys.executable, "-c", code, *command(*arguments)[1:]], cwd=ROOT, env={**os.environ})
    deadline = time.monotonic() + 60
    while len(hub.ranges()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [part] = tmp_path.rglob("*.part")
    size, before = part.stat().st_size, len(hub.ranges())
    hub.delay = 0
    assert size and part.read_bytes() == (tmp_path / "hub/sample/10BT/000_00000.parquet").read_bytes()[:size]
    result = call_tool(*arguments, "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert hub.ranges()[before].startswith(f"bytes={size}-")
    preprocess([tmp_path / "hub/sample/10BT"], tokenizer_folder("bpe"), tmp_path / "here")
    assert same_files(tmp_path / "out", tmp_path / "here")


def test_downloads_are_kept_on_request_and_used_again(hub: Hub, tmp_path: Path) -> None:
    common = [
        "--hub-config",
        "sample-10BT",
        "--tokenizer",
        tokenizer_folder("bpe"),
        "--download-dir",
        tmp_path / "kept",
    ]
    assert call_tool(*common, "--output-prefix", tmp_path / "one").returncode == 0
    before = len(hub.ranges())
    assert call_tool(*common, "--output-prefix", tmp_path / "two").returncode == 0
    assert before == 2 and len(hub.ranges()) == before and same_files(tmp_path / "one", tmp_path / "two")
    kept = [path.name for path in (tmp_path / "kept").rglob("*.parquet")]
    assert sorted(kept) == ["000_00000.parquet", "001_00000.parquet"]


HUB_FAULTS = {
    "no such configuration": (["--hub-config", "sample-9T"], "sample/9T, got RemoteEntryNotFoundError"),
    "no such data set": (["--hub-dataset", "a/b", "--hub-config", "default"], "a/b/data, got RepositoryNotFoundError"),
    "no data set": (["--input", "hf://models/x"], "expected hf://datasets/OWNER/NAME[@REVISION]/FOLDER"),
    "no documents in it": (["--input", f"hf://datasets/{DATASET}/docs"], "got none; check the folder"),
    "a revision of nothing": (["--input", "x", "--revision", "main"], "expected --hub-config with --revision"),
    "no input at all": ([], "expected --input PATH or --hub-config NAME"),
}


@pytest.mark.parametrize("case", HUB_FAULTS)
def test_hub_faults(case: str, hub: Hub, tmp_path: Path) -> None:
    flags, message = HUB_FAULTS[case]
    result = call_tool(*flags, "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out")
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.returncode == 2 and not list(tmp_path.glob("out*"))


def test_corrupted_downloads_are_refused(hub: Hub, tmp_path: Path) -> None:
    """Other bytes of the same length: the hub's sha256 tells, and the next try starts afresh."""
    name = "sample/10BT/001_00000.parquet"
    hub.corrupt[name] = hub.files[name][:-1] + b"?"
    with pytest.raises(UserError, match=r"001_00000.parquet, got \d+ bytes with sha256"):
        preprocess([config_url(DATASET, "sample-10BT")], tokenizer_folder("bpe"), tmp_path / "out")
    hub.corrupt.clear()
    made = preprocess([config_url(DATASET, "sample-10BT")], tokenizer_folder("bpe"), tmp_path / "out", resume=True)
    assert made["documents"]["kept"] == 600


def test_configurations_have_their_folders() -> None:
    base = f"hf://datasets/{DATASET}"
    assert config_url(DATASET, "default") == f"{base}/data"
    assert config_url(DATASET, "sample-350BT", "v1.0.0") == f"{base}@v1.0.0/sample/350BT"
