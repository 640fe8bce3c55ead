"""What an activation is: a frozen value made of two Triton functions, their torch twins and its trainable scalars."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.5  # slope at 0 of the xIELU family; fixed in the paper (arXiv 2411.13010), not trained
SOFTPLUS_THRESHOLD = 40.0  # softplus(r) - r < 1e-17 beyond, below float64 resolution


@dataclass(frozen=True)
class Param:
    """One trainable scalar, stored raw with shape (1,); the formula uses its effective value.

    ``init`` is the effective initial value. With ``constrain="softplus"`` the effective value is
    ``offset + softplus(raw)``, hence > offset; with ``constrain="none"`` it is the raw value itself.
    """

    name: str
    init: float
    constrain: str = "none"
    offset: float = 0.0

    @property
    def raw_init(self) -> float:
        """The raw value whose effective value is ``init`` (xIELU alpha_p: 0.8 -> 0.2033823...)."""
        return self.raw(self.init)

    def effective(self, raw: float) -> float:
        """Effective value of a raw one, in float64."""
        if self.constrain == "none":
            return float(raw)
        return self.offset + max(raw, 0.0) + math.log1p(math.exp(-abs(raw)))

    def raw(self, effective: float) -> float:
        """Raw value of an effective one, in float64; ValueError outside the parameter's range."""
        if not math.isfinite(effective) or (self.constrain == "softplus" and effective <= self.offset):
            bound = f" and > {self.offset:g}" if self.constrain == "softplus" else ""
            raise ValueError(f"{self.name}: expected a finite value{bound}, got {effective:g}; choose one there")
        if self.constrain == "none":
            return float(effective)
        shifted = effective - self.offset  # inverse softplus, a + log(1 - e^-a), which does not overflow
        return shifted + math.log(-math.expm1(-shifted))

    def constrained(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """The effective value as a differentiable 0-d tensor of ``dtype`` (same formula as :meth:`effective`)."""
        raw = raw.reshape(()).to(dtype)
        return raw if self.constrain == "none" else self.offset + F.softplus(raw, threshold=SOFTPLUS_THRESHOLD)


@dataclass(frozen=True)
class Activation:
    """An activation function: one formula, as Triton functions for the kernels and as torch functions.

    ``fwd(x, p) -> y`` and ``bwd(x, g, p) -> (dx, dp)`` are ``@triton.jit`` functions of fp32 values; ``p`` is the tuple
    of effective parameters less their offsets (the formula adds them where the sum's rounding does no harm), ``g`` the
    incoming gradient, ``dp`` the tuple of each parameter's integrand times ``g``.
    ``torch_fwd(x, *p) -> y`` and ``torch_bwd(x, g, *p) -> (dx, dp)`` are the same formulas on tensors; here ``p`` are
    the effective parameters themselves.
    """

    name: str
    params: tuple[Param, ...]
    fwd: Any
    bwd: Any
    torch_fwd: Callable[..., Tensor]
    torch_bwd: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]

    def reference(self, x: Tensor, *raw_params: Tensor) -> Tensor:
        """f(x) by torch, differentiable in x and the raw parameters; any device and float dtype, result in x's dtype.

        float32 and float64 are computed in their own precision; float16 and bfloat16 in float32, rounded at the end.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        effective = [param.constrained(raw, dtype) for param, raw in zip(self.params, raw_params, strict=True)]
        return _Reference.apply(self, x.to(dtype), *effective).to(x.dtype)


def finite(slope: Tensor) -> Tensor:
    """A slope that overflowed, cut back to the largest finite value: times a zero gradient it must stay 0."""
    largest = torch.finfo(slope.dtype).max
    return slope.clamp(-largest, largest)


class _Reference(torch.autograd.Function):
    """Joins ``torch_fwd`` and ``torch_bwd``; keeps x only. Twice differentiable (torch operations throughout)."""

    @staticmethod
    def forward(ctx: Any, activation: Activation, x: Tensor, *effective: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x, *effective)
        return activation.torch_fwd(x, *effective)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *effective = ctx.saved_tensors
        dx, integrands = ctx.activation.torch_bwd(x, grad, *effective)
        return None, dx, *(each.sum() for each in integrands)
