"""``transformer_engine_torch``, the compiled extension, as a Python module: what is emulated, refusals for the rest."""

import enum
import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from te_cpu import activations, gemm, grouped, multi_tensor, norms, quantize, scaling

NAME = "transformer_engine_torch"


class DType(enum.IntEnum):
    """Values of ``NVTEDType`` (transformer_engine.h)."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors", [f"GEMM{n}_{role}" for n in (1, 2, 3) for role in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{role}{n}" for n in (1, 2, 3) for role in ("OUTPUT", "INPUT")], start=0
)


class _AnyMember(type):
    """A class with any member that is asked for, a number of its own: nothing on the CPU takes them."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(vars(cls)))
        return vars(cls)[name]


# Enumerations and classes that TE's Python names at import, in tables of attention and in annotations.
UNUSED = """
    NVTE_Bias_Type NVTE_Mask_Type NVTE_Softmax_Type NVTE_QKV_Format NVTE_QKV_Layout
    NVTEScalingMode CommOverlapType CommOverlapAlgo CommOverlapHelper CommOverlap CommOverlapP2P FP8TensorMeta
""".split()  # noqa: SIM905


def refusing(name: str) -> types.ModuleType:
    """A module whose every attribute is a function that is not emulated: TE may bind it, not call it."""
    module = types.ModuleType(name)

    def attribute(key: str) -> Callable[..., Any]:
        if key.startswith("__"):
            raise AttributeError(key)

        def refuse(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"te_cpu: {name}.{key} is not emulated: add it to tests/te_cpu")

        return refuse

    vars(module)["__getattr__"] = attribute
    return module


def _without_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function is opaque to autograd."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def build() -> types.ModuleType:
    """The module, to be put into ``sys.modules`` before the first import of ``transformer_engine.pytorch``."""
    module = refusing(NAME)
    names: dict[str, Any] = {name: _AnyMember(name, (), {}) for name in UNUSED}
    names |= {"DType": DType, "FP8FwdTensors": FP8FwdTensors, "FP8BwdTensors": FP8BwdTensors}
    backends = ["NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8"]
    names["NVTE_Fused_Attn_Backend"] = enum.IntEnum("NVTE_Fused_Attn_Backend", backends, start=-1)
    names["NVTERoutingMapFormat"] = enum.IntEnum("NVTERoutingMapFormat", ["BYTEMAP", "BITMAP_U8"], start=0)
    names["NVTEQBHistogramMode"] = enum.IntEnum("NVTEQBHistogramMode", ["TWO_KERNEL", "FUSED_ATOMIC"], start=0)
    for part in (activations, gemm, grouped, multi_tensor, norms, quantize, scaling):
        names |= {function.__name__: _without_gradients(function) for function in part.EXPORTS}
    refusal = (names["NVTE_Fused_Attn_Backend"].NVTE_No_Backend, "no cuDNN")
    names["get_fused_attn_backend"] = lambda *_: refusal  # without flash-attn too, TE takes its unfused attention
    names["get_cublasLt_version"] = lambda: 130000
    names["get_cudnn_version"] = lambda: 91200
    names["get_num_cublas_streams"] = lambda: 1
    vars(module).update(names)
    return module
