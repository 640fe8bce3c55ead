"""What a wrong argument is told: what was expected, what came, what to do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_act.kernels.spec import Activation

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_arguments(
    activation: Activation,
    x: Tensor,
    params: Sequence[Tensor],
    bias: Tensor | None,
    weights: Tensor | None,
    gated: bool,
) -> None:
    """Every argument of ``api.apply`` but the backend."""
    wanted = [p.name for p in activation.params]
    if isinstance(params, Tensor) or len(params) != len(wanted):
        got = "one tensor" if isinstance(params, Tensor) else f"{len(params)}"
        raise ValueError(
            f"{activation.name}: expected {len(wanted)} parameters ({', '.join(wanted) or 'none'}), got {got}; "
            "pass a sequence of raw tensors of shape (1,)"
        )
    _check_float("x", x)
    if gated and (x.ndim == 0 or x.shape[-1] % 2):
        raise ValueError(
            f"x: expected an even last dimension [gate | up], got shape {tuple(x.shape)}; concatenate both"
        )
    for label, param in zip(wanted, params, strict=True):
        _check(label, param, [(1,)], x, "a raw parameter has one element, e.g. torch.full((1,), 0.2)")
    if bias is not None:
        _check("bias", bias, [tuple(x.shape[-1:])], x, "it has one element per column of x")
    if weights is not None:
        rows = tuple(x.shape[:-1])
        _check("weights", weights, [rows, (*rows, 1)], x, "there is one per row of x")


def check_gradient(grad: Tensor, x: Tensor, gated: bool) -> None:
    """``grad`` has the shape, dtype and device of the result."""
    shape = (*x.shape[:-1], x.shape[-1] // 2) if gated else tuple(x.shape)
    _check("grad", grad, [shape], x, "it is the gradient of the result")
    if grad.dtype != x.dtype:
        raise TypeError(f"grad: expected {x.dtype} (that of x), got {grad.dtype}; cast it")


def check_triton(x: Tensor) -> None:
    """x can be given to the Triton kernels."""
    from megatron_act.kernels.ops import INTERPRETED

    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"x: backend 'triton' expects float32, bfloat16 or float16, got {x.dtype}; use 'reference'")
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(
            f"x: backend 'triton' expects a CUDA tensor, got device {x.device}; use 'auto' or 'reference', "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )


def _check_float(label: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{label}: expected a tensor, got {type(tensor).__name__}; convert it with torch.tensor")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise TypeError(f"{label}: expected a float tensor of 16 bits or more, got {tensor.dtype}; cast it")


def _check(label: str, tensor: Tensor, shapes: list[tuple[int, ...]], x: Tensor, hint: str) -> None:
    _check_float(label, tensor)
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{label}: expected shape {expected}, got {tuple(tensor.shape)}; {hint}")
    if tensor.device != x.device:
        raise ValueError(f"{label}: expected device {x.device} (that of x), got {tensor.device}; move it there")
