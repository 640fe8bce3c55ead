"""A model folder's own code runs by --trust-remote-code alone: no command asks, none runs what a folder brings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_support import LAYERS, random_model

from megatron_act.checkpoint.export import export
from megatron_act.checkpoint.import_flags import open_source
from megatron_act.checkpoint.import_hf import import_model
from megatron_act.checkpoint.swap import sampled
from megatron_act.checkpoint.tokenizer import read_tokenizer
from megatron_act.data.bpe import train_bpe
from megatron_act.errors import UserError

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
ROWS = 320


def convert(*words: object) -> subprocess.CompletedProcess:
    """The command in its own process, whose user would answer any question with yes."""
    command = [sys.executable, str(TOOL), *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, input="y\n" * 9, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint``, and ``hf``: its export with our modelling file and a tokenizer."""
    base = tmp_path_factory.mktemp("trust")
    model = random_model("megatron_act", base / "model", activation="crrelu", vocab_size=ROWS)
    import_model(model, base / "checkpoint", progress=False)
    train_bpe(["A whole number is even if two divides it."] * 20, 280, base / "words")
    export(base / "checkpoint", base / "hf", tokenizer=base / "words", progress=False)
    return base


@pytest.fixture
def evil(base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of ``hf`` whose every Python file would make another one, and that one."""
    folder, mark = tmp_path / "evil", tmp_path / "mark"
    shutil.copytree(base / "hf", folder)
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(mark)!r}, 'w')\n{file.read_text()}")
    return folder, mark


def test_verify_prints_json_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("A number is even if two divides it.")
    words = ["--load", base / "checkpoint", "--hf", base / "hf", "--text", tmp_path / "text", "--generate", 2]
    done = convert("verify", *words, "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["equal"] is True and content["vocab_size"] == ROWS


def test_a_tokenizer_folders_code_is_not_run_by_export(base: Path, evil: tuple[Path, Path], tmp_path: Path) -> None:
    folder, mark = evil
    done = convert("export", "--load", base / "checkpoint", "--output", tmp_path / "hf", "--tokenizer", folder)
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout and done.stdout.endswith(f"vocabulary {ROWS}\n")
    assert not mark.exists()
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (base / "words" / "tokenizer.json").read_bytes()


def test_nor_by_a_fit(base: Path, evil: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder, mark = evil
    assert len(sampled(open_source(folder), "two divides it")) == LAYERS
    assert not mark.exists()


def test_a_tokenizer_that_is_code_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    shutil.copytree(base / "words", tmp_path / "words")
    (tmp_path / "words" / "mine.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Mine: pass\n")
    file = tmp_path / "words" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {
        "tokenizer_class": "Mine",
        "auto_map": {"AutoTokenizer": ["mine.Mine"] * 2},
    }
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="expected tokenizer files that transformers reads without code of the folder"):
        read_tokenizer(tmp_path / "words")
    assert not (tmp_path / "mark").exists()
