"""FP8 results of an activation: :func:`forward`, :func:`backward` and :func:`current_scale`, by kernels or by torch.

from megatron_act.kernels import fp8_ops
out = fp8_ops.empty("tensor", rows, cols, x.device)            # or "blockwise", "mxfp8", or a consumer's own buffers
scale = fp8_ops.current_scale("xielu", x, params)              # or the consumer's: delayed scaling
q = fp8_ops.forward("xielu", x, params, out, scale=scale)      # q is out: q.data, q.columnwise, q.amax

plain = fp8_ops.empty("plain", rows, cols, x.device)           # y in bf16, and for the backward pass
kept = fp8_ops.empty_kept(rows, cols, x.device)                # x + bias in half the memory of a bf16 x
y = fp8_ops.forward("xielu", x, params, plain, bias=bias, kept=kept).data
dx, dparams, dbias = fp8_ops.backward("xielu", dy, kept, params, out_of_dx, bias=bias)

The torch path is the specification itself (``fp8.quantize``); the kernels' bits are equal wherever y is, in fp32. The
host never waits for the device. Leading dimensions count as rows; without elements nothing is launched or written.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_act.kernels import fp8, registry
from megatron_act.kernels.api import BACKENDS
from megatron_act.kernels.checks import KERNEL_DTYPES, check_arguments, check_triton
from megatron_act.kernels.fp8 import Kept, Quantized
from megatron_act.kernels.fp8_buffers import check_kept, check_quantized, empty, empty_kept
from megatron_act.kernels.fp8_launch import CAPABILITY, launch_backward, launch_forward

__all__ = ["Kept", "Quantized", "backward", "current_scale", "empty", "empty_kept", "forward"]


def forward(
    name: str, x: Tensor, params: Sequence[Tensor], out: Quantized, *,
    bias: Tensor | None = None, scale: Tensor | None = None, kept: Kept | None = None, round_bf16: bool = True,
    backend: str = "auto",
) -> Quantized:  # fmt: skip
    """f(x + bias), written into ``out``, which is returned.

    Args:
        name, x, params, bias, backend: as for ``kernels.apply``.
        out: buffers (:func:`empty`, or any of the same sizes); ``out.amax`` keeps the larger of its value and this
            tensor's, ``out.scale_inv`` of ``tensor`` becomes 1 / scale.
        scale: fp32, one element, of recipe ``tensor``; it and ``out``'s may be views of larger tensors.
        kept: buffers for x + bias (:func:`empty_kept`), for :func:`backward`.
        round_bf16: round to bf16 first, so that the bits equal those of a bf16 activation that is quantized.

    Raises:
        ValueError: as ``kernels.apply``; buffers that do not fit; a missing scale; FP8 on an old GPU.
        TypeError: as ``kernels.apply``.
    """
    rows = _checked(name, x, params, bias)
    _check_out(out, rows, scale)
    if kept is not None:
        check_kept(kept, rows)
    if rows.numel() == 0:
        return out
    if _triton(rows, backend, out.recipe):
        launch_forward(name, rows, params, bias, out, out.amax, scale, kept, round_bf16)
        return out
    z = _biased(rows, bias)
    if kept is not None:
        _copy(fp8.keep(z), kept, ("data", "scales"))
    return _fill(out, registry.get(name).reference(z, *params).detach(), scale, round_bf16)


def current_scale(
    name: str, x: Tensor, params: Sequence[Tensor], *, bias: Tensor | None = None, format: str = "e4m3",
    power_of_2: bool = False, epsilon: float = 0.0, round_bf16: bool = True, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """fp32 [1]: the format's maximum / max |f(x + bias)|, by a pass that writes nothing else (``fp8.scale_of``)."""
    rows, amax = _checked(name, x, params, bias), torch.zeros(1, device=x.device)
    if rows.numel() and _triton(rows, backend, "tensor"):
        launch_forward(name, rows, params, bias, None, amax, None, None, round_bf16)
    elif rows.numel():
        y = registry.get(name).reference(_biased(rows, bias), *params).detach()
        amax = fp8.amax_of(fp8.to_bf16(y) if round_bf16 else y).reshape(1)
    return fp8.scale_of(amax, power_of_2, epsilon, format)


def backward(
    name: str, grad: Tensor | Quantized, x: Tensor | Kept, params: Sequence[Tensor], out: Quantized, *,
    bias: Tensor | None = None, scale: Tensor | None = None, round_bf16: bool = True, backend: str = "auto",
) -> tuple[Quantized, tuple[Tensor, ...], Tensor | None]:  # fmt: skip
    """(dx, written into ``out``; each raw parameter's gradient; dbias) for the incoming ``grad``, in one pass.

    Args:
        grad: float, of x's shape; or FP8, read from its row-wise half, of any recipe and format.
        x: as in :func:`forward`; or what it kept, which holds the bias already: ``bias`` then only asks for dbias.
        out, scale, round_bf16, backend: as for :func:`forward`, and the errors.
    """
    if isinstance(x, Kept):  # a stand-in: arguments are checked against its columns and device
        stand_in = _checked(name, torch.empty((0, x.data.shape[-1]), device=x.data.device), params, bias)
        rows = x.data
        check_kept(x, rows)
    else:
        x = stand_in = rows = _checked(name, x, params, bias)
    _check_out(out, rows, scale)
    if isinstance(grad, Quantized):
        check_quantized("grad", grad, rows)
    else:
        grad = _matrix(grad.detach().reshape(rows.shape))
    if rows.numel() == 0:
        return out, tuple(torch.zeros_like(p) for p in params), None if bias is None else torch.zeros_like(bias)
    if _triton(stand_in, backend, out.recipe):
        return out, *launch_backward(name, grad, x, params, bias, out, scale, round_bf16)
    dx, dparams = _gradients(
        name, grad.values() if isinstance(grad, Quantized) else grad.float(),
        x.values() if isinstance(x, Kept) else _biased(x, bias), params,
    )  # fmt: skip
    return _fill(out, dx, scale, round_bf16), dparams, None if bias is None else dx.sum(0).to(bias.dtype)


def _gradients(name: str, g: Tensor, z: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(dz, each raw parameter's gradient) by torch."""
    leaves = [t.detach().requires_grad_() for t in (z, *params)]
    with torch.enable_grad():
        y = registry.get(name).reference(leaves[0], *leaves[1:])
    dz, *dparams = torch.autograd.grad(y, leaves, g)
    return dz, tuple(dparams)


def _checked(name: str, x: Tensor, params: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """x as a matrix, after every check of ``kernels.apply``'s arguments."""
    check_arguments(registry.get(name), x, params, bias, None, False)
    return _matrix(x.detach())


def _matrix(x: Tensor) -> Tensor:
    """[rows, last dimension], columns contiguous."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x.reshape(1, -1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _biased(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows.float() if bias is None else rows.float() + bias.detach().float()


def _check_out(out: Quantized, rows: Tensor, scale: Tensor | None) -> None:
    check_quantized("out", out, rows)
    if out.recipe == "tensor" and (scale is None or scale.numel() != 1 or scale.dtype != torch.float32):
        got = "None" if scale is None else f"{scale.dtype} of {scale.numel()}"
        raise ValueError(f"scale: expected an fp32 tensor of one element for recipe 'tensor', got {got}; give one")


def _triton(x: Tensor, backend: str, recipe: str) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}; leave it out for auto")
    if backend == "reference" or (backend == "auto" and not (x.is_cuda and x.dtype in KERNEL_DTYPES)):
        return False
    check_triton(x)
    found = torch.cuda.get_device_capability(x.device) if x.is_cuda else CAPABILITY
    if recipe != "plain" and found < CAPABILITY:
        raise ValueError(
            f"recipe {recipe!r}: expected compute capability 8.9 or newer, got {found[0]}.{found[1]}; use 'plain'"
        )
    return True


def _fill(out: Quantized, y: Tensor, scale: Tensor | None, round_bf16: bool) -> Quantized:
    """``out`` with the specification's values."""
    if out.recipe == "plain":
        out.data.copy_(y.view(out.data.shape))
        return out
    made = fp8.quantize(y, out.recipe, scale, round_bf16, format=out.format, swizzled=out.swizzled)
    _copy(made, out, ("data", "scale_inv", "columnwise", "columnwise_scale_inv"))
    if out.amax is not None and made.amax is not None:
        torch.maximum(out.amax, made.amax.view(out.amax.shape), out=out.amax)
    return out


def _copy(made: Quantized | Kept, into: Quantized | Kept, parts: Sequence[str]) -> None:
    """Values of the parts that ``into`` has."""
    for part in parts:
        mine = getattr(into, part)
        if mine is not None:
            mine.copy_(getattr(made, part).view(mine.shape))
