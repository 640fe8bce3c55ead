"""RMSNorm and LayerNorm of ``transformer_engine_torch``: fp32 inside, the output cast or quantized (``quantize.emit``).

    rmsnorm     y = g x r,            r = (mean(x^2) + eps)^(-1/2)
    layernorm   y = g (x - m) r + b,  m = mean(x), r = (mean((x - m)^2) + eps)^(-1/2)

g is 1 + weight for ``zero_centered_gamma``. With u = g dy and n the normalized x:
dx = r (u - n mean(u n)), for layernorm r (u - mean(u) - n mean(u n)); dg = sum(dy n), db = sum(dy).
"""

from typing import Any

import torch
from torch import Tensor

from te_cpu import quantize, storages


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + (1.0 if zero_centered else 0.0)


def _torch_dtype(otype: Any) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return TE_DType_To_Torch[otype]


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """[y, None, r as fp32 [rows]]"""
    x = storages.flat(input).float()
    scale = (x.square().mean(1) + eps).rsqrt()
    y = x * scale[:, None] * _gamma(weight, zero_centered_gamma)
    return [quantize.emit(y.reshape(input.shape), quantizer, _torch_dtype(otype), ln_out), None, scale]


def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """[y, m as fp32 [rows], r as fp32 [rows]]"""
    x = storages.flat(input).float()
    mean = x.mean(1)
    centred = x - mean[:, None]
    scale = (centred.square().mean(1) + eps).rsqrt()
    y = centred * scale[:, None] * _gamma(weight, zero_centered_gamma)
    y = y if bias is None else y + bias.float()
    return [quantize.emit(y.reshape(input.shape), quantizer, _torch_dtype(otype), ln_out), mean, scale]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """[dx, dg]"""
    dx, dgamma = _rmsnorm_gradients(dz, x, rsigma, gamma, zero_centered_gamma)
    return [dx.reshape(x.shape).to(x.dtype), dgamma.to(gamma.dtype)]


def rmsnorm_bwd_add(
    dz: Tensor, x: Tensor, add: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """[dx + add, dg]"""
    dx, dgamma = _rmsnorm_gradients(dz, x, rsigma, gamma, zero_centered_gamma)
    return [(dx.reshape(x.shape) + add.float()).to(x.dtype), dgamma.to(gamma.dtype)]


def _rmsnorm_gradients(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    grad, normal = storages.flat(dz).float(), storages.flat(x).float() * rsigma[:, None]
    inner = grad * _gamma(gamma, zero_centered)
    dx = rsigma[:, None] * (inner - normal * (inner * normal).mean(1, keepdim=True))
    return dx, (grad * normal).sum(0)


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """[dx, dg, db]"""
    grad, normal = storages.flat(dz).float(), (storages.flat(x).float() - mu[:, None]) * rsigma[:, None]
    inner = grad * _gamma(gamma, zero_centered_gamma)
    dx = inner - inner.mean(1, keepdim=True) - normal * (inner * normal).mean(1, keepdim=True)
    dx = (rsigma[:, None] * dx).reshape(x.shape).to(x.dtype)
    return [dx, (grad * normal).sum(0).to(gamma.dtype), grad.sum(0).to(gamma.dtype)]


EXPORTS = (rmsnorm_fwd, layernorm_fwd, rmsnorm_bwd, rmsnorm_bwd_add, layernorm_bwd)
