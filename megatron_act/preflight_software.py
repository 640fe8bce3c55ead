"""Versions, GPUs and NVIDIA apex: what can be checked before Megatron is imported, on every rank."""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch
from packaging.specifiers import SpecifierSet

from megatron_act import te
from megatron_act.preflight_finding import Finding, failed

# The supported matrix; setup.py asks for the same. Transformer Engine: te.VERSION for FP8 results handed over.
SUPPORTED = {
    "torch": ">=2.7",
    "triton": ">=3.5",
    "megatron-core": ">=0.19.2,<0.20",
}
ENGINE = ("transformer_engine", ">=2.20,<3")
PYTHON = ">=3.11"
GRADIENT_FUSION = "fused_weight_gradient_mlp_cuda"  # apex's extension behind gradient accumulation fusion


def checks(cpu: bool) -> list[Finding]:
    """All checks of this file."""
    return [
        _python(),
        *(_package(name, wanted) for name, wanted in SUPPORTED.items()),
        _engine(cpu),
        _gpus(cpu),
        apex(),
    ]


def _python() -> Finding:
    got = platform.python_version()
    if got not in SpecifierSet(PYTHON):
        return failed("python", PYTHON, got, "use such an interpreter (LAUNCH.python)")
    return Finding("python", got)


def _package(name: str, wanted: str) -> Finding:
    try:
        got = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return failed(name, wanted, "none", f"pip install '{name}{wanted}'")
    if not SpecifierSet(wanted).contains(got, prereleases=True):
        return failed(name, wanted, got, f"pip install '{name}{wanted}'")
    return Finding(name, f"{got} ({wanted})")


def _engine(cpu: bool) -> Finding:
    """Transformer Engine; a run without it needs ``--transformer-impl local``, which `preflight_model` looks at."""
    name, wanted = ENGINE
    if importlib.util.find_spec(name) is None:
        return Finding(name, "none")
    if cpu:
        return Finding(name, "not used (--cpu)")
    return Finding(name, "", why) if (why := te.problem()) else _package(name, wanted)


def _gpus(cpu: bool) -> Finding:
    """Enough GPUs for the ranks of this node; the merge compares their model and memory between nodes."""
    if cpu:
        return Finding("GPUs", "none needed (--cpu)")
    wanted, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if count < wanted:
        remedy = "ask for as many GPUs as --gpus-per-node, look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        return failed("GPUs", f"{wanted} on each node", str(count), remedy)
    names = {torch.cuda.get_device_name(index) for index in range(wanted)}
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(wanted))
    return Finding("GPUs", f"{wanted} x {' and '.join(sorted(names))}, {memory >> 30} GiB")


def apex() -> Finding:
    """Whether ``apex`` is NVIDIA's, told by its files: importing another project's would run it."""
    found = importlib.util.find_spec("apex")
    folder = Path(found.origin).parent if found and found.origin else None
    if found is None:
        return Finding("apex", "none: fused Adam and norms are Transformer Engine's, or torch's")
    if folder is None or not all(
        (folder / part).exists() for part in ("multi_tensor_apply", "optimizers/fused_adam.py")
    ):
        got = f"another project at {folder or list(found.submodule_search_locations or [])}"
        remedy = "pip uninstall apex; Megatron takes it for NVIDIA's and builds norms that it lacks"
        return failed("apex", "NVIDIA's (github.com/NVIDIA/apex) or none", got, remedy)
    turned_on = ["fused Adam and fused LayerNorm where Transformer Engine is absent"]
    if importlib.util.find_spec(GRADIENT_FUSION):
        turned_on.append("gradient accumulation fusion")
    return Finding("apex", f"NVIDIA's: {', '.join(turned_on)}")
