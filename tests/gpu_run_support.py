"""A copy of the tree with a stand-in for python3, in which tests/gpu/run.sh runs without a GPU."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from megatron_act.benchmark.cases import Case, parse_shape

ROOT = Path(__file__).parents[1]
# Says yes to the question for a GPU, answers pytest and the benchmark itself, and is python for the rest.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *is_available*) exit 0 ;;
  "-m pytest "*)
    echo "pytest $*" >>"$LOG"
    echo '{"test": "tests/test_a.py::test_x", "outcome": "passed", "why": ""}' >>"$GPU_OUTCOMES"
    echo '{"test": "tests/test_a.py::test_y", "outcome": "'"${OUTCOME:-passed}"'", "why": "no GPU"}' >>"$GPU_OUTCOMES"
    exit "${TEST_CODE:-0}" ;;
  tools/benchmark_kernels.py*)
    echo "benchmark $*" >>"$LOG"
    [[ -n "${BROKEN_BENCHMARK:-}" ]] && exit 3
    mkdir -p "$5" && cp "$FIGURES" "$5/$3.json" && echo png >"$5/$3.png" ;;
  tests/gpu/te_engine.py*"${ENGINE:-real}"*) # the step that goes wrong
    [[ "$2" == build ]] && echo $$ >"$LOG.build" && exec sleep 600
    echo "tests/gpu/run.sh: te: $2 went wrong" >&2
    exit 2 ;;
  tests/gpu/te_engine.py*)
    [[ -n "${ENGINE:-}" ]] || PYTHONPATH="${BLOCKED:-}:${PYTHONPATH:-}" exec "$REAL_PYTHON" "$@"
    [[ "$2" == build ]] || echo "te_engine ${*:2}" >>"$LOG" ;;
  *) PYTHONPATH="${BLOCKED:-}:${PYTHONPATH:-}" exec "$REAL_PYTHON" "$@" ;;
esac
"""
BLOCKED = "import sys\nsys.modules.update(dict.fromkeys(['pytest_timeout', 'kiwisolver']))\n"


def row(activation: str, shape: str, op: str, percent: float) -> dict:
    times = {"median_us": 123.4, "p20_us": 120.0, "p80_us": 130.0, "method": "graph"}
    case = Case(activation, parse_shape(shape), torch.bfloat16, (op,))
    return {
        "op": op, "activation": activation, "shape": shape, "dtype": "bfloat16",
        "bytes_per_element": case.bytes_per_element(op), **times, "gb_per_s": 2800.0, "percent_of_copy": percent,
        "others": {"torch.compile": {**times, "over_ours": 1.25}},
    }  # fmt: skip


def figures() -> dict:
    rows = [row("xielu", "4096x21504", "forward", 91.0), row("xielu", "4096x21504", "backward", 88.0)]
    rows += [row("xielu", "4096x10752", op, 55.5) for op in ("forward", "backward")]
    rows += [row("xielu", "1x21504", "forward", 3.0), row("gelu", "4096x21504", "forward", 93.0)]
    header = {"GPU": "Some GPU", "torch": "2.11.0", "copy": "3,000.0 GB/s", "compared with": "torch.compile"}
    return {"header": header, "rows": rows, "mlp": [], "notes": []}


def make_tree(tmp_path: Path) -> Path:
    """A tree of its own, so that the results of this one are not touched."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(STAND_IN)
    (tmp_path / "bin" / "python3").chmod(0o755)
    (tmp_path / "figures.json").write_text(json.dumps(figures()))
    tree = tmp_path / "tree"
    (tree / "tests").mkdir(parents=True)
    for name in ("megatron_act", "tools", "tests/gpu"):
        (tree / name).symlink_to(ROOT / name)
    (tree / "tests" / "gpu").unlink()
    (tree / "tests" / "gpu").mkdir()
    for path in (ROOT / "tests" / "gpu").iterdir():
        if path.is_file():
            (tree / "tests" / "gpu" / path.name).write_bytes(path.read_bytes())
    for name in ("test_kernels_a.py", "test_kernels_compile.py"):
        (tree / "tests" / name).touch()
    return tree


def run(tree: Path, *words: str, python: str = "stand-in", **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{tree.parent / 'bin'}:{os.environ['PATH']}" if python == "stand-in" else python
    given = {
        "REAL_PYTHON": sys.executable,
        "LOG": str(tree.parent / "log"),
        "FIGURES": str(tree.parent / "figures.json"),
    }
    whole = {**os.environ, **given, "PATH": path, **env}
    whole.pop("WHEELS", None) if "WHEELS" not in env else None
    command = ["bash", str(tree / "tests" / "gpu" / "run.sh"), *words]
    return subprocess.run(command, env=whole, text=True, capture_output=True, timeout=400, check=False)


def results(tree: Path) -> dict:
    return json.loads((tree / "tests" / "gpu_results.json").read_text())


def make_wheel(folder: Path, name: str, version: str = "9.9", file: str = "") -> None:
    """A wheel with one module, ``name`` or ``file``, that requires what there is not."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(file or f"{name}.py", "MINE = True\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: absent\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
