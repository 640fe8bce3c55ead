"""Transformer Engine absent, broken, of another version, on the wrong GPU: one sentence each, never a traceback."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_act import te
from megatron_act.fp8_options import Fp8Options

ROOT = Path(__file__).parents[1]
BROKEN = {  # what `import transformer_engine` raises without CUDA: the meta package, or missing libraries
    "no CUDA build": ("RuntimeError", "Found empty `transformer-engine` meta package installed."),
    "no library": ("OSError", "libcudart.so.13: cannot open shared object file"),
    "half installed": ("ImportError", "cannot import name 'pytorch'"),
}


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """What other tests of this process have loaded or asked."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    answers = te.problem, te.version_problem
    for answer in answers:
        answer.cache_clear()
    yield
    for answer in answers:
        answer.cache_clear()


def package(folder: Path, body: str, version: str = "2.20.2") -> Path:
    """A folder with a distribution ``transformer_engine`` whose import runs ``body``."""
    (folder / "transformer_engine").mkdir(parents=True)
    (folder / "transformer_engine" / "__init__.py").write_text(body)
    (folder / "transformer_engine" / "pytorch.py").write_text("")
    info = folder / f"transformer_engine-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n")
    return folder


@pytest.fixture
def on_path(monkeypatch):
    def put(folder: Path) -> None:
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        te.problem.cache_clear()

    yield put
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def test_absent() -> None:
    assert te.problem() == f"expected Transformer Engine, got none: {te.INSTALL}"


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_one_sentence(case: str, tmp_path: Path, on_path) -> None:
    kind, message = BROKEN[case]
    on_path(package(tmp_path, f"raise {kind}({message!r})"))
    why = te.problem()
    assert why is not None and "\n" not in why
    assert [word for word in (kind, message, "pip uninstall", te.INSTALL) if word not in why] == []


@pytest.mark.parametrize(
    ("version", "fits"), [("2.20.0", True), ("2.20.2", True), ("2.21.0", False), ("1.13.0", False)]
)
def test_another_version_gets_no_fp8_from_us(version: str, fits: bool, tmp_path: Path, on_path) -> None:
    on_path(package(tmp_path, "", version))
    assert te.problem() is None
    expected = None if fits else f"expected Transformer Engine 2.20, got {version}"
    assert te.version_problem() == expected


# (capability, CUDA) and the recipes that such a GPU runs: quantization.py and utils.py of 2.20.
GPUS = {
    "A100": ((8, 0), "12.8", set()),
    "L40": ((8, 9), "12.8", {"delayed", "tensorwise"}),
    "H100, CUDA 12.8": ((9, 0), "12.8", {"delayed", "tensorwise"}),
    "H100, CUDA 13.0": ((9, 0), "13.0", {"delayed", "tensorwise", "blockwise"}),
    "B200": ((10, 0), "13.0", {"delayed", "tensorwise", "blockwise", "mxfp8"}),
    "RTX 5090": ((12, 0), "12.9", {"delayed", "tensorwise", "blockwise"}),
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("recipe", te.CAPABILITIES)
def test_a_gpu_runs_its_recipes_and_names_them_for_the_others(gpu: str, recipe: str) -> None:
    capability, cuda, served = GPUS[gpu]
    why = te.fp8_problem(recipe, capability, cuda)
    assert (why is None) == (recipe in served)
    if why is not None:
        remedy = why.rpartition(": ")[2]
        assert set(remedy.removeprefix("use ").split(" or ")) == served or (not served and "--fp8-format" in remedy)
        assert f"got {capability[0]}.{capability[1]} with CUDA {cuda}" in why and "\n" not in why


def settings(**given: object) -> SimpleNamespace:
    """Parsed arguments."""
    usual = {"fp8": "hybrid", "fp8_recipe": "delayed", "use_transformer_engine_op_fuser": False, "num_experts": None}
    return SimpleNamespace(**{**usual, "transformer_impl": "transformer_engine", "cpu_offloading": False, **given})


def test_flags_that_exclude_each_other_are_named() -> None:
    assert Fp8Options(output=True, grad=True, store=True).conflict(settings()) is None
    expected = {
        "--activation-fp8-output: expected --fp8-format": (Fp8Options(output=True), {"fp8": None}),
        "--activation-fp8-grad: a current scale": (Fp8Options(grad=True), {"fp8_recipe": "tensorwise"}),
        "--activation-fp8-input-store: routed experts": (Fp8Options(store=True), {"num_experts": 8}),
        "--activation-fp8-input-store: offloading": (Fp8Options(store=True), {"cpu_offloading": True}),
        "--activation-fp8-output: --use-transformer-engine-op-fuser": (
            Fp8Options(output=True),
            {"use_transformer_engine_op_fuser": True},
        ),
    }
    for start, (options, given) in expected.items():
        assert (options.conflict(settings(**given)) or "").startswith(start)


def entry(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The entry point with a package folder in front of everything."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    command = [sys.executable, "-m", "megatron_act.pretrain_gpt", *words]
    return subprocess.run(
        command, env=environment, cwd=folder, text=True, capture_output=True, timeout=240, check=False
    )


def test_a_broken_package_stops_a_gpu_run_before_megatron_is_imported(tmp_path: Path) -> None:
    package(tmp_path, "raise RuntimeError('no CUDA here')")
    done = entry(["--activation", "xielu"], tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: expected a Transformer Engine that loads, got RuntimeError: no CUDA here" in done.stderr


def test_a_broken_package_does_not_keep_a_cpu_run_from_starting(tmp_path: Path) -> None:
    package(tmp_path, "raise RuntimeError('no CUDA here')")
    done = entry(["--cpu", "--activation", "xelu"], tmp_path)  # a mistake that is found after Megatron's import
    assert done.returncode == 2 and "no CUDA here" not in done.stderr and "xelu" in done.stderr, done.stderr[-2000:]


def test_the_flags_are_checked_against_the_gpu_of_this_rank(monkeypatch) -> None:
    """Of two GPUs the second is asked on local rank 1; without FP8 none is."""
    asked: list[int] = []
    monkeypatch.setattr(te, "problem", lambda: None)
    monkeypatch.setattr(te.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(te.torch.cuda, "get_device_capability", lambda device: asked.append(device) or (8, 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert te.conflict(settings(fp8=None)) is None and asked == []
    why = te.conflict(settings())
    assert asked == [1] and why is not None and why.startswith("--fp8-recipe delayed: expected compute capability 8.9")
    local = te.conflict(settings(transformer_impl="local"))
    assert local is not None and local.startswith("--fp8-format: expected --transformer-impl transformer_engine")
