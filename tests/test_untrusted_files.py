"""Files that are not ours run no code: checkpoints, and what our own sources may call."""

import ast
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_act.checkpoint import restricted
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.checkpoint.safe_pickle import load_plain
from megatron_act.errors import UserError
from megatron_act.fallback_load import damage

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("megatron_act", "tools") for path in (ROOT / folder).rglob("*.py"))

# What can run code that a file brings along, and the places that may use it, each for a reason.
FORBIDDEN = {
    "pickle.load": "unpickles anything: checkpoint.restricted, checkpoint.safe_pickle",
    "pickle.loads": "unpickles anything",
    "pickle.Unpickler": "unpickles anything",
    "dill.load": "unpickles anything",
    "dill.loads": "unpickles anything",
    "joblib.load": "unpickles anything",
    "shelve.open": "unpickles anything",
    "marshal.loads": "loads code",
    "pandas.read_pickle": "unpickles anything",
    "yaml.load": "builds any object: yaml.safe_load",
    "yaml.unsafe_load": "builds any object: yaml.safe_load",
    "yaml.full_load": "builds many objects: yaml.safe_load",
    "yaml.load_all": "builds any object: yaml.safe_load_all",
    "eval": "runs text",
    "exec": "runs text",
    "os.system": "a shell: subprocess with a list",
    "os.popen": "a shell: subprocess with a list",
    "torch.hub.load": "runs a repository's code",
    "runpy.run_path": "runs a file",
    "FileSystemReader.read_metadata": "unpickles anything: checkpoint.restricted.read_metadata",
}
ALLOWED = {
    ("megatron_act/checkpoint/restricted.py", "pickle.Unpickler"),  # of a few types only
    ("megatron_act/checkpoint/restricted.py", "torch.load without weights_only"),  # torch's default, True
    ("megatron_act/data/dali_worker.py", "pickle.loads"),  # from its parent, through a pipe
}


def called(source: str) -> list[tuple[str, ast.Call | ast.ClassDef]]:
    """Dotted names of what a source calls or derives a class from, with imported names resolved."""
    tree = ast.parse(source)
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found: list[tuple[str, ast.Call | ast.ClassDef]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.append((_dotted(node.func, known), node))
        elif isinstance(node, ast.ClassDef):
            found += [(_dotted(base, known), node) for base in node.bases]
    return found


def _dotted(node: ast.expr, known: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, known)}.{node.attr}"
    if isinstance(node, ast.Call):
        return _dotted(node.func, known)
    return "?"


def problems(source: str) -> list[str]:
    """What a source must not call, by name, and keywords that open a door."""
    found = []
    for name, node in called(source):
        found += [wrong for wrong in FORBIDDEN if name == wrong or (name.endswith(f".{wrong}") and "." in wrong)]
        words = {word.arg: word.value for word in node.keywords} if isinstance(node, ast.Call) else {}
        found += [f"{name} {word}" for word in ("shell", "allow_pickle", "trust_remote_code") if _is(words, word, True)]
        if name == "torch.load" and not _is(words, "weights_only", True):
            found.append("torch.load without weights_only")
    return found


def _is(words: dict[str | None, ast.expr], name: str, value: object) -> bool:
    word = words.get(name)
    return isinstance(word, ast.Constant) and word.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_our_sources_call_nothing_that_runs_a_files_code(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert [wrong for wrong in problems(path.read_text()) if (name, wrong) not in ALLOWED] == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("import pickle\npickle.load(f)", "pickle.load"),
        ("from pickle import loads as read\nread(b)", "pickle.loads"),
        ("import pickle\nclass U(pickle.Unpickler): pass", "pickle.Unpickler"),
        ("import yaml\nyaml.load(t, Loader=yaml.Loader)", "yaml.load"),
        ("import torch\ntorch.load(f)", "torch.load without weights_only"),
        ("import torch as t\nt.load(f, weights_only=False)", "torch.load without weights_only"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "numpy.load allow_pickle"),
        ("import subprocess\nsubprocess.run(w, shell=True)", "subprocess.run shell"),
        ("Auto.from_pretrained(p, trust_remote_code=True)", "Auto.from_pretrained trust_remote_code"),
        ("eval(t)", "eval"),
        (
            "from torch.distributed.checkpoint import FileSystemReader as R\nR(p).read_metadata()",
            "FileSystemReader.read_metadata",
        ),
    ],
)
def test_and_such_a_call_would_be_seen(source: str, wrong: str) -> None:
    assert problems(source) == [wrong]
    assert problems("import yaml, numpy as np\nmodel.eval(); yaml.safe_load(t); np.load(f, allow_pickle=False)") == []


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with a tensor and a value, and the files that make it complete."""
    folder = tmp_path / "iter_0000001"
    dcp.save({"weight": torch.arange(4.0), "value": {"a": 1}}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((dcp.FileSystemReader, "read_metadata"), (dcp.DefaultLoadPlanner, "load_bytes")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    restricted.install()


def test_metadata_is_read_as_torch_reads_it(saved: Path) -> None:
    theirs = dcp.FileSystemReader(saved).read_metadata()
    ours = restricted.read_metadata(saved)
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data


def test_metadata_that_would_run_code_is_refused(saved: Path, tmp_path: Path, installed: None) -> None:
    mark = tmp_path / "mark"
    (saved / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    assert damage(saved) == ".metadata is missing or broken"
    with pytest.raises(UserError, match="mkdir does not belong into a checkpoint's metadata"):
        MegatronCheckpoint(saved)
    with pytest.raises(UserError, match="expected a checkpoint of plain values, got one that needs code to run"):
        dcp.FileSystemReader(saved).read_metadata()
    assert not mark.exists()
    pickle.loads((saved / ".metadata").read_bytes())
    assert mark.exists()  # and it would have


@pytest.mark.parametrize("name", ["os.system", "_MetadataUnpickler", "pickle", "load"])
def test_names_that_only_lead_to_code_are_refused(saved: Path, name: str) -> None:
    module = "torch.distributed.checkpoint.filesystem"
    (saved / ".metadata").write_bytes(
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93."
    )
    with pytest.raises((pickle.UnpicklingError, AttributeError)):
        restricted.read_metadata(saved)


def test_a_value_that_would_run_code_is_refused(
    tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Megatron loads random states."""
    mark, folder = tmp_path / "mark", tmp_path / "evil"
    dcp.save({"rng_state": Evil(mark), "plain": {"a": 1}}, checkpoint_id=folder, no_dist=True)
    plain: dict = {"plain": {"a": 0}}
    dcp.load(plain, checkpoint_id=folder, no_dist=True)
    assert plain == {"plain": {"a": 1}}
    with pytest.raises(
        dcp.CheckpointException, match=r"rng_state: expected a .* code to run \(posix.mkdir\): do not load"
    ):
        dcp.load({"rng_state": None}, checkpoint_id=folder, no_dist=True)
    assert not mark.exists()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.warns(UserWarning, match="WEIGHTS_ONLY"), pytest.raises(dcp.CheckpointException, match="File exists"):
        dcp.load({"rng_state": None}, checkpoint_id=folder, no_dist=True)
    assert mark.exists()


def test_saved_arguments_run_no_code(tmp_path: Path) -> None:
    buffer, mark = io.BytesIO(), tmp_path / "mark"
    torch.save({"args": Evil(mark)}, buffer)
    buffer.seek(0)
    with pytest.raises(UserError):
        load_plain(buffer)
    assert not mark.exists()
