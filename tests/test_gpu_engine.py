"""tests/gpu/run.sh and Transformer Engine, without either: what is chosen, built and installed, and the order."""

import importlib
import os
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from gpu_run_support import ROOT, make_tree, make_wheel, results, run
from packaging.utils import parse_wheel_filename

sys.path.insert(0, str(ROOT / "tests" / "gpu"))  # as run.sh has it
archives, te_build, te_engine, wheels = map(importlib.import_module, ("archives", "te_build", "te_engine", "wheels"))

NAME = "transformer_engine_cu13-2.20.2-py3-none-any.whl"
HERE = te_engine.Torch("2.11.0+cu130", "13.0")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything is relative to the working folder; ``given`` is WHEELS."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    monkeypatch.setenv("WHEELS", "given")
    return tmp_path


# Which packages.


@pytest.mark.parametrize(("cuda", "core"), [("12.8", "transformer-engine-cu12"), ("13.0", "transformer-engine-cu13")])
def test_the_library_follows_the_cuda_of_torch(cuda, core):
    assert te_engine.Torch("2.11.0", cuda).core == core


@pytest.mark.parametrize(("cuda", "got"), [(None, "one without CUDA"), ("11.8", "11.8"), ("14.0", "14.0")])
def test_another_cuda_is_one_sentence(cuda, got):
    with pytest.raises(LookupError, match=f"expected a torch with CUDA 12 or 13, got {got}: take another torch"):
        _ = te_engine.Torch("2.11.0", cuda).core


def test_the_name_of_a_built_wheel_says_for_which_torch():
    name, version, build, tags = parse_wheel_filename(HERE.wheel_name)
    assert (name, str(version), build) == ("transformer-engine-torch", "2.20.2", (1, "torch2.11.0_cu130"))
    assert {tag.interpreter for tag in tags} == {f"cp{sys.version_info.major}{sys.version_info.minor}"}
    assert te_engine.Torch("2.12.0+cu130", "13.0").wheel_name != HERE.wheel_name


def give(*names: str) -> None:
    for name in names:
        (Path("given") / name).touch()


META, SOURCE = "transformer_engine-2.20.2-py3-none-any.whl", "transformer_engine_torch-2.20.2.tar.gz"


def test_the_wheel_for_this_torch_wins_over_the_source():
    give(META, NAME, SOURCE, te_engine.Torch("2.12.0+cu130", "13.0").wheel_name)
    found = te_engine.files(HERE)
    assert [path.name for path in found] == [META, NAME, SOURCE]
    archives.CACHE.mkdir(parents=True)
    (archives.CACHE / HERE.wheel_name).touch()
    assert te_engine.files(HERE)[2] == archives.CACHE / HERE.wheel_name


def test_a_missing_wheel_is_one_sentence(monkeypatch):
    give(META, NAME.replace("cu13", "cu12"), SOURCE, NAME.replace("2.20.2", "2.19.0"))
    with pytest.raises(LookupError) as error:
        te_engine.files(HERE)
    assert "expected transformer-engine-cu13==2.20.2 for torch 2.11.0+cu130 in given, got" in str(error.value)
    assert "transformer_engine_cu12-2.20.2" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setenv("WHEELS", "no-such-folder")
    with pytest.raises(LookupError, match="WHEELS: expected a folder, got no-such-folder"):
        te_engine.files(HERE)
    monkeypatch.delenv("WHEELS")
    with pytest.raises(LookupError, match=r"expected transformer-engine==2.20.2 in python3, got none: set WHEELS"):
        te_engine.files(HERE)


# The build.


def toolkit(path: Path, version: int) -> Path:
    for header in ("include/cuda.h", *(f"include/{name}" for name in te_build.HEADERS), "bin/nvcc"):
        (path / header).parent.mkdir(parents=True, exist_ok=True)
        (path / header).touch()
    (path / "include" / "cuda.h").write_text(f"#define CUDA_VERSION {version}\n")
    return path


def test_headers_of_another_cuda_do_not_count(folders, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(folders / "old", 12080)))
    assert folders / "old" / "include" not in te_build.include_folders("13.0")
    assert te_build.include_folders("12.4")[0] == folders / "old" / "include"
    monkeypatch.setattr(te_build, "include_folders", lambda cuda: [folders / "old" / "include"])
    te_build.check("12.8")
    (folders / "old" / "include" / "cudnn.h").unlink()
    with pytest.raises(LookupError, match=r"expected the headers cudnn.h for CUDA 12.8, got none in 1 folders: set"):
        te_build.check("12.8")
    monkeypatch.setattr(te_build, "COMPILER", "no-such-compiler")
    with pytest.raises(LookupError, match="expected the C\\+\\+ compiler no-such-compiler on PATH"):
        te_build.check("12.8")


def test_the_build_is_told_where_cuda_is(folders, monkeypatch):
    home = toolkit(folders / "cuda", 13000)
    (home / "include" / "cccl").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(home))
    found = te_build.environment("13.0", folders / "site")
    include = found["CPLUS_INCLUDE_PATH"].split(":")
    assert include[:2] == [str(home / "include"), str(home / "include" / "cccl")]
    assert (found["CUDA_HOME"], found["NVTE_BUILD_USE_NVIDIA_WHEELS"]) == (str(home), "0")
    assert (found["NVTE_PYTORCH_FORCE_BUILD"], found["NVTE_FRAMEWORK"]) == ("TRUE", "pytorch")
    assert found["PATH"].startswith(f"{folders / 'site' / 'bin'}:") and 1 <= int(found["MAX_JOBS"]) <= os.cpu_count()
    monkeypatch.setattr(te_build, "include_folders", lambda cuda: [])
    found = te_build.environment("13.0", folders / "site")
    assert (found["CUDA_HOME"], found["NVTE_BUILD_USE_NVIDIA_WHEELS"]) == ("", "1")


def make_source(setup: str) -> None:
    """A source package that is built in a second, and the wheels beside it."""
    give(META, NAME)
    Path("package").mkdir(exist_ok=True)
    (Path("package") / "setup.py").write_text(setup)
    with tarfile.open(Path("given") / SOURCE, "w:gz") as file:
        file.add("package", "transformer_engine_torch-2.20.2")


SETUP = "import setuptools\nsetuptools.setup(name='transformer_engine_torch', version='2.20.2')\n"


@pytest.fixture
def builder(monkeypatch):
    monkeypatch.setattr(te_engine, "this_torch", lambda: HERE)
    monkeypatch.setattr(te_build, "check", lambda cuda: None)
    return te_engine.build


def test_the_torch_part_is_built_once_and_copied_out(folders, builder, monkeypatch, capfd):
    make_source(SETUP)
    (folders / "out").mkdir()
    monkeypatch.setenv("OUT", str(folders / "out"))
    (archives.CACHE / "building").mkdir(parents=True)
    (archives.CACHE / "building" / "old-1-py3-none-any.whl").touch()  # of a build that was ended
    builder()
    made = archives.CACHE / HERE.wheel_name
    assert capfd.readouterr().out.splitlines()[-1] == str(made)
    assert (folders / "out" / HERE.wheel_name).read_bytes() == made.read_bytes()
    assert [path.name for path in archives.CACHE.iterdir()] == [HERE.wheel_name]
    first = made.stat().st_mtime_ns
    builder()
    assert made.stat().st_mtime_ns == first


def test_a_failed_build_leaves_no_wheel(builder):
    make_source("raise SystemExit('no torch')\n")
    with pytest.raises(LookupError, match=rf"pip cannot build {SOURCE} \(exit code 1\)"):
        builder()
    assert not (archives.CACHE / HERE.wheel_name).exists()
    with pytest.raises(LookupError, match="expected a wheel of transformer-engine-torch, got its source only"):
        te_engine.install()


# The installation.


def test_all_three_are_installed_into_one_folder(folders, builder, monkeypatch):
    """A call of pip for each would leave the last one's files only."""
    for name, content in ((META, "pytorch"), (NAME, "library"), (HERE.wheel_name, "extension")):
        package = "-".join(name.split("-")[:2])
        make_wheel(folders / "given", package.split("-")[0], package.split("-")[1], f"transformer_engine/{content}.py")
        (folders / "given" / f"{package}-py3-none-any.whl").rename(folders / "given" / name)
    te_engine.install()
    site = folders / ".gpu" / "site"
    assert sorted(path.name for path in (site / "transformer_engine").glob("*.py")) == [
        "extension.py", "library.py", "pytorch.py",
    ]  # fmt: skip
    assert te_engine.installed() is None
    monkeypatch.syspath_prepend(str(site))
    assert te_engine.installed() == "2.20.2"
    monkeypatch.delenv("WHEELS")
    monkeypatch.setitem(wheels.NEEDS, "te-bits", {})
    te_engine.install()  # nothing to do
    te_engine.prepare(["te-bits"])
    for path in site.glob("transformer_engine_cu13*"):
        path.rename(path.with_name(path.name.replace("2.20.2", "2.19.0")))
    (site / "transformer_engine_cu13-2.19.0.dist-info" / "METADATA").write_text("Version: 2.19.0\n")
    assert te_engine.installed() is None


# The order.


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    tree = make_tree(tmp_path)
    for name in ("test_kernels_fp8.py", "test_kernels_fp8_compile.py", "training/test_te_a.py", "training/test_b.py"):
        (tree / "tests" / name).parent.mkdir(exist_ok=True)
        (tree / "tests" / name).write_text("@pytest.mark.gpu\n")
    return tree


def log(tree: Path) -> list[str]:
    return (tree.parent / "log").read_text().splitlines()


TE_PARTS = ["te-bandwidth", "te-bits", "te-mlp", "te-values"]


def test_te_is_the_last_of_all_and_its_tests_run_once(copy):
    done = run(copy, ENGINE="works")
    assert done.returncode == 0, done.stderr
    prepared, kernels, training, benchmark, values, first, bandwidth, second, bits, third, mlp = log(copy)
    assert prepared == "te_engine prepare te-values te-bandwidth te-bits te-mlp"
    assert kernels.endswith("tests/test_kernels_a.py tests/test_kernels_fp8.py") and "--only kernels" in benchmark
    assert training.endswith("-m gpu tests/training/test_b.py")
    assert values.endswith("tests/test_kernels_fp8.py") and "test_kernels_a.py" not in values
    assert [first, second, third] == ["te_engine install"] * 3
    assert "--only fp8 --output .gpu/te-bandwidth" in bandwidth and "--only mlp --output .gpu/te-mlp" in mlp
    assert bits.endswith("-m gpu tests/training/test_te_a.py")
    found = results(copy)
    assert list(found) == ["benchmark", "kernels", *TE_PARTS, "training"]
    assert found["te-mlp"]["figures"] and found["te-bandwidth"]["figures"]
    assert len(found["te-bits"]["tests"]["passed"]) == len(found["te-values"]["tests"]["passed"]) == 2


def test_one_part_alone(copy):
    assert run(copy, "--only", "te-bits", ENGINE="works").returncode == 0
    assert log(copy)[0] == "te_engine prepare te-bits" and list(results(copy)) == ["te-bits"]
    (copy / "tests" / "training" / "test_te_a.py").write_text("# no mark\n")
    assert run(copy, "--only", "te-bits", ENGINE="works").returncode == 1
    (why,) = results(copy)["te-bits"]["tests"]["failed"].values()
    assert why == "te-bits: expected files test_te_*.py with tests marked gpu, got none"


def test_a_build_that_failed_stops_no_other_part(copy):
    done = run(copy, "--only", "te", ENGINE="install")
    assert done.returncode == 1 and len(log(copy)) == 3  # prepared, values, bandwidth
    assert "te-bits failed (exit code 2): .gpu/te-bits.log" in done.stderr and "te-mlp failed" in done.stderr
    found = results(copy)
    assert [found[part]["exit_code"] for part in TE_PARTS] == [0, 2, 2, 0]
    why = "tests/gpu/run.sh: te: install went wrong"
    assert found["te-bits"]["tests"]["failed"] == {"te-bits": why}
    assert found["te-mlp"]["tests"]["failed"] == {"te-mlp": why} and "figures" in found["te-bandwidth"]
    assert found["te-bits"]["command"] == "bash tests/gpu/run.sh --only te"
    assert run(copy, "--only", "te-mlp", ENGINE="works").returncode == 0
    figures = results(copy)["te-mlp"]
    assert "figures" in figures and "tests" not in figures
    assert run(copy, "--only", "te-mlp", ENGINE="works", BROKEN_BENCHMARK="1").returncode == 1
    assert results(copy)["te-mlp"] == figures  # an earlier run's, with their own date


def runs(file: Path) -> bool:
    """Whether the process whose number is in a file does; a build that was ended at once has written none."""
    try:
        number = file.read_text().strip()
        return number != "" and Path("/proc", number, "stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_build_without_an_end_is_ended(copy):
    script = copy / "tests" / "gpu" / "run.sh"
    script.write_text(script.read_text().replace("total_s=460", "total_s=6"))
    done = run(copy, "--only", "te-bits", ENGINE="build")
    assert done.returncode == 1 and "te-bits failed (exit code 124)" in done.stderr
    (why,) = results(copy)["te-bits"]["tests"]["failed"].values()
    assert "expected its torch part to be built in" in why and "got none yet: .gpu/te-build.log" in why
    until = time.monotonic() + 60
    while runs(copy.parent / "log.build"):
        assert time.monotonic() < until, "the build still runs"
        time.sleep(0.05)


def test_what_te_lacks_is_said_before_anything_runs(copy):
    done = run(copy, "--only", "te", ENGINE="prepare")
    assert (done.returncode, done.stderr) == (2, "tests/gpu/run.sh: te: prepare went wrong\n")
    assert not (copy.parent / "log").exists()
    done = run(copy, ENGINE="prepare")
    assert done.returncode == 0
    assert done.stderr.endswith("prepare went wrong\ntests/gpu/run.sh: te is left out, the other parts run\n")
    assert sorted(results(copy)) == ["benchmark", "kernels", "training"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="no GPU is what it tests")
def test_the_real_check_on_a_torch_without_cuda(copy):
    done = run(copy, "--only", "te", WHEELS=str(copy.parent / "given"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "te: expected a torch with CUDA 12 or 13, got one without CUDA" in done.stderr
    assert not (copy / ".gpu").exists()
