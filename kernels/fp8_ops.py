"""FP8 results of an activation: :func:`forward`, :func:`backward` and :func:`current_scale`, by kernels or by torch.

from megatron_act.kernels import fp8_ops
scale = fp8_ops.current_scale("xielu", x, params)                    # or fc2's own, delayed scaling
q = fp8_ops.forward("xielu", x, params, "tensor", scale=scale)       # q.data, q.columnwise, q.amax: fp8.Quantized

The torch path is the specification itself (``fp8.quantize``); the kernels' bits are equal wherever y is, in fp32.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_act.kernels import fp8, registry
from megatron_act.kernels.api import BACKENDS
from megatron_act.kernels.checks import KERNEL_DTYPES, check_arguments
from megatron_act.kernels.fp8 import Quantized, up
from megatron_act.kernels.ops import INTERPRETED, SUM_BLOCK, SUM_WARPS
from megatron_act.kernels.quantized import amax_kernel, backward_kernel, forward_kernel
from megatron_act.kernels.stores import store_blockwise, store_mxfp8, store_tensor
from megatron_act.kernels.template import sum_kernel

STORES = {"tensor": store_tensor, "blockwise": store_blockwise, "mxfp8": store_mxfp8}
TILES = {"tensor": 64, "blockwise": fp8.BLOCK, "mxfp8": 64}  # a block lies in one tile
WARPS = 8
CAPABILITY = (8, 9)  # the first with e4m3 (Ada)
EXACT_CASTS = (9, 0)  # below, Triton casts fp32 to e4m3 through fp16, which rounds twice: there by integers


def empty(recipe: str, rows: int, cols: int, device: torch.device, columnwise: bool = True) -> Quantized:
    """Buffers of a recipe in Transformer Engine's layout; padding of the scales is zero."""
    check_recipe(recipe, rows, cols)
    bits: dict[str, Any] = {"dtype": torch.uint8, "device": device}
    data = torch.empty(rows, cols, **bits)
    transposed = torch.empty(cols, rows, **bits) if columnwise else None
    if recipe == "tensor":
        return Quantized(data, torch.zeros(1, device=device), transposed, None, torch.zeros(1, device=device))
    if recipe == "blockwise":
        sizes = ((cols, rows), (rows, cols))
        scales = [torch.zeros(up(a, fp8.BLOCK) // fp8.BLOCK, up(b, 4), device=device) for a, b in sizes]
        return Quantized(data, scales[0], transposed, scales[1] if columnwise else None, None)
    shapes = ((up(rows, 128), up(cols // 32, 4)), (up(rows // 32, 4), up(cols, 128)))
    codes = [torch.zeros(shape, **bits) for shape in shapes]
    second = torch.empty_like(data) if columnwise else None
    return Quantized(data, codes[0], second, codes[1] if columnwise else None, None)


def check_recipe(recipe: str, rows: int, cols: int) -> None:
    """Raises ValueError for a recipe that is not served, or a shape that it cannot take."""
    if recipe == "nvfp4":
        raise ValueError("recipe: expected tensor, blockwise or mxfp8, got nvfp4, which is not built: use mxfp8")
    if recipe not in STORES:
        raise ValueError(f"recipe: expected one of {', '.join(STORES)}, got {recipe!r}; name one of them")
    if recipe == "mxfp8" and (rows % fp8.MX_BLOCK or cols % fp8.MX_BLOCK):
        raise ValueError(f"mxfp8: expected rows and columns divisible by 32, got [{rows}, {cols}]; pad or use bf16")


def forward(
    name: str, x: Tensor, params: Sequence[Tensor], recipe: str, *,
    bias: Tensor | None = None, scale: Tensor | None = None, columnwise: bool = True, round_bf16: bool = True,
    out: Quantized | None = None, backend: str = "auto",
) -> Quantized:  # fmt: skip
    """f(x + bias) in FP8.

    Args:
        name, x, params, bias, backend: as for ``kernels.apply``; leading dimensions of x count as rows.
        recipe: ``tensor``, ``blockwise`` or ``mxfp8``.
        scale: fp32 [1], of ``tensor``.
        columnwise: the transposed (mxfp8: second) half too.
        round_bf16: round to bf16 first, so that the bits equal those of a bf16 activation that is quantized.
        out: buffers to fill (:func:`empty`); ``out.amax`` keeps the larger of its value and this tensor's.

    Raises:
        ValueError: as ``kernels.apply``; a recipe or shape that is not served; a missing scale; an old GPU.
    """
    rows = _rows(name, x, params, bias, recipe, scale)
    if _triton(x, backend):
        found = out or empty(recipe, rows.shape[0], rows.shape[1], x.device, columnwise)
        forward_kernel[_grid(rows, recipe)](
            rows, bias, tuple(params), _pointers(found, recipe, scale), *rows.shape, rows.stride(0),
            FWD=registry.get(name).fwd, **_constants(name, recipe, round_bf16, rows.device),
        )  # fmt: skip
        return _with_inverse(found, recipe, scale)
    wide = rows.float() if bias is None else rows.float() + bias.float()
    y = registry.get(name).reference(wide, *params).detach()
    return _filled(fp8.quantize(y, recipe, scale, round_bf16), out, columnwise)


def current_scale(
    name: str, x: Tensor, params: Sequence[Tensor], *, bias: Tensor | None = None, power_of_2: bool = False,
    epsilon: float = 0.0, round_bf16: bool = True, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """fp32 [1]: 448 / max |f(x + bias)|, by a pass that writes nothing else (``fp8.scale_of``)."""
    rows = _rows(name, x, params, bias, "tensor", torch.ones(1))
    if _triton(x, backend):
        amax = torch.zeros(1, device=x.device)
        options = _constants(name, "tensor", round_bf16, x.device)
        del options["STORE"]
        amax_kernel[_grid(rows, "tensor")](
            rows, bias, tuple(params), amax, *rows.shape, rows.stride(0), FWD=registry.get(name).fwd, **options
        )
    else:
        wide = rows.float() if bias is None else rows.float() + bias.float()
        y = registry.get(name).reference(wide, *params).detach()
        amax = fp8.amax_of(fp8.to_bf16(y) if round_bf16 else y).reshape(1)
    return fp8.scale_of(amax, power_of_2, epsilon)


def backward(
    name: str, grad: Tensor, x: Tensor, params: Sequence[Tensor], recipe: str, *,
    grad_scale_inv: Tensor | None = None, bias: Tensor | None = None, scale: Tensor | None = None,
    columnwise: bool = True, round_bf16: bool = True, out: Quantized | None = None, backend: str = "auto",
) -> tuple[Quantized, tuple[Tensor, ...], Tensor | None]:  # fmt: skip
    """(dx in FP8, each raw parameter's gradient, dbias) for the incoming ``grad``.

    Args:
        grad: float, of x's shape; or e4m3 bits (uint8) with ``grad_scale_inv``, fp32 [1].
        Others as for :func:`forward`.
    """
    rows = _rows(name, x, params, bias, recipe, scale)
    incoming = grad.reshape(rows.shape)
    if _triton(x, backend):
        found = out or empty(recipe, rows.shape[0], rows.shape[1], x.device, columnwise)
        grads, dbias = _launch_backward(
            name, incoming, grad_scale_inv, rows, params, bias, _pointers(found, recipe, scale),
            recipe, round_bf16,
        )  # fmt: skip
        return _with_inverse(found, recipe, scale), grads, dbias
    if grad_scale_inv is not None:
        incoming = fp8.decode(incoming) * grad_scale_inv
    leaves = [t.detach().requires_grad_() for t in (rows.float(), *params)]
    shift = None if bias is None else bias.detach().float().requires_grad_()
    y = registry.get(name).reference(leaves[0] if shift is None else leaves[0] + shift, *leaves[1:])
    dx, *rest = torch.autograd.grad(y, [*leaves, *([] if shift is None else [shift])], incoming.float())
    dbias = None if bias is None or shift is None else rest.pop().to(bias.dtype)
    return _filled(fp8.quantize(dx, recipe, scale, round_bf16), out, columnwise), tuple(rest), dbias


def _launch_backward(
    name: str, grad: Tensor, grad_scale_inv: Tensor | None, rows: Tensor, params: Sequence[Tensor],
    bias: Tensor | None, pointers: tuple[Any, ...], recipe: str, round_bf16: bool,
) -> tuple[tuple[Tensor, ...], Tensor | None]:  # fmt: skip
    grid, (height, width) = _grid(rows, recipe), rows.shape
    options = _constants(name, recipe, round_bf16, rows.device)
    partial = torch.empty(len(params), grid[0] * grid[1], device=rows.device)
    sums = None if bias is None else torch.empty(grid[0], width, device=rows.device)
    backward_kernel[grid](
        rows, bias, grad, grad_scale_inv, tuple(params), pointers, partial, sums, height, width, rows.stride(0),
        grad.stride(0), BWD=registry.get(name).bwd, **options,
    )  # fmt: skip
    grads = tuple(torch.empty_like(p) for p in params)
    if grads:
        softplus = options["SOFTPLUS"]
        sum_kernel[(1,)](
            partial, tuple(params), grads, partial.shape[1], SOFTPLUS=softplus, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS
        )
    if bias is None or sums is None:
        return grads, None
    return grads, sums.sum(0, dtype=torch.float64).to(bias.dtype)


def _rows(
    name: str, x: Tensor, params: Sequence[Tensor], bias: Tensor | None, recipe: str, scale: Tensor | None
) -> Tensor:
    check_arguments(registry.get(name), x, params, bias, None, False)
    if recipe == "tensor" and scale is None:
        raise ValueError("scale: expected an fp32 tensor of one element for recipe 'tensor', got None; give one")
    rows = x.detach().reshape(-1, x.shape[-1])
    check_recipe(recipe, rows.shape[0], rows.shape[1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _triton(x: Tensor, backend: str) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}; leave it out for auto")
    if backend == "reference" or (backend == "auto" and not (x.is_cuda and x.dtype in KERNEL_DTYPES)):
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < CAPABILITY:
        found = torch.cuda.get_device_capability(x.device)
        raise ValueError(f"FP8: expected compute capability 8.9 or newer, got {found[0]}.{found[1]}; use bf16")
    return True


def by_integers(device: torch.device) -> bool:
    """Whether the kernels round by integer arithmetic instead of the device's casts."""
    return INTERPRETED or torch.cuda.get_device_capability(device) < EXACT_CASTS


def _grid(rows: Tensor, recipe: str) -> tuple[int, int]:
    tile = TILES[recipe]
    return triton.cdiv(rows.shape[0], tile), triton.cdiv(rows.shape[1], tile)


def _constants(name: str, recipe: str, round_bf16: bool, device: torch.device) -> dict[str, Any]:
    softplus = tuple(p.constrain == "softplus" for p in registry.get(name).params)
    return {
        "STORE": STORES[recipe], "SOFTPLUS": softplus, "ROUND": round_bf16, "EXACT": by_integers(device),
        "TILE": TILES[recipe], "num_warps": WARPS, "enable_fp_fusion": True,
    }  # fmt: skip


def _pointers(q: Quantized, recipe: str, scale: Tensor | None) -> tuple[Any, ...]:
    if recipe == "tensor":
        return q.data, q.columnwise, scale, q.amax
    pitch = q.scale_inv.shape[1]
    second = 0 if q.columnwise_scale_inv is None else q.columnwise_scale_inv.shape[1]
    return q.data, q.scale_inv, q.columnwise, q.columnwise_scale_inv, pitch, second


def _with_inverse(q: Quantized, recipe: str, scale: Tensor | None) -> Quantized:
    if recipe == "tensor" and scale is not None:
        torch.reciprocal(scale, out=q.scale_inv)
    return q


def _filled(made: Quantized, out: Quantized | None, columnwise: bool) -> Quantized:
    """``made``, or ``out`` with its values."""
    if out is None:
        return made if columnwise else replace(made, columnwise=None, columnwise_scale_inv=None)
    for part in ("data", "scale_inv", "columnwise", "columnwise_scale_inv"):
        mine, value = getattr(out, part), getattr(made, part)
        if mine is not None:
            mine.copy_(value.view(mine.shape))
    if out.amax is not None:
        torch.maximum(out.amax, made.amax, out=out.amax)  # type: ignore[arg-type]
    return out
