"""tools/inspect_dataset.py: what it counts against plain Python, on files of Megatron's own builder; its errors."""

import json
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from data_support import ROOT, run_tool, sample_texts, tokenizer_folder

from megatron_act.compat import install_typing_override
from megatron_act.data import inspect_manifest, inspect_plot, inspect_report, sample_path
from megatron_act.data.inspect_index import open_indexed
from megatron_act.data.inspect_statistics import BLOCK_TOKENS, Lengths, count_tokens, measure_lengths
from megatron_act.data.inspect_text import open_decoder, quoted
from megatron_act.errors import UserError

install_typing_override()

# Two documents of several sequences, one without tokens, one of a single token.
DOCUMENTS = [[[5, 6, 7], [5, 5]], [[9]], [[]], [[6, 6, 6, 6], [7, 0, 3], [12, 5]]]


def build(folder: Path, documents: list[list[list[int]]], dtype: Any, multimodal: bool = False) -> str:
    """A data set by megatron-core's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = folder / "theirs"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for document in documents:
        modes = [0] * len(document) if multimodal else None
        flat = [token for sequence in document for token in sequence]
        builder.add_document(np.array(flat), [len(sequence) for sequence in document], modes)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("multimodal", [False, True])
def test_megatrons_own_files_are_counted_right(tmp_path: Path, dtype: Any, multimodal: bool) -> None:
    data = open_indexed(build(tmp_path, DOCUMENTS, dtype, multimodal))
    flat = [[token for sequence in document for token in sequence] for document in DOCUMENTS]
    assert data.tokens.dtype == dtype and data.documents == 4
    for number, document in enumerate(flat):
        assert data.document(number, 100)[0].tolist() == document
        assert data.document(number, 4)[0].tolist() == document[:4] and data.document(number, 4)[1] == len(document)
    lengths = measure_lengths(data)
    assert dict(zip(lengths.values, lengths.counts, strict=True)) == Counter(map(len, flat))
    tokens = count_tokens(data, 10**9, progress=False)
    expected = Counter(token for document in flat for token in document)
    assert {token: count for token, count in enumerate(tokens.counts) if count} == expected
    assert (tokens.seen, tokens.total) == (15, 15)
    assert tokens.top(3).tolist() == [6, 5, 7] and tokens.shares()[:2].tolist() == [5 / 15, 4 / 15]


def test_many_chunks_are_one_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    documents = [[draw.integers(0, 50, size).tolist() for size in draw.integers(0, 9, 3)] for _ in range(200)]
    data = open_indexed(build(tmp_path, documents, np.uint16))
    whole = measure_lengths(data), count_tokens(data, 10**9, progress=False).counts.tolist()
    monkeypatch.setattr("megatron_act.data.inspect_statistics.CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr("megatron_act.data.inspect_statistics.BLOCK_TOKENS", 13)
    parts = measure_lengths(data), count_tokens(data, 10**9, progress=False).counts.tolist()
    assert parts[1] == whole[1]
    for name in ("values", "counts"):
        assert getattr(parts[0], name).tolist() == getattr(whole[0], name).tolist()


def test_percentiles_and_mean_are_those_of_the_documents() -> None:
    all_lengths = np.sort(np.random.default_rng(2).integers(1, 300, 997))
    lengths = Lengths(*map(np.asarray, np.unique(all_lengths, return_counts=True)))
    for percent in (0.01, 1, 5, 50, 99, 100):
        expected = np.percentile(all_lengths, percent, method="inverted_cdf")
        assert lengths.percentile(percent) == expected
    assert lengths.mean == pytest.approx(all_lengths.mean())


def test_a_sample_is_spread_over_the_file_and_said_to_be_one(tmp_path: Path) -> None:
    """A file of 64 blocks, each of its own number, of which 8 are read."""
    prefix = sparse(tmp_path, 64 * BLOCK_TOKENS)
    tokens = np.memmap(prefix + ".bin", np.uint16, "r+")
    tokens.reshape(64, BLOCK_TOKENS)[:] = np.arange(64, dtype=np.uint16)[:, None]
    tokens.flush()
    counted = count_tokens(open_indexed(prefix), 8 * BLOCK_TOKENS, progress=False)
    assert np.flatnonzero(counted.counts).tolist() == list(range(0, 64, 8))
    assert set(counted.counts[::8]) == {BLOCK_TOKENS} and counted.shares()[0] == 1 / 8
    lines = inspect_report.token_lines(counted, 2, inspect_manifest.decoder(prefix, None, 64))
    assert lines[0].startswith(
        f"token counts (a sample of {8 * BLOCK_TOKENS:,}, evenly spread, of {64 * BLOCK_TOKENS:,}"
    )


def sparse(folder: Path, tokens: int) -> str:
    """One document of zeros, uint16, that takes no room on the disk."""
    prefix = folder / "sparse"
    with open(f"{prefix}.bin", "wb") as file:
        os.truncate(file.fileno(), 2 * tokens)
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 1, 2)
    Path(f"{prefix}.idx").write_bytes(head + struct.pack("<iqqq", tokens, 0, 0, 1))
    return str(prefix)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    prefix = sparse(tmp_path, 2_000_000_000)  # 4 GB in one document
    code = "import sys, runpy; sys.argv = sys.argv[1:]\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end: assert not end.code\n"
    code += "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    words = [sys.executable, "-c", code, str(ROOT / "tools/inspect_dataset.py"), prefix, "--tokens", "300000000"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 documents, 2,000,000,000 tokens" in done.stdout
    assert f"a sample of {286 * BLOCK_TOKENS:,}, evenly spread, of 2,000,000,000 tokens" in done.stdout
    assert int(done.stdout.split()[-1]) < 250_000  # kB; the 300 million tokens alone are 600 MB


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged sample by this project's tool."""
    prefix = tmp_path_factory.mktemp("ours") / "leads"
    done = run_tool("--input", sample_path(), "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", prefix)
    assert done.returncode == 0, done.stderr
    return prefix


def inspect(*words: object) -> subprocess.CompletedProcess[str]:
    return run_tool(*words, tool="inspect_dataset.py")


def test_the_command_prints_texts_counts_and_a_figure(ours: Path, tmp_path: Path) -> None:
    done = inspect(ours, "--verify", "--plot", tmp_path / "figure.png", "--documents", 2, "--chars", 60, "--top", 3)
    assert done.returncode == 0, done.stderr
    data = open_indexed(ours)
    assert f"6,400 documents, {len(data.tokens):,} tokens, uint16" in done.stdout
    assert "leads.manifest.json: all as described (" in done.stdout
    first, last = (quoted(text, 60) for text in (sample_texts()[0], sample_texts()[-1]))
    assert first in done.stdout and last in done.stdout  # decoded by the tokenizer that the manifest names
    counts = np.bincount(data.tokens)
    assert f"{counts.max() / counts.sum():.2%}" in done.stdout
    picture = matplotlib.image.imread(tmp_path / "figure.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1400
    assert (picture[0, 0] == 1).all() and picture[..., :3].mean() > 0.7  # light background


def test_the_figure_shows_the_numbers(ours: Path, tmp_path: Path) -> None:
    data = open_indexed(ours)
    lengths, tokens = measure_lengths(data), count_tokens(data, 10**9, progress=False)
    figure = inspect_plot.draw("title", lengths, tokens, tmp_path / "figure.png")
    left, right = figure.axes
    documents, of_tokens = (patch.get_data() for patch in left.patches)
    assert documents.values.sum() == pytest.approx(1) and of_tokens.values.sum() == pytest.approx(1)
    low, high = documents.edges[10], documents.edges[11]
    inside = (lengths.values >= low) & (lengths.values < high)
    assert documents.values[10] == pytest.approx(lengths.counts[inside].sum() / 6400)
    marks = [line.get_xdata()[0] for line in left.lines]
    assert marks == [lengths.percentile(percent) for percent in (5, 50, 95)]
    curve = right.lines[0]
    assert curve.get_ydata().tolist() == tokens.shares().tolist()
    assert (left.get_xscale(), right.get_xscale(), right.get_yscale()) == ("log", "log", "log")


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_every_tokenizer_is_read_backwards(name: str) -> None:
    from data_support import reference_ids

    text = "A caf\u00e9 in \u6771\u4eac: 3.14 \U0001f600 <b>\n"
    decoder = open_decoder(tokenizer_folder(name))
    (ids,) = reference_ids(name, [text])
    assert decoder.text(ids) == text
    assert max(ids) < decoder.size


def test_mistrals_file_and_ranks_are_read_backwards(tmp_path: Path) -> None:
    """The bytes of both formats, from files written here; a byte that is no character is shown as one."""
    import base64

    words = [bytes([value]) for value in range(256)] + [b" th", b" the"]
    ranks = tmp_path / "ranks.tiktoken"
    ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(word), rank) for rank, word in enumerate(words)))
    vocabulary = [{"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)]
    config = {"default_vocab_size": 268, "default_num_special_tokens": 10, "pattern": "."}
    tekken = tmp_path / "tekken.json"
    tekken.write_text(json.dumps({"config": config, "vocab": vocabulary}))
    for file, first, eod, name in ((ranks, 0, 258, "<|endoftext|>"), (tekken, 10, 2, "</s>")):
        decoder = open_decoder(file)
        assert decoder.text([first + 257, first + 33, eod]) == " the!" + name
        assert decoder.piece(first + 256) == " th" and decoder.piece(first + 0xE6) == "<0xE6>"


@pytest.mark.parametrize("change", ["token", "missing", "manifest"])
def test_a_changed_data_set_differs_from_its_manifest(ours: Path, tmp_path: Path, change: str) -> None:
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / ("leads" + suffix)).write_bytes(Path(f"{ours}{suffix}").read_bytes())
    file = tmp_path / "leads.bin"
    if change == "token":
        content = bytearray(file.read_bytes())
        content[1000] ^= 1
        file.write_bytes(bytes(content))
    elif change == "missing":
        (tmp_path / "leads.manifest.json").unlink()
    else:
        (tmp_path / "leads.manifest.json").write_text("{")
    done = inspect(tmp_path / "leads", "--verify")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert {"token": "checksum", "missing": "manifest", "manifest": "JSON"}[change] in done.stderr


DAMAGE = {
    "no such file": (lambda bin_, idx: bin_.unlink(), "no file"),
    "cut index": (lambda bin_, idx: os.truncate(idx, idx.stat().st_size - 3), "cut short"),
    "cut header": (lambda bin_, idx: os.truncate(idx, 20), "which is none"),
    "cut tokens": (lambda bin_, idx: os.truncate(bin_, bin_.stat().st_size - 2), "bytes in"),
    "another file": (lambda bin_, idx: idx.write_bytes(b"PAR1" * 100), "which is none"),
    "floats": (lambda bin_, idx: overwrite(idx, 17, b"\x06"), "type code 6"),
    "marks": (lambda bin_, idx: overwrite(idx, idx.stat().st_size - 8, struct.pack("<q", 3)), "documents from"),
}


def overwrite(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


@pytest.mark.parametrize("case", list(DAMAGE))
def test_a_damaged_data_set_is_refused(tmp_path: Path, case: str) -> None:
    prefix = build(tmp_path, DOCUMENTS, np.uint16)
    damage, words = DAMAGE[case]
    damage(Path(prefix + ".bin"), Path(prefix + ".idx"))
    with pytest.raises(UserError, match=words):
        open_indexed(prefix)


def test_numbers_that_are_no_tokens_are_refused(tmp_path: Path) -> None:
    data = open_indexed(build(tmp_path, [[[1, -7, 3]]], np.int32))
    with pytest.raises(UserError, match=r"from 0 to 16,777,215, got -7"):
        count_tokens(data, 10, progress=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing/here"], "got no file nothing/here.bin"),
        (["OURS", "--tokenizer", "nothing"], "tokenizer"),
        (["OURS", "--plot", "x.pdf"], "expected FILE.png"),
        (["OURS", "--plot", "no/such/folder/x.png"], "a folder that exists"),
        (["OURS", "--documents", "-1"], "at least 0"),
    ],
)
def test_bad_input_is_one_line(ours: Path, words: list[str], message: str) -> None:
    done = inspect(*(str(ours) if word == "OURS" else word for word in words))
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_tokenizer_that_is_too_small_is_refused(ours: Path) -> None:
    with pytest.raises(UserError, match="expected ids below 4,096"):
        inspect_manifest.decoder(str(ours), str(tokenizer_folder("bpe")), 5000)


def test_a_part_of_a_split_is_found_in_its_manifest(tmp_path: Path) -> None:
    entry = {"bin": {"file": "edu_valid.bin"}}
    (tmp_path / "edu.manifest.json").write_text(json.dumps({"outputs": [{"bin": {"file": "edu_train.bin"}}, entry]}))
    found = inspect_manifest.find(str(tmp_path / "edu_valid"))
    assert found is not None and found[0].name == "edu.manifest.json" and entry in found[1]["outputs"]
    assert inspect_manifest.find(str(tmp_path / "edu_test")) is None


def test_texts_stay_on_one_line() -> None:
    assert quoted('a\n"b"\x1b[0m\u202e' + "x" * 50, 12) == '"a\\n\\"b\\"\\u001b[0m\\u202exx\u2026"'


def test_an_empty_data_set_says_so(tmp_path: Path) -> None:
    prefix = build(tmp_path, [], np.uint16)
    done = inspect(prefix)
    assert done.returncode == 0 and "0 documents, 0 tokens" in done.stdout and "holds no tokens" in done.stdout
