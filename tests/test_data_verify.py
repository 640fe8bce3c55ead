"""`verify` notices every kind of change, and `merge` writes what Megatron's own add_index writes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_support import call_tool, read_documents, same_files, sample_texts, tokenizer_folder, write_parquet

from megatron_act.compat import install_typing_override
from megatron_act.data import merge as merging
from megatron_act.data import staging
from megatron_act.data.checksum import file_checksum
from megatron_act.data.manifest import FORMAT, manifest_of
from megatron_act.data.merge import merge
from megatron_act.data.preprocess import make_plan, preprocess, run
from megatron_act.data.verify import verify
from megatron_act.data.work import Work
from megatron_act.errors import UserError

install_typing_override()
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder  # noqa: E402


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A data set with its own copy of the tokenizer, two sources and dropped rows; its prefix."""
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder("bpe") / "tokenizer.json").read_bytes())
    write_parquet(tmp_path / "a.parquet", text=[*sample_texts()[:30], None])
    write_parquet(tmp_path / "b.parquet", text=sample_texts()[30:40])
    preprocess([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "tokenizer.json", tmp_path / "out")
    return tmp_path / "out"


def test_an_untouched_data_set_is_as_its_manifest_says(made: Path) -> None:
    findings = verify(made)
    assert (findings.problems, findings.unchecked) == ([], []) and findings.compared > 15
    result = call_tool("verify", made)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{made}: as its manifest says ({findings.compared} comparisons)\n"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(prefix: Path, change: Callable[[dict], None]) -> None:
    path = Path(f"{prefix}.manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def forge_tokens(prefix: Path, place: int, value: int) -> None:
    """Change a token, and the manifest's checksum with it."""
    tokens = np.fromfile(f"{prefix}.bin", "<u2")
    tokens[place] = value
    tokens.tofile(f"{prefix}.bin")
    edit(prefix, lambda manifest: manifest["outputs"][0]["bin"].update(checksum=file_checksum(Path(f"{prefix}.bin"))))


def forge_offsets(prefix: Path) -> None:
    """Let the second document start one byte late, and the manifest agree."""
    index = Path(f"{prefix}.idx")
    flip(index, 34 + 4 * 40 + 8)
    edit(prefix, lambda manifest: manifest["outputs"][0]["idx"].update(checksum=file_checksum(index)))


def cut_tokens(prefix: Path) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the tokens": (lambda prefix: flip(Path(f"{prefix}.bin"), 1000), "out.bin, checksum: expected"),
    "a token short": (cut_tokens, "out.bin, bytes: expected"),
    "no tokens": (lambda prefix: Path(f"{prefix}.bin").unlink(), "out.bin: expected a file, got none"),
    "a bit of the index": (lambda prefix: flip(Path(f"{prefix}.idx"), 40), "out.idx, checksum: expected"),
    "an offset, checksum forged": (forge_offsets, "out.idx, checksum of what its lengths imply"),
    "an id too large, checksum forged": (
        lambda p: forge_tokens(p, 3, 60000),
        "ids outside the vocabulary: expected 0, got 1",
    ),
    "an EOD lost, checksum forged": (
        lambda p: forge_tokens(p, -1, 5),
        "sequences that do not end with EOD: expected 0, got 1",
    ),
    "a source": (lambda prefix: flip(prefix.with_name("a.parquet"), 50), "a.parquet, checksum: expected"),
    "the tokenizer": (lambda prefix: flip(prefix.with_name("tokenizer.json"), 3), "tokenizer.json, sha256: expected"),
    "documents": (
        lambda p: edit(p, lambda m: m["outputs"][0].update(documents=41)),
        "out.idx, documents: expected 41, got 40",
    ),
    "tokens in all": (lambda p: edit(p, lambda m: m.update(tokens=7)), "tokens, over all outputs: expected 7"),
    "kept": (
        lambda p: edit(p, lambda m: m["documents"].update(kept=39)),
        "documents kept, over all outputs: expected 39, got 40",
    ),
    "read": (lambda p: edit(p, lambda m: m["documents"].update(read=42)), "rows kept and dropped: expected 42, got 41"),
    "rows of a source": (
        lambda p: edit(p, lambda m: m["sources"][0].update(rows=30)),
        "rows of all sources: expected 41, got 40",
    ),
    "dtype": (lambda p: edit(p, lambda m: m.update(dtype="int32")), "out.idx, dtype: expected int32, got uint16"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what: str, made: Path) -> None:
    change, message = CHANGES[what]
    change(made)
    result = call_tool("verify", made)
    assert message in result.stdout and "from its manifest" in result.stdout.splitlines()[-1]
    assert (result.returncode, result.stderr) == (1, "")


def test_what_is_gone_is_named_not_failed(made: Path) -> None:
    made.with_name("b.parquet").unlink()
    result = call_tool("verify", made)
    assert result.returncode == 0 and f"not here, not checked: {made.with_name('b.parquet')}" in result.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a manifest at"),
        ("[", "expected a manifest at"),
        ("[1]", "expected a manifest at"),
        ('{"format": "x/9"}', "expected the format"),
        (json.dumps({"format": FORMAT}), "expected a whole manifest at"),
        (json.dumps({"format": FORMAT, "outputs": [1]}), "expected a whole manifest at"),
        (json.dumps({"format": FORMAT, "outputs": [], "documents": []}), "expected a whole manifest at"),
    ],
)
def test_verify_wants_a_manifest(content: str | None, message: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "out.manifest.json").write_text(content)
    result = call_tool("verify", tmp_path / "out")
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


def by_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type) -> Path:
    """Megatron's builder; a document may have several sequences, or none."""
    import torch

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for ids in sequences:
            builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


PARTS = [[[[1, 2, 3], [4]], [[5, 0]]], [[[6, 7, 8, 9, 0]]], [[], [[1]], [[2, 3], [4], [5]]]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_merge_equals_add_index(dtype: type, tmp_path: Path) -> None:
    parts = [by_megatron(tmp_path / f"part{i}", documents, dtype) for i, documents in enumerate(PARTS)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(str(tmp_path / "theirs.idx"))
    manifest = merge(parts, tmp_path / "ours")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    assert [item.tolist() for item in IndexedDataset(str(tmp_path / "ours"))] == [
        ids for documents in PARTS for sequences in documents for ids in sequences
    ]
    assert (manifest["documents"], manifest["tokens"], manifest["vocab_size"]) == ({"kept": 6}, 16, None)
    assert verify(tmp_path / "ours").problems == []


def test_merged_shards_are_the_unsharded_output(tmp_path: Path) -> None:
    """Through the command, with a shell's glob; the parts' common tokenizer is told of the whole."""
    write_parquet(tmp_path / "in.parquet", row_group_size=20, text=sample_texts()[:200])
    run(make_plan([tmp_path / "in.parquet"], tokenizer_folder("bpe"), tmp_path / "s", shards=3))
    whole = preprocess([tmp_path / "in.parquet"], tokenizer_folder("bpe"), tmp_path / "whole")
    result = call_tool("merge", *sorted(tmp_path.glob("s_*.idx")), "--output-prefix", tmp_path / "merged")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"merged.bin: 200 documents, {whole['tokens']:,} tokens (uint16)" in result.stdout
    assert same_files(tmp_path / "merged", tmp_path / "whole")
    manifest = json.loads((tmp_path / "merged.manifest.json").read_text())
    for name in ("vocab_size", "eod_token", "eod_id", "dtype", "tokens", "tokenizer"):
        assert manifest[name] == whole[name]
    assert [part["bin"]["checksum"] for part in manifest["merged_from"]] == [
        file_checksum(tmp_path / f"s_{shard:05d}.bin") for shard in range(3)
    ]
    assert call_tool("verify", tmp_path / "merged").returncode == 0
    assert len(read_documents(tmp_path / "merged")) == 200


def test_merge_refuses_what_does_not_fit(tmp_path: Path) -> None:
    small, large = (by_megatron(tmp_path / kind.__name__, PARTS[0], kind) for kind in (np.uint16, np.int32))
    cut = by_megatron(tmp_path / "cut", PARTS[1], np.uint16)
    cut_tokens(cut)
    (tmp_path / "half.idx").write_bytes(Path(f"{small}.idx").read_bytes()[:-8])
    (tmp_path / "half.bin").write_bytes(b"")
    (tmp_path / "alone.idx").write_bytes(Path(f"{small}.idx").read_bytes())
    cases = {
        (small, large): "expected data sets of one dtype, got int32, uint16",
        (small, cut): "expected 10 bytes in",
        (tmp_path / "half",): "expected a whole index of Megatron's",
        (tmp_path / "alone",): "and its .bin",
        (tmp_path / "none",): "expected an index of Megatron's",
    }
    for prefixes, message in cases.items():
        result = call_tool("merge", *prefixes, "--output-prefix", tmp_path / "out")
        assert result.returncode == 2 and message in result.stderr and not list(tmp_path.glob("out*"))
    (tmp_path / "out.bin").write_text("older work")
    assert "expected a new output" in call_tool("merge", small, "--output-prefix", tmp_path / "out").stderr
    assert call_tool("merge", small, "--output-prefix", tmp_path / "out", "--overwrite").returncode == 0
    assert same_files(tmp_path / "out", small)


@pytest.mark.parametrize(
    "content", ["{", "[1]", "1", "null", '{"outputs": [{}]}', json.dumps({"format": FORMAT}), "\x00"]
)
def test_other_files_named_like_a_manifest_are_passed_over(content: str, made: Path) -> None:
    """Broken, foreign or without outputs, and sorted before ours."""
    made.with_name("a.manifest.json").write_text(content)
    expected = json.loads(Path(f"{made}.manifest.json").read_text())
    assert manifest_of(made) == expected and manifest_of(made.with_name("none")) is None
    assert merge([made], made.with_name("merged"))["tokenizer"] == expected["tokenizer"]


def test_two_merges_at_the_same_time(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins where the first is about to publish: the first's three files come out."""
    out, other, refused = made.with_name("merged"), made.with_name("other"), []
    by_megatron(other, PARTS[0], np.uint16)

    def publish(*files: object) -> None:
        monkeypatch.undo()
        refused.append(call_tool("merge", other, "--output-prefix", out, "--overwrite"))
        staging.publish(*files)  # type: ignore[arg-type]

    monkeypatch.setattr(merging, "publish", publish)
    merge([made], out)
    assert refused[0].returncode == 2 and "another run is using" in refused[0].stderr
    assert same_files(out, made) and verify(out).problems == []
    assert len(list(made.parent.glob("merged*"))) == 3


def test_a_merge_leaves_an_unfinished_tokenization_alone(made: Path) -> None:
    work = Work(made.with_name("merged.work"))
    work.tasks.mkdir(parents=True)
    work.plan_file.write_text("{}")
    with pytest.raises(UserError, match="expected no tokenization with the output"):
        merge([made], made.with_name("merged"), overwrite=True)
    assert work.plan_file.read_text() == "{}"
