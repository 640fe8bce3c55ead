"""A new activation is one small file: it is put into a copy of the project, where everything must know it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = '''"""PReLU: f = x for x > 0, alpha x otherwise."""

import torch
import triton
import triton.language as tl

from megatron_act.kernels.spec import Activation, Param


@triton.jit
def prelu_fwd(x, p):
    return tl.where(x > 0, x, p[0] * x)


@triton.jit
def prelu_bwd(x, g, p):
    return g * tl.where(x > 0, 1.0, p[0]), (g * tl.minimum(x, 0.0),)


def torch_fwd(x, alpha):
    return torch.where(x > 0, x, alpha * x)


def torch_bwd(x, g, alpha):
    return torch.where(x > 0, g, alpha * g), (g * x.clamp(max=0.0),)


ACTIVATIONS = (Activation("prelu", (Param("alpha", 0.25),), prelu_fwd, prelu_bwd, torch_fwd, torch_bwd),)
'''
TESTS = ["backends", "contract", "precision", "gated", "benchmark"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    for folder in ("megatron_act", "kernels", "tests", "tools"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "kernels" / "prelu.py").write_text(FILE)
    return root


def run(project: Path, *words: str) -> str:
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(project), inherited])}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_kernel_tests_cover_it_unedited(project: Path) -> None:
    files = [f"tests/test_kernels_{name}.py" for name in TESTS]
    out = run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "prelu and not xiprelu", *files)
    passed = int(out.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= 25, out


def test_it_compiles_for_a_gpu_within_the_budget(project: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from kernel_aot import figures\n"
        "for kind in ('fwd', 'bwd'):\n"
        "    found = figures('prelu', kind, 'bf16', 90)\n"
        "    assert found['per_element'] < 25 and found['data_loads'] == ['LDG.E.128'], found\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(project), "TRITON_CACHE_DIR": str(project / "cache")}
    subprocess.run([sys.executable, "-c", program], cwd=project, env=environment, check=True)


def test_flags_specs_and_tools_know_it(project: Path) -> None:
    assert "prelu" in run(project, "-m", "megatron_act.pretrain_gpt", "--cpu", "--help")
    program = "from megatron_act import cpu_backend; cpu_backend.install()\nfrom megatron_act import specs\n"
    assert "prelu" in run(project, "-c", program + "print(specs.prelu.__doc__)")
    arguments = (
        "--hidden-size 64 --num-layers 2 --num-attention-heads 4 --baseline swiglu --baseline-ffn-hidden-size 128"
    )
    out = run(project, "tools/compute_match.py", *arguments.split(), "--activation", "prelu")
    assert "192" in out
