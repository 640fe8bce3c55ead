"""Wheels in parts: cut, laid down by several calls, joined once; and the list of names for pip."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_run_support import ROOT

sys.path.insert(0, str(ROOT / "tests" / "gpu"))  # as run.sh has it
archives = importlib.import_module("archives")

NAME = "transformer_engine_cu13-2.20.2-py3-none-any.whl"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything is relative to the working folder; ``given`` is WHEELS."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    monkeypatch.setenv("WHEELS", "given")
    return tmp_path


@pytest.fixture
def parts(folders: Path) -> dict[str, bytes]:
    """A wheel of 2.5 MiB as three parts and their list, by name; the folder holds none of them."""
    (folders / NAME).write_bytes(bytes(range(256)) * (10 << 10))
    written = archives.split(folders / NAME, MIB)
    found = {path.name: path.read_bytes() for path in written}
    assert [len(content) for content in found.values()][:3] == [MIB, MIB, MIB // 2]
    assert list(found) == [*(f"{NAME}.part-0{index}" for index in range(3)), f"{NAME}.parts"]
    for path in written:
        path.unlink()
    return found


def lay(parts: dict[str, bytes], *names: str) -> list[Path]:
    """One call that finds these parts and no others."""
    for path in Path("given").iterdir():
        path.unlink()
    for name in names:
        (Path("given") / f"{NAME}.{name}").write_bytes(parts[f"{NAME}.{name}"])
    return archives.join_all(Path("given"), archives.CACHE)


def kept() -> list[str]:
    return sorted(path.name.removeprefix(NAME) for path in archives.CACHE.iterdir())


def test_parts_of_several_calls_are_joined_once(parts):
    with pytest.raises(LookupError, match=r"expected 3 parts, got 1 \(missing 00 02\): copy these"):
        lay(parts, "parts", "part-01")
    with pytest.raises(LookupError, match=r"expected 3 parts, got 2 \(missing 00\)"):
        lay(parts, "part-02")
    assert kept() == [".part-01", ".part-02", ".parts"]
    (whole,) = lay(parts, "part-00")
    assert whole.read_bytes() == Path(NAME).read_bytes() and kept() == ["", ".parts"]
    first = whole.stat().st_mtime_ns
    assert lay(parts, "parts", "part-00") == [] and whole.stat().st_mtime_ns == first and kept() == ["", ".parts"]


def test_a_damaged_part_is_named_and_not_kept(parts):
    whole = {**parts, f"{NAME}.part-01": parts[f"{NAME}.part-01"][:-1] + b"?"}
    with pytest.raises(LookupError, match=r"got 1 \(damaged 01, missing 02\)"):
        lay(whole, "parts", "part-00", "part-01")
    assert kept() == [".part-00", ".parts"]
    (path,) = lay(parts, "part-01", "part-02")
    assert path.read_bytes() == Path(NAME).read_bytes()


def test_a_part_that_is_damaged_in_the_cache_is_asked_for_again(parts):
    with pytest.raises(LookupError, match="missing"):
        lay(parts, "parts", "part-00", "part-01")
    (archives.CACHE / f"{NAME}.part-00").write_bytes(b"half")
    with pytest.raises(LookupError, match=r"got 2 \(missing 00\)"):
        lay(parts, "part-02")
    assert [path.name for path in lay(parts, "part-00")] == [NAME]


def test_an_interrupted_join_is_begun_again(parts, monkeypatch):
    def interrupted(paths, into):
        into.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archives, "_concatenate", interrupted)
        lay(parts, "parts", "part-00", "part-01", "part-02")
    assert not (archives.CACHE / NAME).exists()
    (path,) = lay(parts, "parts", "part-00", "part-01", "part-02")
    assert path.read_bytes() == Path(NAME).read_bytes() and kept() == ["", ".parts"]


def test_what_is_not_the_whole_is_refused(parts):
    manifest = json.loads(parts[f"{NAME}.parts"]) | {"sha256": "0" * 64}
    with pytest.raises(LookupError, match=f"{NAME}: expected sha256 0000"):
        lay({**parts, f"{NAME}.parts": json.dumps(manifest).encode()}, "parts", "part-00", "part-01", "part-02")
    assert kept() == [".parts"]


def test_parts_without_their_list_and_lists_without_sense(parts):
    with pytest.raises(LookupError, match=rf"expected {NAME}.parts beside its parts, got none"):
        lay(parts, "part-00")
    with pytest.raises(LookupError, match="expected a manifest of --split"):
        lay({f"{NAME}.parts": b"[1]"}, "parts")


def command(*words: str) -> subprocess.CompletedProcess[str]:
    path = ROOT / "tests" / "gpu" / "wheels.py"
    return subprocess.run([sys.executable, path, *words], text=True, capture_output=True, check=False, timeout=60)


def test_the_two_commands(folders):
    content = os.urandom(MIB + 1)
    (folders / "given" / NAME).write_bytes(content)
    done = command("--split", f"given/{NAME}", "--part-mib", "1")
    assert done.stdout.split() == [f"given/{NAME}.{end}" for end in ("part-00", "part-01", "parts")], done.stderr
    (folders / "given" / NAME).unlink()
    (folders / "given" / f"{NAME}.part-01").rename(folders / "last")
    done = command("--join")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "got 1 (missing 01)" in done.stderr
    (folders / "last").rename(folders / "given" / f"{NAME}.part-01")
    done = command("--join")
    assert (done.returncode, done.stdout) == (0, f".gpu/wheels/{NAME}\n")
    assert (folders / ".gpu" / "wheels" / NAME).read_bytes() == content
    for words in (["--split", "no.whl"], ["--split", f".gpu/wheels/{NAME}", "--part-mib", "0"]):
        assert command(*words).returncode == 2


def test_the_list_for_pip_has_what_each_part_needs():
    assert set(command("--list", "te-bits", "--cuda", "12").stdout.split()) >= {
        "transformer-engine==2.20.2", "transformer-engine-cu12==2.20.2", "megatron-core==0.19.2", "onnxscript",
    }  # fmt: skip
    assert "transformer-engine" not in command("--list", "kernels", "benchmark").stdout
    assert "transformer-engine-cu13==2.20.2" in command("--list").stdout
