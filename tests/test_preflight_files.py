"""Data, tokenizer, checkpoint folder and groups: each broken on purpose."""

import hashlib
import json
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from preflight_ranks import two_ranks

from megatron_act.compat import install_typing_override

install_typing_override()

from megatron_act import preflight_data, preflight_groups, preflight_storage  # noqa: E402
from megatron_act.data.indexed import single_documents, write_pair  # noqa: E402
from megatron_act.data.manifest import FORMAT  # noqa: E402
from megatron_act.errors import UserError  # noqa: E402

TOKENS, LENGTHS = 100, (30, 50, 20)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    np.arange(TOKENS, dtype="<u2").tofile(tmp_path / "tokens")
    np.array(LENGTHS, "<i4").tofile(tmp_path / "lengths")
    part = single_documents(tmp_path / "tokens", tmp_path / "lengths", len(LENGTHS))
    write_pair(tmp_path / "text_train", [part], np.dtype("<u2"))
    return str(tmp_path / "text_train")


def cut(path: str, size: int) -> None:
    os.truncate(path, os.path.getsize(path) + size)


def test_whole_files(prefix: str) -> None:
    assert preflight_data.whole(prefix) == "100 tokens of uint16, 3 sequences"


@pytest.mark.parametrize("change", [-2, 2])
def test_a_bin_of_another_length(change: int, prefix: str) -> None:
    cut(f"{prefix}.bin", change)
    with pytest.raises(UserError, match=rf"expected 200 bytes in .*\.bin, .* got {200 + change}: copy it again"):
        preflight_data.whole(prefix)


def test_a_cut_index(prefix: str) -> None:
    cut(f"{prefix}.idx", -8)
    with pytest.raises(UserError, match=r"bytes where .* follow from the header"):
        preflight_data.whole(prefix)


def manifest(prefix: str, tokenizer: bytes, vocab_size: int = 128) -> None:
    """As the tokenization writes it beside the parts of a split."""
    content = {
        "format": FORMAT,
        "outputs": [{"bin": {"file": Path(prefix).name + ".bin"}}],
        "vocab_size": vocab_size,
        "tokenizer": {"file": "/elsewhere/tokenizer.json", "sha256": hashlib.sha256(tokenizer).hexdigest()},
    }
    Path(prefix).with_name("text.manifest.json").write_text(json.dumps(content))


def test_the_tokenizer_that_made_the_data(prefix: str, tmp_path: Path) -> None:
    args = Namespace(tokenizer_model=str(tmp_path))
    assert preflight_data.made_by(prefix, args, 128) == "no manifest: the vocabulary alone is compared"
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    manifest(prefix, b"{}")
    assert preflight_data.made_by(prefix, args, 128).startswith("the same file, sha256 44136fa355b3")
    with pytest.raises(UserError, match=r"expected a tokenizer of 128 tokens, which made .*, got one of 127"):
        preflight_data.made_by(prefix, args, 127)
    (tmp_path / "tokenizer.json").write_bytes(b"{ }")
    with pytest.raises(UserError, match=r"expected the tokenizer that made .* \(sha256 44136fa355b3\), got"):
        preflight_data.made_by(prefix, args, 128)


def test_data_that_records_no_tokenizer(prefix: str) -> None:
    """As of merged parts that differ; a vocabulary that is recorded is compared all the same."""
    path = Path(prefix).with_name("text.manifest.json")
    content = {"format": FORMAT, "outputs": [{"bin": {"file": Path(prefix).name + ".bin"}}], "tokenizer": None}
    for vocab_size in (None, 128):
        path.write_text(json.dumps({**content, "vocab_size": vocab_size}))
        found = preflight_data.made_by(prefix, Namespace(tokenizer_model=None), 128)
        assert found == "no tokenizer recorded: the vocabulary alone is compared"
    with pytest.raises(UserError, match="expected a tokenizer of 128 tokens"):
        preflight_data.made_by(prefix, Namespace(tokenizer_model=None), 127)
    for foreign in ("{", "[1]"):
        path.write_text(foreign)
        found = preflight_data.made_by(prefix, Namespace(tokenizer_model=None), 128)
        assert found == "no manifest: the vocabulary alone is compared"


def arguments(prefix: str, **changes: object) -> Namespace:
    names = ("tokenizer_model", "train_data_path", "valid_data_path", "test_data_path", "padded_vocab_size")
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 100, "mock_data": False, "rank": 0, "data_path": [prefix]}
    padding = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1, "no_pad_vocab_size": False}
    return Namespace(**{**dict.fromkeys(names), **null, **padding, "pad_vocab_size": True, **changes})


def problems(args: Namespace) -> dict[str, str]:
    return {finding.name: finding.problem for finding in preflight_data.checks(args) if finding.problem}


def test_data_and_tokenizer_together(prefix: str) -> None:
    assert problems(arguments(prefix)) == {}
    (ids,) = problems(arguments(prefix, vocab_size=99)).values()
    assert ids.startswith("vocabulary mismatch: expected ids below 99 (the tokenizer's), got 99")
    assert problems(arguments(prefix, padded_vocab_size=99)) == {
        "tokenizer": "expected at most 99 tokens (--padded-vocab-size), got 100: raise --padded-vocab-size or use the "
        "config's tokenizer"
    }
    assert list(problems(arguments(prefix, data_path=[f"{prefix}x"]))) == ["token ids", f"data {prefix}x"]
    assert list(problems(arguments(prefix, data_path=None))) == ["data"]
    assert list(problems(arguments(prefix, tokenizer_type="NoSuch"))) == ["tokenizer"]


def test_the_checkpoint_folder_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert preflight_storage.writable(tmp_path / "there" / "a" / "b") == f"{tmp_path / 'there'} can be written"
    assert preflight_storage.writable(tmp_path / "there") == f"{tmp_path / 'there'} can be written"
    assert list((tmp_path / "there").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"expected to write in .*file, got Not a directory: change its rights"):
        preflight_storage.writable(tmp_path / "file" / "checkpoints")


GB = 10**9  # parameters of 14 bytes: 14 GB a checkpoint


def saving(folder: Path, **changes: object) -> Namespace:
    """2,500 steps, a checkpoint every 1,000: three of them."""
    names = ("keep_last_checkpoints", "save_retain_interval", "save_interval_minutes", "export_best", "bf16", "fp16")
    plan = {"save": str(folder), "train_iters": 2500, "save_interval": 1000}
    return Namespace(**{**dict.fromkeys(names), **plan, **changes})


def test_room_for_all_checkpoints_where_none_is_removed(tmp_path: Path) -> None:
    wanted = "14 GB a checkpoint; room for 3, needed for 3 more (all that this run will save)"
    assert preflight_storage.room(saving(tmp_path / "x"), GB, free=42 * GB) == wanted
    with pytest.raises(UserError, match=r"expected 42\.0 GB free in .* for 3 more \(all .*\), got 41\.0 GB: free some"):
        preflight_storage.room(saving(tmp_path / "x"), GB, free=41 * GB)


def test_room_for_the_best_export_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = tmp_path / "best"
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: Namespace(st_dev=7) if path == best else real(path, **k))
    monkeypatch.setattr(preflight_storage, "existing", Path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=1 * GB))
    args = saving(tmp_path, export_best=str(best), bf16=True)
    with pytest.raises(UserError, match=r"--export-best: expected 2\.0 GB free in .*best, got 1\.0 GB"):
        preflight_storage.room(args, GB, free=42 * GB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=2 * GB))
    assert "best" not in preflight_storage.room(args, GB, free=42 * GB)


def test_room_for_the_best_export(tmp_path: Path) -> None:
    """Twice until there is one, once from then on; in the model's dtype."""
    best = tmp_path / "best"
    for dtype, there, size in (({"bf16": True}, False, 4), ({}, False, 8), ({"bf16": True}, True, 2)):
        if there:
            best.mkdir()
        args = saving(tmp_path / "x", export_best=str(best), **dtype)
        wanted = rf"needed for 3 more \(all that this run will save, {size} GB of --export-best\)"
        assert re.search(wanted, preflight_storage.room(args, GB, free=(42 + size) * GB))
        with pytest.raises(UserError, match=rf"expected {42 + size}\.0 GB free"):
            preflight_storage.room(args, GB, free=(41 + size) * GB)


@pytest.mark.parametrize(
    ("changes", "there", "count"),
    [
        ({"train_iters": 10_000}, (), 10),
        ({"train_iters": 10_000}, (3000, 4000), 6),  # from 4,000 on
        ({"train_iters": 10_000}, (10_000,), 1),
        ({"train_iters": 10_000, "keep_last_checkpoints": 2}, (), 3),
        ({"train_iters": 10_000, "keep_last_checkpoints": 2}, (3000, 4000), 1),
        ({"train_iters": 10_000, "keep_last_checkpoints": 2}, (1000, 2000, 3000, 4000), 1),
        ({"train_iters": 10_000, "keep_last_checkpoints": 20}, (), 10),
        ({"train_iters": 10_000, "save_retain_interval": 4000}, (), 4),
        ({"save_interval": 10**9, "save_interval_minutes": 30.0}, (), 2),
        ({"save_interval": 10**9, "save_interval_minutes": 30.0, "keep_last_checkpoints": 3}, (), 4),
        ({"train_iters": None}, (), 2),
    ],
)
def test_checkpoints_to_come(changes: dict, there: tuple[int, ...], count: int, tmp_path: Path) -> None:
    for iteration in there:
        (tmp_path / f"iter_{iteration:07d}").mkdir()
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    assert preflight_storage.to_come(saving(tmp_path, **changes))[0] == count


def test_two_ranks(tmp_path: Path) -> None:
    """A faulty link is counted on every rank; a folder of one node is noticed by the other and left as it was."""
    mp.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [first["sound"][:2], first["faulty"][:2]] == [[2, 0], [2, 1]]
    assert first["sound"] == second["sound"] and first["faulty"] == second["faulty"]  # the slowest's bandwidth too
    assert first["sound"][2] > 0
    seen = "all 2 ranks see rank 0's file"
    assert (first["shared"], second["shared"], first["own"]) == (seen, seen, seen)
    assert second["own"].startswith(f"expected {tmp_path}/rank1 on a file system that all nodes share")
    assert [list((tmp_path / f"rank{rank}").iterdir()) for rank in (0, 1)] == [[], []]


def test_wrong_sums() -> None:
    found = preflight_groups.judge("all ranks", preflight_groups.Measured(8, 3, 40.0), 0)
    assert found.problem.startswith("expected exact sums, got 3 wrong elements in a group of 8: run nccl-tests")


def test_bandwidth_below_the_wanted() -> None:
    found = preflight_groups.judge("data parallel", preflight_groups.Measured(8, 0, 40.0), 100)
    assert found.problem.startswith("expected at least 100 GB/s (--min-bus-gbps), got 40: NCCL_DEBUG=INFO shows")
    passed = preflight_groups.judge("data parallel", preflight_groups.Measured(8, 0, 140.0), 100)
    assert (passed.problem, passed.got) == ("", "groups of 8: exact, slowest 140 GB/s")


def test_the_pattern_sums_exactly_in_fp32() -> None:
    """The largest contribution of 32,768 ranks: an integer that fp32 holds."""
    largest = 2 * (preflight_groups.PATTERN - 1)
    assert 32768 * largest < 2**24
    values = preflight_groups.pattern(252, torch.device("cpu"))
    assert (values[250], values[251], values.dtype) == (250, 0, torch.float32)
