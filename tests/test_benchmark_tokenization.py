"""tools/benchmark_tokenization.py: everyone writes the same tokens, and the table is the figures' arithmetic."""

import importlib.util
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from data_support import ROOT, run_tool, sample_texts, tokenizer_folder, write_parquet


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_tokenization", ROOT / "tools/benchmark_tokenization.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_datatrove_and_megatron_write_our_bytes(tmp_path: Path) -> None:
    """Texts with letters of several scripts, in two files of several row groups."""
    texts = [*sample_texts()[:40], "\u4f60\u597d \U0001f44d caf\u00e9  two  spaces\n\n", "x"]
    for name, part in (("a", texts[:25]), ("b", texts[25:])):
        write_parquet(tmp_path / f"{name}.parquet", 7, text=part, id=[f"{name}{i}" for i in range(len(part))])
    words = ("--input", tmp_path, "--tokenizer", tokenizer_folder("bpe"), "--repeats", 1)
    done = run_tool(*words, tool="benchmark_tokenization.py")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    speeds = {row[0]: row for row in rows if len(row) == 6}
    for name in ("this project", "datatrove, stock", "Megatron's way, from JSON lines"):
        assert speeds[name][5] == "equal bytes", name
    size = sum(len(text.encode()) for text in texts)
    assert f"42 documents, {size / 1e6:.1f} MB of text, one core, one thread, encoder fastokens." in done.stdout
    assert {"encode", "read", "write"} <= {row[0] for row in rows if len(row) == 3}
    assert shlex.join(map(str, words)) in done.stdout


def test_the_table_holds_medians_shares_and_whether_bytes_are_equal(tool: ModuleType) -> None:
    def runs(seconds: list[float], written: bytes) -> list[dict]:
        return [
            {"seconds": wall, "cpu_seconds": wall / 2, "start_seconds": 3.0, "written": written} for wall in seconds
        ]

    figures = {"alone": runs([1.0, 5.0, 2.0], b""), "ours": runs([4.0], b"xy"), "megatron": runs([40.0], b"xz")}
    assert tool.speeds(figures, {"text_bytes": 80_000_000})[2:] == [
        "| tokenizer alone, in memory | 40.0 | 80.0 | 100% | 3.0 |  |",
        "| this project | 20.0 | 40.0 | 50% | 3.0 | equal bytes |",
        "| Megatron's way, from JSON lines | 2.0 | 4.0 | 5% | 3.0 | others |",
    ]


def test_stages_are_those_of_the_median_run_and_sum_to_it(tool: ModuleType) -> None:
    runs = [
        {"seconds": total, "stages": {"read": 0.1, "encode": total - 0.3}, "written": b""} for total in (9.0, 1.0, 2.0)
    ]
    assert tool.stages(runs, {})[2:-1] == [
        "| encode | 1700 | 85% |",
        "| read | 100 | 5% |",
        "| the rest | 200 | 10% |",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "nothing", "--tokenizer", "BPE"], "nothing"),
        (["--input", "SAMPLE", "--tokenizer", "nothing"], "--tokenizer"),
        (["--input", "SAMPLE", "--tokenizer", "BPE", "--repeats", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    places = {"BPE": str(tokenizer_folder("bpe")), "SAMPLE": str(ROOT / "megatron_act/data/wiki_leads.parquet")}
    done = run_tool(*(places.get(word, word) for word in words), tool="benchmark_tokenization.py")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and message in done.stderr
