"""The pieces: the sample that ships, its tokenizer, filters, the division by id, and one way to fail."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_support import (
    ROOT,
    call_tool,
    reference_ids,
    reference_tokenizer,
    run_tool,
    sample_texts,
    tokenizer_folder,
    write_parquet,
)

from megatron_act.compat import install_typing_override
from megatron_act.data import sample_path
from megatron_act.data.bpe import train_bpe
from megatron_act.data.filters import Filters, keep_mask
from megatron_act.data.source import iter_texts
from megatron_act.data.split import Split, parse_split
from megatron_act.errors import UserError, run_cli

SAMPLE_SHA256 = "2f1af1a097f315237e84826d4e058c3a8623cd9ddcccc107229ba3f7cc907c45"


def test_packaged_sample_is_the_attributed_one() -> None:
    assert hashlib.sha256(sample_path().read_bytes()).hexdigest() == SAMPLE_SHA256
    attribution = sample_path().with_name("wiki_leads.ATTRIBUTION.md").read_text(encoding="utf-8")
    assert SAMPLE_SHA256 in attribution and "CC BY-SA 4.0" in attribution
    assert (len(sample_texts()), sum(map(len, sample_texts()))) == (6400, 3_343_605)


def test_importing_the_package_is_light() -> None:
    code = "import sys, megatron_act.data; print([m for m in ('torch', 'pyarrow', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_trained_tokenizer_is_the_same_every_time(tmp_path: Path) -> None:
    """Same bytes from another process, through the tool, with one thread."""
    result = run_tool("--input", sample_path(), "--output", tmp_path / "again", tool="train_tokenizer.py")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path / 'again'}: 4,096 tokens, end of document <|endoftext|> is id 0\n"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer_folder("bpe") / name).read_bytes()


def test_trained_tokenizer_round_trips_and_compresses() -> None:
    tokenizer = reference_tokenizer("bpe")
    ids = reference_ids("bpe", sample_texts()[:200])
    assert tokenizer.decode_batch(ids) == sample_texts()[:200]
    size = sum(len(text.encode()) for text in sample_texts()[:200])
    assert 3.3 < size / sum(map(len, ids)) < 4.0  # bytes per token


def test_trained_tokenizer_opens_in_transformers() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("bpe"))
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.eos_token_id) == (4096, "<|endoftext|>", 0)
    assert tokenizer(sample_texts()[:50])["input_ids"] == reference_ids("bpe", sample_texts()[:50])


def test_trained_tokenizer_opens_in_megatron() -> None:
    install_typing_override()
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(str(tokenizer_folder("bpe")))
    assert (tokenizer.vocab_size, tokenizer.eod) == (4096, 0)
    assert tokenizer.text_to_ids(sample_texts()[0]) == reference_ids("bpe", sample_texts()[:1])[0]


def test_training_refuses_what_cannot_be_learned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at least 257 .* got 256"):
        train_bpe(["text"], 256, tmp_path / "out")
    with pytest.raises(UserError, match=r"expected texts .* got none"):
        train_bpe([], 300, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="expected a new output"):
        train_bpe(["text"], 300, tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert train_bpe(["aaaa aaaa"], 300, tmp_path / "there", overwrite=True) < 300
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


ROWS = {
    "text": ["abc", None, "", "\u00e9\u00e9\u00e9\u00e9", "abcdef", "x"],
    "score": [3.0, 5.0, 5.0, 2.5, None, float("nan")],
    "int_score": [3, 5, 5, 2, 4, 5],
    "language_score": [0.9, 0.9, 0.9, 0.65, 0.7, 0.9],
    "dump": ["CC-MAIN-2024-10", "CC-MAIN-2024-10", "CC-MAIN-2024-10", "CC-MAIN-2013-20", None, "CC-MAIN-2024-1"],
}


@pytest.mark.parametrize(
    ("filters", "kept", "dropped"),
    [
        (Filters(), [0, 3, 4, 5], {}),
        (Filters(min_chars=4), [3, 4], {"min_chars": 2}),
        (Filters(min_score=3.0), [0], {"min_score": 3}),
        (Filters(min_int_score=4), [4, 5], {"min_int_score": 2}),
        (Filters(min_language_score=0.7), [0, 4, 5], {"min_language_score": 1}),
        (Filters(min_score=2.5, min_chars=4), [3], {"min_chars": 2, "min_score": 1}),
        (Filters(dumps=("CC-MAIN-2024-10",)), [0], {"dump": 3}),
        (Filters(dumps=("CC-MAIN-2013-20", "CC-MAIN-2024-10"), min_score=2.6), [0], {"min_score": 3}),
    ],
)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_filters(filters: Filters, kept: list[int], dropped: dict[str, int], kind: pa.DataType, tmp_path: Path) -> None:
    """Bounds are inclusive, characters are code points, null and NaN fail, each row counts once."""
    columns = {**ROWS, "text": pa.array(ROWS["text"], kind)}
    batch = pa.RecordBatch.from_pydict(columns)
    keep, reasons = keep_mask(batch, "text", filters)
    assert np.flatnonzero(keep).tolist() == kept
    assert {reason: count for reason, count in reasons.items() if count} == {"null_text": 1, "empty_text": 1, **dropped}
    path = write_parquet(tmp_path / "in.parquet", **columns)
    assert list(iter_texts([path], filters=filters)) == [ROWS["text"][i] for i in kept]


BEYOND = 2**53 + 1  # no float64


@pytest.mark.parametrize(
    ("score", "kept"),
    [
        (pa.array(np.array([2.5, 3, 3.5], np.float16)), ["b", "c"]),
        (pa.array([2, 3, BEYOND]), ["b", "c"]),
        (pa.array([2, -BEYOND, 2**64 - 1 - 2**63]), ["c"]),
        (pa.array([0, 2, 2**64 - 1], pa.uint64()), ["c"]),
    ],
)
def test_numbers_of_every_type_are_compared(score: pa.Array, kept: list[str], tmp_path: Path) -> None:
    """Half precision and integers that a float64 does not hold, from parquet and from JSON."""
    path = write_parquet(tmp_path / "in.parquet", text=["a", "b", "c"], score=score)
    rows = [{"text": text, "score": value} for text, value in zip("abc", score.to_pylist(), strict=True)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (path, tmp_path / "in.jsonl"):
        assert list(iter_texts([source], filters=Filters(min_score=3.0))) == kept


def test_an_integer_beyond_float64_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a", "score": 10**400}))
    with pytest.raises(UserError, match="line 1: expected column 'score' of type number, got int; give one that"):
        list(iter_texts([tmp_path / "in.jsonl"], filters=Filters(min_score=3.0)))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_text_that_is_not_utf8_is_dropped_only_on_request(kind: pa.DataType) -> None:
    """A lone surrogate, a broken byte; the valid neighbours stay."""
    raw = pa.array([b"ok", b"\xed\xa0\x80", None, b"", b"\xff\xfe", "\u00e9".encode()], pa.binary())
    if kind == pa.large_string():
        raw = raw.cast(pa.large_binary())
    text = pa.Array.from_buffers(kind, len(raw), raw.buffers(), raw.null_count)
    batch = pa.RecordBatch.from_arrays([text], ["text"])
    keep, dropped = keep_mask(batch, "text", Filters(drop_invalid_text=True))
    assert np.flatnonzero(keep).tolist() == [0, 5]
    assert dropped == {"null_text": 1, "empty_text": 1, "invalid_text": 2}
    assert "invalid_text" not in keep_mask(batch, "text", Filters())[1]


def test_split_follows_the_published_rule() -> None:
    split = parse_split(["train:0.5", "valid:0.25", "test:0.25"])
    assert split == Split(("train", "valid", "test"), (0.5, 0.25, 0.25))
    ids = [f"<urn:uuid:{i}>" for i in range(4000)]
    parts = split.part_of(ids)
    quarters = [int(hashlib.sha256(item.encode()).hexdigest()[:12], 16) * 4 >> 48 for item in ids]
    assert parts.tolist() == [[0, 0, 1, 2][quarter] for quarter in quarters]
    assert np.abs(np.bincount(parts) / 4000 - [0.5, 0.25, 0.25]).max() < 0.03


@pytest.mark.parametrize(
    "items", [["train:0.9"], ["train:0.5", "train:0.5"], ["train:1.5", "valid:-0.5"], ["a/b:1"], ["x:."], ["train"], []]
)
def test_bad_split(items: list[str]) -> None:
    with pytest.raises(UserError, match="expected shares that sum to 1"):
        parse_split(items)


def _fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("expected a,\n got b"), 2, "error: expected a, got b\n"),
        (KeyboardInterrupt(), 1, "error: interrupted\n"),
        (OSError(28, "No space left"), 1, "error: unexpected OSError: [Errno 28] No space left (run again"),
    ],
)
def test_run_cli_reports_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(lambda: _fail(error)) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(line) and captured.err.count("\n") == 1 and captured.out == ""
    assert run_cli(lambda: _fail(error), debug=True) == code
    assert "Traceback" in capsys.readouterr().err


def test_run_cli_passes_codes_on() -> None:
    assert (run_cli(lambda: None), run_cli(lambda: 0), run_cli(lambda: 1)) == (0, 0, 1)


def test_flags_are_a_decision() -> None:
    """A new flag of the tool is added here too; its help names each."""
    flags = "input hub-dataset hub-config revision download-dir text-column min-score min-int-score min-language-score"
    flags += " min-chars dump drop-invalid-text tokenizer pattern eod-token eod-id encoder output-prefix split shards"
    flags += " overwrite workers tasks executor slurm resume timings debug help"
    result = run_tool("--help")
    assert result.returncode == 0
    assert set(re.findall(r"^  (?:-h, )?--([a-z-]+)", result.stdout, re.MULTILINE)) == set(flags.split())
    for name, own in {"verify": {"debug", "help"}, "merge": {"debug", "help", "output-prefix", "overwrite"}}.items():
        with pytest.raises(SystemExit):
            call_tool(name, "--wrong")
        found = re.findall(r"^  (?:-h, )?--([a-z-]+)", run_tool(name, "--help").stdout, re.MULTILINE)
        assert set(found) == own
