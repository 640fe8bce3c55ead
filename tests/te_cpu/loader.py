"""Transformer Engine's own Python code on a CPU: ``install()``, before the first import of ``megatron.core``.

Real: every line of ``transformer_engine`` 2.20.2 above its compiled extension: modules, quantizers, tensor classes,
recipes, ``FP8GlobalStateManager``, the op fuser. Stand-ins: the extension (``extension.py``: torch computes what its
kernels do, checked against by-hand arithmetic, never against a GPU), the CUDA device (``megatron_act.cpu_backend``),
the few functions in ``patches.py``. So this proves what the Python does with FP8 tensors, scales and histories, and
nothing about kernels, speed or memory.

    import te_cpu.loader                     # tests/ on sys.path
    te_cpu.loader.install()                  # then transformer_engine.pytorch imports, and Megatron has its TE layers
    from megatron_act import cpu_backend
    cpu_backend.install()                    # if Megatron is needed

A process cannot get rid of it again: tests run it in one of their own.
"""

import functools
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_act import cpu_backend
from te_cpu import extension

VERSION = "2.20.2"
FOLDER = Path(sys.prefix) / "te_python"  # launch/setup_env.sh puts the package there
HOPPER, BLACKWELL = (9, 0), (10, 0)
# No compiled fusions: their compilation takes longer than the tests.
SETTINGS = {
    "NVTE_PROJECT_BUILDING": "1",  # transformer_engine.common loads no CUDA libraries
    "NVTE_MASKED_SOFTMAX_FUSION": "0",
    "NVTE_TORCH_COMPILE": "0",
}


def install(device: tuple[int, int] = HOPPER) -> None:
    """Imports ``transformer_engine.pytorch`` on this CPU. Idempotent.

    Args:
        device: compute capability to answer with: 9.0 needs transposed copies for FP8 GEMMs, 10.0 has MXFP8.

    Raises:
        RuntimeError: the package is not there, or is another release.
    """
    _import()
    set_capability(device)


@functools.cache
def _import() -> None:
    found = _release()
    if found != VERSION:
        raise RuntimeError(f"expected transformer_engine {VERSION} in {FOLDER}, got {found}: run launch/setup_env.sh")
    os.environ.update(SETTINGS)
    cpu_backend.install_devices()
    set_capability(HOPPER)  # some modules ask at import
    sys.path.append(str(FOLDER))
    sys.modules[extension.NAME] = extension.build()
    # it defines ONNX operators with onnxscript, for exports that nothing here makes
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = extension.refusing("transformer_engine's ONNX export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # packages that are absent here: flash-attn, onnx
        _import_without_library()
    from te_cpu import patches

    patches.apply()


def _release() -> str | None:
    folders = list(FOLDER.glob("transformer_engine-*.dist-info"))
    return folders[0].name.removeprefix("transformer_engine-").removesuffix(".dist-info") if folders else None


def _import_without_library() -> None:
    """The package's top module looks for the extension's file: let it find the extension loaded."""
    spec: Any = importlib.util.find_spec("transformer_engine")
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    package.common = common  # type: ignore[attr-defined]
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    importlib.import_module("transformer_engine.pytorch")
    spec.loader.exec_module(package)


def set_capability(device: tuple[int, int]) -> None:
    """The compute capability from here on; what TE remembers of another one is forgotten."""
    properties = types.SimpleNamespace(
        major=device[0], minor=device[1], multi_processor_count=1, total_memory=1 << 34, name="cpu", gcnArchName=""
    )
    torch.cuda.get_device_capability = lambda *_, **__: device  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *_, **__: properties  # type: ignore[assignment]
    if "transformer_engine.pytorch" not in sys.modules:
        return
    from transformer_engine.pytorch import quantization, utils

    for cached in (utils._get_device_compute_capability, utils.is_non_tn_fp8_gemm_supported, utils.get_sm_count):
        cached.cache_clear()
    quantization._FP8_SUPPORT = quantization._MXFP8_SUPPORT = quantization._NVFP4_SUPPORT = None
    # asked of torch.version.cuda, which a CPU build lacks
    quantization._FP8_BLOCK_SCALING_SUPPORT = (device >= HOPPER, "compute capability 9.0 or higher")


@contextmanager
def capability(device: tuple[int, int]) -> Iterator[None]:
    """Another compute capability for a while."""
    before = torch.cuda.get_device_capability()
    set_capability(device)
    try:
        yield
    finally:
        set_capability(before)
