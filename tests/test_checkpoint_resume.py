"""An interrupted import goes on with the same command: killed at every step, stopped by Ctrl-C, another source."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_kills import FILE_BYTES, content
from checkpoint_support import altered, random_model

from megatron_act.checkpoint import import_hf, torch_dist
from megatron_act.checkpoint.import_plan import Swapped
from megatron_act.checkpoint.resume import unfinished

ROOT = Path(__file__).parents[1]
FILES = [f"__0_{number}.distcp" for number in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model("apertus", tmp_path_factory.mktemp("resume") / "hf", num_hidden_layers=1)


def test_killed_at_every_step(model: Path, tmp_path: Path) -> None:
    """Never a folder that looks whole; the same command writes what was not finished, and nothing else."""
    (tmp_path / "runs").mkdir()
    program = [sys.executable, "-W", "error", ROOT / "tests" / "checkpoint_kills.py", model, tmp_path / "runs"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["step"] for each in kills} >= {"torch.save", "fsync", "replace", "rename", "write_text", "write_bytes"}
    assert len(kills) > 40 and [each["published"] for each in kills].count(True) == 1
    for each in kills:
        assert each["signal"] == 9 and each["again"] == 0 and each["same"] and not each["left"], each
        if not each["published"]:
            assert each["finished"] + each["wrote"] == FILES, each
    assert {len(each["finished"]) for each in kills} == {0, 1, 2, 3, 4}


class Imports:
    """Imports without Megatron's parser, in files of a few tensors; ``wrote`` has the files that the last one began."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.wrote: list[str] = []
        self.stop: tuple[str, BaseException] | None = None
        patch.setattr(import_hf, "common_state", lambda words: b"common")
        patch.setattr(torch_dist, "FILE_BYTES", FILE_BYTES)
        write_file = torch_dist.write_file

        def write(path: Path, *words: Any) -> Any:
            self.wrote.append(path.name)
            if self.stop and path.name == self.stop[0]:
                raise self.stop[1]
            return write_file(path, *words)

        patch.setattr(torch_dist, "write_file", write)

    def __call__(self, hf: Path, save: Path, **options: Any) -> dict[str, bytes]:
        self.wrote.clear()
        return content(import_hf.import_model(hf, save, progress=False, **options).save)

    def stopped(self, hf: Path, save: Path, error: BaseException) -> None:
        """Imports until the third file."""
        self.stop = (FILES[2], error)
        with pytest.raises(type(error)):
            self(hf, save)
        self.stop = None
        assert not save.exists() and unfinished(save).is_dir()


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Imports:
    return Imports(monkeypatch)


def test_ctrl_c(model: Path, tmp_path: Path, imports: Imports, caplog: pytest.LogCaptureFixture) -> None:
    whole = imports(model, tmp_path / "whole")
    assert imports.wrote == FILES and not caplog.records
    imports.stopped(model, tmp_path / "save", KeyboardInterrupt())
    assert imports(model, tmp_path / "save") == whole
    assert imports.wrote == FILES[2:] and "2 of 4 weight files kept" in caplog.text


def test_damaged_files_are_written_again(model: Path, tmp_path: Path, imports: Imports) -> None:
    whole = imports(model, tmp_path / "whole")
    imports.stopped(model, tmp_path / "save", OSError("no space left on device"))
    file = unfinished(tmp_path / "save") / "release" / FILES[1]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert imports(model, tmp_path / "save") == whole
    assert imports.wrote == FILES[1:]


def other_weights(model: Path, folder: Path) -> Path:
    return altered(model, folder, lambda tensors: tensors["model.norm.weight"].mul_(2))


def touched(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    os.utime(folder / "model.safetensors", ns=(0, 1))
    return folder


def other_config(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rms_norm_eps": 0.001', '"rms_norm_eps": 0.002'))
    assert (folder / "config.json").read_text() != text
    return folder


SWAPPED = Swapped("crrelu", [{"eps": 0.25}])
SOURCES: dict[str, Callable[[Path, Path], Path]] = {
    "other weights": other_weights,
    "other times": touched,
    "other config": other_config,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "other dtype": {"dtype": "bfloat16"},
    "other padding": {"divisible_by": 64, "tensor_parallel": 4},
    "other activation": {"swapped": SWAPPED},
}


@pytest.mark.parametrize("name", [*SOURCES, *OPTIONS])
def test_another_source_or_option_starts_anew(model: Path, tmp_path: Path, imports: Imports, name: str) -> None:
    """Nothing that was made of something else is in the result."""
    imports.stopped(model, tmp_path / "save", OSError("no space left on device"))
    source = SOURCES[name](model, tmp_path / "other") if name in SOURCES else model
    options = OPTIONS.get(name, {})
    result = imports(source, tmp_path / "save", **options)
    assert imports.wrote[:2] == FILES[:2]
    assert result == imports(source, tmp_path / "whole", **options)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_other_fitted_scalars_start_anew(model: Path, tmp_path: Path, imports: Imports) -> None:
    imports.stop = (FILES[2], OSError())
    with pytest.raises(OSError):
        imports(model, tmp_path / "save", swapped=SWAPPED)
    imports.stop = None
    imports(model, tmp_path / "save", swapped=Swapped("crrelu", [{"eps": 0.5}]))
    assert imports.wrote[:2] == FILES[:2]
