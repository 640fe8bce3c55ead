"""Delayed scaling's update after the amax reduction (``tex.fused_amax_and_scale_update_after_reduction``)."""

from typing import Any

import torch
from torch import Tensor

from megatron_act.kernels import fp8
from te_cpu import numerics, storages


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, fp8_dtype: Any, margin: float
) -> None:
    """One step of delayed scaling for every tensor, in place.

        latest = reduced amax, or history[0] where that is 0
        history = [0, history[2], ..., history[n - 1], latest]     where latest is not 0
        amax = latest (most_recent) or the largest of history (max); 0 where latest is 0
        scale = maximum 2^-margin / amax                           where amax is positive and finite

    Args:
        amaxes: the current amaxes of all tensors, one after the other, reduced over the group.
        histories: [length, tensors] each, entry 0 is the current amax.
        scales: [tensors] each.
        algorithm: ``most_recent`` or ``max``.
        fp8_dtype: TE's e4m3 or e5m2.
        margin: exponent of 2.

    Source: common/recipe/delayed_scaling.cu (2.20): the fused kernel keeps history and scale of a tensor that saw
    nothing, where TE's unfused Python rolls the history.
    """
    if algorithm not in ("most_recent", "max"):
        raise RuntimeError(f"te_cpu: expected most_recent or max, got {algorithm!r}")
    top = fp8.FORMATS[storages.FORMATS[fp8_dtype.name]].max * 2.0**-margin
    for reduced, history, scale in zip(amaxes.split([s.numel() for s in scales]), histories, scales, strict=True):
        latest = torch.where(reduced != 0, reduced, history[0])
        rolled = torch.cat([history[1:], latest[None]])
        largest = rolled.nan_to_num(nan=0.0, posinf=torch.inf).amax(0)  # of CUDA's fmaxf, which passes over NaN
        amax = torch.where(latest != 0, latest if algorithm == "most_recent" else largest, 0.0)
        rolled[0] = 0.0
        history.copy_(torch.where(latest != 0, rolled, history))
        usable = amax.isfinite() & (amax > 0)
        scale.copy_(torch.where(usable, (top / amax).clamp(max=numerics.FP32_MAX), scale))


EXPORTS = (fused_amax_and_scale_update_after_reduction,)
