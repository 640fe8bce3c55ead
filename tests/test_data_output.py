"""The files written: byte for byte Megatron's own, the same for any number of workers, and described truly."""

import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from data_support import (
    read_documents,
    reference_ids,
    run_tool,
    same_files,
    sample_texts,
    tokenizer_folder,
    write_parquet,
)

from megatron_act.compat import install_typing_override
from megatron_act.data import sample_path
from megatron_act.data.engine import Executor
from megatron_act.data.filters import Filters
from megatron_act.data.indexed import DTYPE_CODES, token_dtype
from megatron_act.data.plan import cut
from megatron_act.data.preprocess import make_plan, preprocess, run
from megatron_act.data.source import Source
from megatron_act.data.split import Split

install_typing_override()
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder  # noqa: E402


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def xxh3(path: Path) -> str:
    return "xxh3_128:" + xxhash.xxh3_128_hexdigest(path.read_bytes())


def naive(prefix: Path, documents: Sequence[list[int]], vocab_size: int) -> Path:
    """Megatron's builder, one document at a time."""
    import torch

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize(
    ("name", "eod", "eod_id", "dtype"),
    [
        ("bpe", None, 0, "uint16"),
        ("gpt2", None, 50256, "uint16"),
        ("deepseek", "<\uff5cend\u2581of\u2581sentence\uff5c>", 1, "int32"),
    ],
)
def test_equal_to_megatron_builder(name: str, eod: str | None, eod_id: int, dtype: str, tmp_path: Path) -> None:
    """Also when several tasks' tokens are joined."""
    texts = sample_texts()[:2000]
    write_parquet(tmp_path / "in.parquet", row_group_size=777, text=texts)
    documents = [[*ids, eod_id] for ids in reference_ids(name, texts)]
    for tasks in (1, 3):
        out = tmp_path / f"out{tasks}"
        plan = make_plan([tmp_path / "in.parquet"], tokenizer_folder(name), out, eod_token=eod, tasks=tasks)
        manifest = run(plan)
        assert same_files(out, naive(tmp_path / "naive", documents, manifest["vocab_size"]))
    assert manifest["dtype"] == dtype
    dataset = IndexedDataset(str(out))
    assert len(dataset) == 2000 and dataset[0].dtype == np.dtype(dtype)
    assert [dataset[i].tolist() for i in range(2000)] == documents


def test_one_document_one_token(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", text=["a"])
    preprocess([tmp_path / "in.parquet"], tokenizer_folder("bpe"), tmp_path / "out")
    documents = [[*reference_ids("bpe", ["a"])[0], 0]]
    assert same_files(tmp_path / "out", naive(tmp_path / "naive", documents, 4096))


def test_dtype_rule_is_megatrons() -> None:
    for size in (1, 257, 65499, 65500, 65501, 65536, 131072):
        assert token_dtype(size) == np.dtype(DType.optimal_dtype(size))
    assert all(DType[name].value == code for name, code in DTYPE_CODES.items())


@pytest.mark.parametrize("tasks", [2, 5, 9, 40])
def test_the_number_of_tasks_does_not_show(tasks: int, tmp_path: Path) -> None:
    """Fewer than files, more than files, and more than there are row groups, so that some have nothing to do."""
    texts = sample_texts()
    for part in range(3):
        write_parquet(tmp_path / f"{part}.parquet", row_group_size=100, text=texts[part * 700 : (part + 1) * 700])
    made = [
        run(make_plan([tmp_path], tokenizer_folder("bpe"), tmp_path / name, tasks=count))
        for name, count in (("one", 1), ("many", tasks))
    ]
    assert same_files(tmp_path / "one", tmp_path / "many")
    for manifest in made:
        for files in (manifest["outputs"][0]["bin"], manifest["outputs"][0]["idx"]):
            files["file"] = files["file"].partition(".")[2]
    assert made[0] == made[1]


def test_workers_and_tool_give_the_same_files(tmp_path: Path) -> None:
    """1 process in Python, 2 and 3 through the command, over a folder, a glob and a list of the same files."""
    texts = sample_texts()
    for part in range(3):
        write_parquet(tmp_path / f"{part}.parquet", row_group_size=100, text=texts[part * 700 : (part + 1) * 700])
    tokenizer = tokenizer_folder("bpe")
    manifest = preprocess([tmp_path], tokenizer, tmp_path / "one")
    files = [tmp_path / f"{part}.parquet" for part in range(3)]
    runs = {"two": [tmp_path / "*.parquet"], "three": [*files, tmp_path / "0.parquet"]}
    for workers, (name, inputs) in enumerate(runs.items(), start=2):
        arguments = ["--tokenizer", tokenizer, "--output-prefix", tmp_path / name, "--workers", workers]
        result = run_tool("--input", *inputs, *arguments, "--timings")
        assert (result.returncode, result.stderr) == (0, "")
        assert same_files(tmp_path / "one", tmp_path / name)
        assert f"{name}.bin: 2,100 documents, {manifest['tokens']:,} tokens (uint16)" in result.stdout
        assert {"read", "encode", "write", "join", "publish"} <= set(result.stdout.split())
    assert not list(tmp_path.glob("*.work*"))


def test_shards_are_the_whole_in_pieces(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "in.parquet", row_group_size=50, text=sample_texts()[:500], id=[str(i) for i in range(500)]
    )
    split = Split(("train", "valid"), (0.8, 0.2))
    whole = run(make_plan([tmp_path / "in.parquet"], tokenizer_folder("bpe"), tmp_path / "whole", split=split))
    made = run(make_plan([tmp_path / "in.parquet"], tokenizer_folder("bpe"), tmp_path / "s", split=split, shards=3))
    assert [item["bin"]["file"] for item in made["outputs"]] == [
        f"s_{part}_{shard:05d}.bin" for part in split.names for shard in range(3)
    ]
    for part in split.names:
        shards = [read_documents(tmp_path / f"s_{part}_{shard:05d}") for shard in range(3)]
        assert all(shards)
        assert [item for shard in shards for item in shard] == read_documents(tmp_path / f"whole_{part}")
    assert made["tokens"] == whole["tokens"] and made["documents"] == whole["documents"]
    for item in made["outputs"]:
        assert item["bin"]["checksum"] == xxh3(tmp_path / item["bin"]["file"])


def test_a_task_gets_its_share_of_bytes() -> None:
    """Contiguous, complete, in order, and no task more than one piece above its share."""
    sizes = [(5, 1, 1), (3,), (10, 10, 1, 1), (0,)]
    sources = [Source(str(i), sum(pieces), "", None, pieces) for i, pieces in enumerate(sizes)]
    for tasks in range(1, 12):
        planned = cut(sources, tasks)
        walked = [(item.source, piece) for task in planned for item in task for piece in range(item.start, item.stop)]
        assert walked == [(i, piece) for i, pieces in enumerate(sizes) for piece in range(len(pieces))]
        held = [sum(sum(sizes[item.source][item.start : item.stop]) for item in task) for task in planned]
        assert max(held) <= 32 / tasks + 10 and len(planned) == tasks


def test_encoder_choice_does_not_change_the_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", text=sample_texts()[:300])
    made = [
        preprocess([tmp_path / "in.parquet"], tokenizer_folder("bpe"), tmp_path / name, encoder=name)
        for name in ("fastokens", "tokenizers")
    ]
    assert [item["tokenizer"]["encoder"] for item in made] == ["fastokens", "tokenizers"]
    assert same_files(tmp_path / "fastokens", tmp_path / "tokenizers")


def test_manifest_tells_the_truth(tmp_path: Path) -> None:
    texts = ["kept one", None, "", "kept <|endoftext|> two", "no"]
    one = write_parquet(tmp_path / "a.parquet", text=texts, score=[4.0, 4.0, 4.0, None, 4.0])
    two = write_parquet(tmp_path / "b.parquet", text=["kept three", "low"], score=[3.0, 2.9])
    out, tokenizer = tmp_path / "deep" / "er" / "out", tokenizer_folder("bpe")
    made = preprocess([one, two], tokenizer, out, filters=Filters(min_score=3.0, min_chars=3), command="the command")
    manifest = json.loads(Path(f"{out}.manifest.json").read_text(encoding="utf-8"))
    assert made == manifest
    tokens = sum(len(ids) + 1 for ids in reference_ids("bpe", ["kept one", "kept three"]))
    assert manifest["documents"] == {
        "read": 7,
        "kept": 2,
        "dropped": {"empty_text": 1, "min_chars": 1, "min_score": 2, "null_text": 1},
    }
    assert (manifest["tokens"], manifest["vocab_size"], manifest["dtype"]) == (tokens, 4096, "uint16")
    assert (manifest["eod_token"], manifest["eod_id"]) == ("<|endoftext|>", 0)
    assert manifest["tokenizer"] == {
        "file": str(tokenizer / "tokenizer.json"),
        "kind": "tokenizer.json",
        "pattern": None,
        "sha256": sha256(tokenizer / "tokenizer.json"),
        "encoder": "fastokens",
    }
    assert manifest["special_tokens_in_text"] == "encoded as plain text"
    assert manifest["filters"] == {
        "min_score": 3.0,
        "min_int_score": None,
        "min_language_score": None,
        "min_chars": 3,
        "dumps": [],
        "drop_invalid_text": False,
    }
    assert manifest["sources"] == [
        {"file": str(path), "bytes": path.stat().st_size, "checksum": xxh3(path), "rows": rows}
        for path, rows in ((one, 5), (two, 2))
    ]
    [output] = manifest["outputs"]
    assert (output["documents"], output["tokens"]) == (2, tokens)
    for suffix in ("bin", "idx"):
        path = out.parent / output[suffix]["file"]
        assert output[suffix] == {"file": f"out.{suffix}", "bytes": path.stat().st_size, "checksum": xxh3(path)}
    assert manifest["command"] == "the command" and manifest["text_column"] == "text"
    assert all(manifest["versions"][name] for name in ("fastokens", "datatrove", "pyarrow"))


def test_split_divides_by_id_and_nothing_else(tmp_path: Path) -> None:
    """The parts join to the whole; a document stays in its part when the files are shuffled and thinned."""
    rows = pq.read_table(sample_path(), columns=["text", "id"]).slice(0, 1000).to_pylist()
    split = Split(("train", "valid"), (0.9, 0.1))

    def parts(name: str, chosen: list[dict]) -> dict[str, list[list[int]]]:
        columns = {key: [row[key] for row in chosen] for key in ("text", "id")}
        write_parquet(tmp_path / f"{name}.parquet", row_group_size=64, **columns)
        preprocess([tmp_path / f"{name}.parquet"], tokenizer_folder("bpe"), tmp_path / name, split=split)
        datasets = {part: IndexedDataset(str(tmp_path / f"{name}_{part}")) for part in split.names}
        return {part: [item.tolist() for item in dataset] for part, dataset in datasets.items()}

    whole, thinned = parts("whole", rows), parts("thinned", rows[::-2])
    expected: dict[str, list[list[int]]] = {"train": [], "valid": []}
    for row, ids in zip(rows, reference_ids("bpe", [row["text"] for row in rows]), strict=True):
        fraction = int(hashlib.sha256(row["id"].encode()).hexdigest()[:12], 16) / 16**12
        expected["train" if fraction < 0.9 else "valid"].append([*ids, 0])
    assert whole == expected
    assert 60 <= len(whole["valid"]) <= 140
    for part in split.names:
        kept = {tuple(ids) for ids in whole[part]}
        assert thinned[part] and all(tuple(ids) in kept for ids in thinned[part])


def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=["old", "older"])
    write_parquet(tmp_path / "b.parquet", text=["new"])
    tokenizer = tokenizer_folder("bpe")
    preprocess([tmp_path / "a.parquet"], tokenizer, tmp_path / "out")
    preprocess([tmp_path / "b.parquet"], tokenizer, tmp_path / "out", overwrite=True)
    preprocess([tmp_path / "b.parquet"], tokenizer, tmp_path / "fresh")
    assert same_files(tmp_path / "out", tmp_path / "fresh")
    assert json.loads((tmp_path / "out.manifest.json").read_text())["documents"]["kept"] == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bar_of_documents_on_a_terminal(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_parquet(tmp_path / "a.parquet", row_group_size=50, text=sample_texts()[:300])
    for terminal, shown in ((Terminal(), "300/300"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", terminal)
        plan = make_plan([source], tokenizer_folder("bpe"), tmp_path / "out", tasks=3, overwrite=True)
        run(plan, Executor(workers=workers))
        assert shown in terminal.getvalue() and bool(shown) == bool(terminal.getvalue())
