"""tests/gpu/run.sh without a GPU: what it refuses, and with a stand-in for python3 what it runs, merges and returns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_run_support import BLOCKED, ROOT, figures, make_tree, make_wheel, results, run

from megatron_act import fp8_bytes
from megatron_act.benchmark import readme
from megatron_act.errors import UserError


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return make_tree(tmp_path)


def test_help_needs_nothing(copy):
    done = run(copy, "--help", python="/usr/bin:/bin")
    assert done.returncode == 0
    assert (
        "--only PART" in done.stdout and "pip download --dest wheels" in done.stdout and "set -euo" not in done.stdout
    )


@pytest.mark.parametrize(
    ("words", "part"), [(["--only", "all"], "got 'all'"), (["--only"], "got ''"), (["kernels"], "got 'kernels'")]
)
def test_words_that_it_does_not_know(copy, words, part):
    done = run(copy, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert part in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="no GPU is what it tests")
def test_a_machine_without_a_gpu_is_refused(copy):
    (copy.parent / "bin" / "python3").unlink()
    (copy.parent / "bin" / "python3").symlink_to(sys.executable)  # a real one
    done = run(copy)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "expected a python3 with torch, Triton and an NVIDIA GPU, got none" in done.stderr
    assert not (copy / ".gpu").exists()


def test_missing_packages_are_named_before_anything_runs(copy):
    (copy.parent / "blocked").mkdir()
    (copy.parent / "blocked" / "sitecustomize.py").write_text(BLOCKED)
    blocked = {"BLOCKED": str(copy.parent / "blocked")}
    without = run(copy, **blocked)
    assert (without.returncode, without.stderr.count("\n")) == (2, 1)
    assert "expected kiwisolver, pytest-timeout in python3, got none: set WHEELS" in without.stderr
    (copy.parent / "wheels").mkdir()
    (copy.parent / "wheels" / "kiwisolver-1.4-py3-none-any.whl").touch()
    empty = run(copy, WHEELS=str(copy.parent / "wheels"), **blocked)
    assert empty.returncode == 2 and f"expected wheels of pytest-timeout in {copy.parent}" in empty.stderr
    assert not (copy.parent / "log").exists()


def test_wheels_are_installed_beside_python_and_without_their_dependencies(copy):
    (copy.parent / "blocked").mkdir()
    (copy.parent / "blocked" / "sitecustomize.py").write_text(BLOCKED)
    (copy.parent / "wheels").mkdir()
    for module in ("pytest_timeout", "kiwisolver"):
        make_wheel(copy.parent / "wheels", module)
    done = run(copy, "--only", "kernels", WHEELS=str(copy.parent / "wheels"), BLOCKED=str(copy.parent / "blocked"))
    assert done.returncode == 0, done.stderr
    assert (copy / ".gpu" / "site" / "pytest_timeout.py").read_text() == "MINE = True\n"


def test_a_wheel_of_another_python_is_one_line(copy):
    (copy.parent / "blocked").mkdir()
    (copy.parent / "blocked" / "sitecustomize.py").write_text(BLOCKED)
    (copy.parent / "wheels").mkdir()
    make_wheel(copy.parent / "wheels", "kiwisolver")
    (copy.parent / "wheels" / "pytest_timeout-2.0-cp27-cp27m-win32.whl").touch()
    done = run(copy, "--only", "kernels", WHEELS=str(copy.parent / "wheels"), BLOCKED=str(copy.parent / "blocked"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip cannot install" in done.stderr and "pytest-timeout" in done.stderr


def test_all_parts_in_one_file(copy):
    done = run(copy, COMMIT="abc123", OUTCOME="skipped")
    assert done.returncode == 0, done.stderr
    found = results(copy)
    assert sorted(found) == ["benchmark", "kernels", "training"]
    for part in found.values():
        assert (part["command"], part["commit"], part["exit_code"]) == ("bash tests/gpu/run.sh", "abc123", 0)
        assert part["torch"] == torch.__version__ and part["date"].endswith("UTC")
    assert found["kernels"]["tests"] == {
        "passed": ["tests/test_a.py::test_x"], "failed": {}, "skipped": {"tests/test_a.py::test_y": "no GPU"},
    }  # fmt: skip
    assert found["training"]["tests"]["passed"] == []  # nothing outside the kernels is marked here
    assert found["benchmark"]["figures"] == figures()
    assert (copy / "tests" / "gpu_results.png").read_text() == "png\n"
    first, second = (copy.parent / "log").read_text().splitlines()
    assert "tests/test_kernels_a.py" in first and "compile" not in first
    assert "--minutes" in second


def test_files_with_marked_tests_are_the_training_part(copy):
    (copy / "tests" / "training").mkdir()
    (copy / "tests" / "training" / "test_b.py").write_text("@pytest.mark.gpu\n")
    (copy / "tests" / "training" / "test_c.py").write_text("\n")
    assert run(copy, "--only", "training").returncode == 0
    (line,) = (copy.parent / "log").read_text().splitlines()
    assert line.endswith("-m gpu tests/training/test_b.py")
    assert results(copy)["training"]["command"] == "bash tests/gpu/run.sh --only training"


def test_parts_merge_and_a_failed_one_stops_no_other(copy):
    assert run(copy, "--only", "benchmark").returncode == 0
    before = results(copy)["benchmark"]
    done = run(copy, TEST_CODE="1", OUTCOME="failed", BROKEN_BENCHMARK="1")
    assert done.returncode == 1
    assert "kernels failed (exit code 1)" in done.stderr and "benchmark failed (exit code 3)" in done.stderr
    found = results(copy)
    assert found["benchmark"] == before  # an earlier run's figures, with their own date
    assert found["kernels"]["tests"]["failed"] == {"tests/test_a.py::test_y": "no GPU"}
    assert (found["kernels"]["exit_code"], found["training"]["exit_code"]) == (1, 0)
    assert run(copy, "--only", "kernels").returncode == 0
    assert results(copy)["kernels"]["tests"]["failed"] == {}


def test_no_test_selected_is_no_failure(copy):
    assert run(copy, "--only", "kernels", TEST_CODE="5").returncode == 0


def test_without_a_checkout_the_commit_is_unknown(copy):
    for name in ("megatron_act", "tools"):
        (copy / name).unlink()
    (copy / "megatron_act").mkdir()
    for path in (ROOT / "megatron_act").iterdir():
        if path.name != "experiment":
            (copy / "megatron_act" / path.name).symlink_to(path)
    (copy / "megatron_act" / "experiment").mkdir()
    for path in (ROOT / "megatron_act" / "experiment").glob("*.py"):
        (copy / "megatron_act" / "experiment" / path.name).write_bytes(path.read_bytes())
    assert run(copy, "--only", "training").returncode == 0
    assert results(copy)["training"]["commit"] == "unknown"


def test_a_broken_result_file_is_not_overwritten(copy):
    (copy / "tests" / "gpu_results.json").write_text("{")
    done = run(copy)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "expected the JSON of earlier parts" in done.stderr and not (copy.parent / "log").exists()
    assert (copy / "tests" / "gpu_results.json").read_text() == "{"


def test_outcomes_are_written_one_by_one(tmp_path):
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_skipped(): pass\n"
        "@pytest.fixture\ndef broken():\n    yield\n    raise ValueError('late')\n"
        "def test_torn(broken): pass\n"
    )
    (tmp_path / "test_b.py").write_text("import no_such_module\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "gpu"), "GPU_OUTCOMES": str(tmp_path / "out.jsonl")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "gpu_outcomes",
        "-q",
        "--continue-on-collection-errors",
        str(tmp_path),
    ]
    subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    code = "import evidence, json; print(json.dumps(evidence.read_outcomes(evidence.Path('out.jsonl'))))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == {
        "passed": ["test_a.py::test_good"],
        "failed": {
            "test_b.py": "cannot be collected",
            "test_a.py::test_bad": "assert 1 == 2",
            "test_a.py::test_torn": "ValueError: late",
        },
        "skipped": {"test_a.py::test_skipped": "no GPU"},
    }


def test_the_readme_shows_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert readme.rendered(text) == text, "run: python -m megatron_act.benchmark.readme"


def test_the_readme_section_follows_the_json(tmp_path):
    bytes_section = f"{readme.BYTES_BEGIN}\n{fp8_bytes.table()}\n{readme.BYTES_END}\n"
    text = f"{bytes_section}a\n{readme.BEGIN}\nold\n{readme.END}\nb\n"
    assert readme.rendered(text, tmp_path) == text.replace("old", readme.NO_RUN)
    (tmp_path / "tests").mkdir()
    shared = {"command": "bash tests/gpu/run.sh", "commit": "abc123", "date": "2026-01-02 03:04 UTC"}
    tests = {"passed": ["a", "b"], "failed": {}, "skipped": {"c": "no GPU"}}
    content = {"benchmark": {**shared, "figures": figures()}, "kernels": {**shared, "exit_code": 0, "tests": tests}}
    (tmp_path / "tests" / "gpu_results.json").write_text(json.dumps(content))
    new = readme.rendered(text, tmp_path)
    assert "| xielu | forward | 4096x21504 | 4 | 123.4 (120.0 to 130.0) | 2,800.0 | 91.0 | 1.25x |" in new
    assert "| xielu | forward | 1x21504 |" in new
    assert "4096x10752" not in new
    assert "gelu: forward 93 % of the copy." in new
    assert "`bash tests/gpu/run.sh` on Some GPU, torch 2.11.0, commit abc123, 2026-01-02 03:04 UTC." in new
    assert "Tests on the GPU, kernels: 2 passed, 0 failed, 1 skipped" in new
    assert readme.PICTURE not in new
    assert readme.rendered(new, tmp_path) == new
    (tmp_path / readme.PICTURE).touch()
    assert f"]({readme.PICTURE})" in readme.rendered(text, tmp_path)
    with pytest.raises(UserError, match="expected one line"):
        readme.rendered("no markers", tmp_path)
