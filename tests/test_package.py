"""The wheel: built from a copy of the tree, installed elsewhere, it imports and trains without the tree."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", "quickstart"
)


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    whole = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", **env}
    return subprocess.run(command, cwd=cwd, env=whole, text=True, capture_output=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree") / "project"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=LEFT_OUT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    done = run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(tree / "dist"), str(tree), cwd=tree)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tree / "dist").glob("megatron_act-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    done = run(*pip, "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def test_the_wheel_holds_every_module_and_no_top_level_kernels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_act").rglob("*.py")}
    ours |= {f"megatron_act/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert sorted(ours - names) == []
    assert {"megatron_act/data/wiki_leads.parquet", "megatron_act/data/wiki_leads.ATTRIBUTION.md"} <= names
    assert [name for name in names if not name.startswith(("megatron_act/", "megatron_act-"))] == []


def test_it_trains_one_step_from_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    where = run(
        sys.executable,
        "-c",
        "import megatron_act; print(megatron_act.__file__)",
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert where.stdout.strip() == str(installed / "megatron_act" / "__init__.py")
    model = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 96 --num-attention-heads 4 --seq-length 32 --lr 1e-3"
    rest = (
        "--max-position-embeddings 32 --micro-batch-size 2 --train-iters 1 --eval-iters 0 --mock-data --log-interval 1"
    )
    tokens = "--tokenizer-type NullTokenizer --vocab-size 127"
    words = [*model.split(), *rest.split(), *tokens.split(), "--eval-interval", "10", "--activation", "crrelu", "--cpu"]
    done = run(sys.executable, "-m", "megatron_act.pretrain_gpt", *words, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "crrelu in 2 layers" in done.stdout
    (loss,) = re.findall(r"iteration +1/ +1 .*lm loss: (\S+)", done.stdout)
    assert 4.0 < float(loss) < 6.0  # ln 128 = 4.85


def test_importing_the_package_loads_neither_megatron_nor_torch() -> None:
    code = "import sys, megatron_act; print(sorted({'torch', 'megatron', 'triton'} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=ROOT).stdout.strip() == "[]"


def test_every_requirement_has_a_reason() -> None:
    lines = [line.strip() for line in (ROOT / "setup.py").read_text().splitlines()]
    is_requirement = re.compile(r'^(?:"(?:te|dali)": \[)?"[A-Za-z][\w.-]*(\[\w+\])?([<>=!]=?[^"]*)?"[,\]]')
    found = [i for i, line in enumerate(lines) if is_requirement.match(line) and not line.startswith('"megatron_act')]
    assert len(found) > 20
    assert [lines[i] for i in found if "#" not in lines[i] and not lines[i - 1].startswith("#")] == []
