"""The face of the kernels: :func:`names`, :func:`get`, :func:`apply` and the types Activation and Param.

from megatron_act.kernels import api as kernels
y = kernels.apply("xielu", x, (alpha_p, alpha_n))
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_act.kernels.registry import get, names
from megatron_act.kernels.spec import Activation, Param

__all__ = ["BACKENDS", "Activation", "Param", "apply", "get", "names"]

BACKENDS = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def apply(
    name: str, x: Tensor, params: Sequence[Tensor] = (), *, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """f(x + bias), differentiable in x, params and bias; same shape and dtype as x.

    x: float tensor of any shape and stride. params: raw parameters in the order of ``get(name).params``, each of shape
    (1,) and any float dtype. bias: shape ``x.shape[-1:]``, broadcast over the other dimensions.
    backend: ``triton``; ``reference`` (torch); ``auto`` takes triton for CUDA tensors of fp32, bf16 or fp16 and the
    reference for all others. Arithmetic is fp32 (fp64 in the reference of an fp64 x).

    Raises ValueError (name, count, shape, device, backend) or TypeError (dtype, not a tensor).
    """
    activation = get(name)
    _check(activation, x, params, bias)
    if _backend(backend, x) == "triton":
        from megatron_act.kernels.ops import activation_op  # not needed by the reference

        return activation_op(x, list(params), bias, name)
    if bias is None:
        return activation.reference(x, *params)
    wide = torch.promote_types(x.dtype, torch.float32)
    return activation.reference(x.to(wide) + bias.to(wide), *params).to(x.dtype)


def _check(activation: Activation, x: Tensor, params: Sequence[Tensor], bias: Tensor | None) -> None:
    wanted = [p.name for p in activation.params]
    if isinstance(params, Tensor) or len(params) != len(wanted):
        got = "one tensor" if isinstance(params, Tensor) else f"{len(params)}"
        raise ValueError(
            f"{activation.name}: expected {len(wanted)} parameters ({', '.join(wanted) or 'none'}), got {got}; "
            "pass a sequence of raw tensors of shape (1,)"
        )
    _check_float("x", x)
    for label, param in zip(wanted, params, strict=True):
        _check_float(label, param)
        _check_place(label, param, (1,), x, "a raw parameter has one element, e.g. torch.full((1,), 0.2)")
    if bias is not None:
        _check_float("bias", bias)
        _check_place("bias", bias, tuple(x.shape[-1:]), x, "it has one element per column of x")


def _check_float(label: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{label}: expected a tensor, got {type(tensor).__name__}; convert it with torch.tensor")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise TypeError(f"{label}: expected a float tensor of 16 bits or more, got {tensor.dtype}; cast it")


def _check_place(label: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, hint: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{label}: expected shape {shape}, got {tuple(tensor.shape)}; {hint}")
    if tensor.device != x.device:
        raise ValueError(f"{label}: expected device {x.device} (that of x), got {tensor.device}; move it there")


def _backend(backend: str, x: Tensor) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}; leave it out for auto")
    if backend == "auto":
        return "triton" if x.is_cuda and x.dtype in KERNEL_DTYPES else "reference"
    if backend == "triton":
        _check_triton(x)
    return backend


def _check_triton(x: Tensor) -> None:
    from megatron_act.kernels.ops import INTERPRETED

    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"x: backend 'triton' expects float32, bfloat16 or float16, got {x.dtype}; use 'reference'")
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(
            f"x: backend 'triton' expects a CUDA tensor, got device {x.device}; use 'auto' or 'reference', "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
