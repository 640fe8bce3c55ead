"""The same functions by other libraries, where they are installed; each is called as its own users call it.

A column of the result is a library. Only GPU runs have them.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_act.benchmark.baselines import Function
from megatron_act.kernels.spec import BETA


@dataclass(frozen=True)
class Library:
    """``functions`` imports the library and returns what it has, by our name of the activation."""

    name: str
    package: str
    functions: Callable[[], dict[str, Function]]


@dataclass(frozen=True)
class Found:
    """``functions`` by library and activation; why the others are not there."""

    functions: dict[str, dict[str, Function]]
    absent: list[str]
    broken: list[str]


def _liger() -> dict[str, Function]:
    swiglu = importlib.import_module("liger_kernel.ops.swiglu")
    if hasattr(swiglu, "LigerFusedGateUpSiLUMulFunction"):  # takes [gate | up] as it is
        found: dict[str, Function] = {"swiglu": swiglu.LigerFusedGateUpSiLUMulFunction.apply}
    else:  # copies both halves, and its backward pass overwrites them
        found = {"swiglu": lambda x: swiglu.LigerSiLUMulFunction.apply(*x.chunk(2, -1))}
    if importlib.util.find_spec("liger_kernel.ops.relu_squared"):
        found["relu2"] = importlib.import_module("liger_kernel.ops.relu_squared").LigerReLUSquaredFunction.apply
    return found


# its GELU is the tanh form
_TE_NAMES = {"gelu_tanh": "GELU", "relu": "ReLU", "relu2": "SReLU", "silu": "SiLU", "swiglu": "SwiGLU"}


def _transformer_engine() -> dict[str, Function]:
    ops = importlib.import_module("transformer_engine.pytorch.ops")
    return {ours: getattr(ops, theirs)() for ours, theirs in _TE_NAMES.items() if hasattr(ops, theirs)}


def _xielu_cuda() -> dict[str, Function]:
    importlib.import_module("xielu.ops")  # registers the class
    return {"xielu": partial(_call_xielu, torch.classes.xielu.XIELU())}


def _call_xielu(module: Any, x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """Three dimensions, scalars in x's dtype, eps -1e-6, and its vector loads, which are its default."""
    scalars = (alpha_p.to(x.dtype), alpha_n.to(x.dtype))
    return module.forward(x.unsqueeze(0), *scalars, BETA, -1e-6, True).view_as(x)


LIBRARIES = (
    Library("Liger", "liger_kernel", _liger),
    Library("Transformer Engine", "transformer_engine", _transformer_engine),
    Library("xIELU CUDA", "xielu", _xielu_cuda),
)


def find() -> Found:
    """Loads every library that is installed; one that is, but cannot be loaded, is named with its error."""
    found = Found({}, [], [])
    for library in LIBRARIES:
        if importlib.util.find_spec(library.package) is None:
            found.absent.append(library.name)
            continue
        try:
            found.functions[library.name] = library.functions()
        except Exception as error:  # a build for another CUDA or torch raises whatever it likes
            found.broken.append(f"{library.name} ({type(error).__name__}: {' '.join(str(error).split())[:120]})")
    return found
