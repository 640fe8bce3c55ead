"""Conversions of any size: memory of one tensor, interrupted ones go on, outputs are whole or not there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from checkpoint_scale import measure, random_checkpoint, shapes, stored_bytes
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_act.checkpoint import resume
from megatron_act.checkpoint.export import export
from megatron_act.checkpoint.info import describe
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.checkpoint.resume import unfinished
from megatron_act.checkpoint.writer import INDEX, Entry, complete_folder, shard_bytes, shards, write_model
from megatron_act.errors import UserError

ROOT = Path(__file__).parents[1]
SLACK_BYTES = 10 * 10**6  # what Python takes while anything is converted; measured: 6.5 MB


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    random_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def largest(scaled: Path) -> int:
    """Bytes of the largest tensor, as stored."""
    return max(stored_bytes(*each) for each in shapes(MegatronCheckpoint(scaled / "checkpoint").args))


def check_peak(done: dict[str, float], bound: int, files: Iterable[Path]) -> None:
    assert sum(file.stat().st_size for file in files) > 6 * bound  # else a writer that holds a whole file would pass
    assert done["peak_bytes"] - done["start_bytes"] <= bound + SLACK_BYTES


@pytest.mark.parametrize(("dtype", "widening"), [("bfloat16", 1), ("float32", 2)])
def test_peak_memory_of_an_export(scaled: Path, largest: int, dtype: str, widening: int) -> None:
    """Three times the largest tensor, of the output's where they are the wider ones."""
    output = scaled / f"hf-{dtype}"
    words = ["--load", str(scaled / "checkpoint"), "--output", str(output), "--dtype", dtype, "--vocab-size", "4096"]
    check_peak(measure("export", *words), 3 * largest * widening, output.glob("*.safetensors"))


def test_peak_memory_of_an_import(scaled: Path, largest: int) -> None:
    hf = export(scaled / "checkpoint", scaled / "hf", vocab_size=4096, progress=False).output
    save = scaled / "imported"
    check_peak(measure("import", "--hf", str(hf), "--save", str(save)), 3 * largest, save.glob("*/*.distcp"))


def test_info_computes_the_bound(scaled: Path) -> None:
    checkpoint = describe(scaled / "checkpoint")["conversion"]
    assert checkpoint["largest_tensor_bytes"] == 768 * 6144 * 2
    assert checkpoint["peak_memory_bytes"] == 450 * 10**6 + 3 * 768 * 6144 * 2
    assert describe(scaled / "model.yaml")["conversion"]["peak_memory_bytes"] == checkpoint["peak_memory_bytes"]


class Tensors:
    """Entries of known values that count what is read and fail at one of them."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.read = fail, []

    def entries(self) -> list[Entry]:
        return [Entry(f"t{i}", (10, i + 1), torch.float32, lambda i=i: self.tensor(i)) for i in range(6)]

    def tensor(self, i: int) -> torch.Tensor:
        if f"t{i}" == self.fail:
            raise OSError("no space left on device")
        self.read.append(f"t{i}")
        return torch.arange(10.0 * (i + 1)).view(10, i + 1) + 1000 * i


LIMIT = 300  # bytes a file: t0+t1 (120), t2 (120), t3 (160), ... sizes are 40 (i + 1)
FILES = [["t0", "t1", "t2"], ["t3"], ["t4"], ["t5"]]


def convert(output: Path, tensors: Tensors, identity: str = "x", overwrite: bool = False, limit: int = LIMIT) -> None:
    with complete_folder(output, overwrite, identity) as folder:
        write_model(folder, tensors.entries(), limit, lambda _: None)
        (folder / "config.json").write_text("{}")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    convert(tmp_path / "whole", Tensors())
    return content(tmp_path / "whole")


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The output of a conversion that ended while it wrote the third file."""
    with pytest.raises(OSError, match="no space"):
        convert(tmp_path / "hf", Tensors(fail="t4"))
    assert not (tmp_path / "hf").exists()
    return tmp_path / "hf"


def test_finished_files_are_kept(stopped: Path, whole: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    again = Tensors()
    convert(stopped, again)
    assert "2 of 4 weight files kept" in caplog.text
    assert again.read == ["t4", "t5"]
    assert content(stopped) == whole
    assert not unfinished(stopped).exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "the end cut off": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_written_again(stopped: Path, whole: dict[str, bytes], kind: str) -> None:
    DAMAGE[kind](unfinished(stopped) / "model-00002-of-00004.safetensors")
    again = Tensors()
    convert(stopped, again)
    assert again.read == ["t3", "t4", "t5"]
    assert content(stopped) == whole


def test_another_input_or_shard_size_starts_anew(stopped: Path, tmp_path: Path) -> None:
    again = Tensors(fail="t5")
    with pytest.raises(OSError, match="no space"):
        convert(stopped, again, identity="y")
    assert again.read == ["t0", "t1", "t2", "t3", "t4"]
    other = Tensors()
    convert(stopped, other, identity="y", limit=10**6)
    assert other.read == [f"t{i}" for i in range(6)]
    assert sorted(content(stopped)) == ["config.json", "model.safetensors"]


def test_the_checkpoints_identity_follows_its_files(scaled: Path) -> None:
    before = MegatronCheckpoint(scaled / "checkpoint").identity
    assert MegatronCheckpoint(scaled / "checkpoint").identity == before
    (file,) = (scaled / "checkpoint").glob("iter_*/*.distcp")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert MegatronCheckpoint(scaled / "checkpoint").identity != before


def test_nothing_but_finished_weights_is_kept(stopped: Path, whole: dict[str, bytes]) -> None:
    """Such as the tokenizer that another command wanted, or a half-written record."""
    for name in ("tokenizer.json", ".finished.json.new", "model-00009-of-00009.safetensors"):
        (unfinished(stopped) / name).write_text("{}")
    (unfinished(stopped) / "folder").mkdir()
    (unfinished(stopped) / "folder" / "file").touch()
    again = Tensors()
    convert(stopped, again)
    assert again.read == ["t4", "t5"] and content(stopped) == whole


KILLED = """
import os, signal, sys
from pathlib import Path
from test_checkpoint_streaming import LIMIT, Tensors
from megatron_act.checkpoint.writer import complete_folder, write_model
tensors = Tensors()
def wrote(_):
    if "t4" in tensors.read:
        os.kill(os.getpid(), signal.SIGKILL)
with complete_folder(Path(sys.argv[1]), False, "x") as folder:
    write_model(folder, tensors.entries(), LIMIT, wrote)
"""


def test_a_killed_conversion_leaves_no_output_and_goes_on(tmp_path: Path, whole: dict[str, bytes]) -> None:
    output, path = tmp_path / "hf", os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(output)], env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert killed.returncode == -9 and not output.exists()
    assert (unfinished(output) / "model-00003-of-00004.safetensors.partial").exists()
    again = Tensors()
    convert(output, again)
    assert again.read == ["t4", "t5"]
    assert content(output) == whole


def test_nothing_stays_of_a_conversion_without_finished_files(tmp_path: Path) -> None:
    for fail, identity in (("t1", "x"), ("t5", "")):
        with pytest.raises(OSError, match="no space"):
            convert(tmp_path / "hf", Tensors(fail), identity)
        assert list(tmp_path.iterdir()) == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with complete_folder(tmp_path / "hf", False, "x") as folder:
        (folder / "mine").touch()
        with (
            pytest.raises(UserError, match="hf: expected to be its only writer"),
            complete_folder(tmp_path / "hf", False, "x"),
        ):
            pass
        assert (folder / "mine").exists()
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine"]


def test_a_stop_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "hf"
    convert(output, Tensors())
    before, rename = content(output), Path.rename

    def stops(path: Path, target: Path) -> Path:
        if path.name == ".hf.partial":
            raise OSError("stopped")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="stopped"):
        patch.setattr(Path, "rename", stops)
        convert(output, Tensors(), overwrite=True)
    assert not output.exists()
    with pytest.raises(OSError, match="no space"):
        convert(output, Tensors(fail="t0"), overwrite=True)
    assert content(output) == before


def test_everything_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = resume.fsync, Path.rename

    def records(path: Path) -> None:
        done.append(path.name)
        fsync(path)

    def names(path: Path, target: Path) -> Path:
        done.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(resume, "fsync", records)
    monkeypatch.setattr(Path, "rename", names)
    convert(tmp_path / "hf", Tensors())
    named = done.index(".hf.partial -> hf")
    assert set(done[:named]) >= {*content(tmp_path / "hf"), ".hf.partial"}
    assert done[named + 1] == tmp_path.name


@pytest.mark.parametrize(("size", "wanted"), [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), ("200KB", 200_000)])
def test_shard_sizes(size: str, wanted: int) -> None:
    assert shard_bytes(size) == wanted


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "0MB", "nanGB", "infGB", "5GiB", ""])
def test_wrong_shard_sizes(size: str) -> None:
    with pytest.raises(UserError, match="expected a size such as 5GB"):
        shard_bytes(size)


def test_files_and_index_are_those_of_transformers(tmp_path: Path) -> None:
    """The same tensors in the same order: the same files, index and values."""
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=100))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    state = model.state_dict()
    plan = [Entry(name, tuple(each.shape), each.dtype, lambda each=each: each) for name, each in state.items()]
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", plan, 20_000, lambda _: None)
    indexes = [json.loads((tmp_path / side / INDEX).read_text()) for side in ("ours", "theirs")]
    assert indexes[0] == indexes[1]
    files = set(indexes[0]["weight_map"].values())
    assert len(files) > 2 and list(shards(plan, 20_000)) == sorted(files)
    for file in files:
        ours, theirs = (load_file(tmp_path / side / file) for side in ("ours", "theirs"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
