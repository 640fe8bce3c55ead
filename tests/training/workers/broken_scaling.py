"""A fault for a training run: the activation's FP8 result is scaled by a factor too much or too little."""

from typing import Any


def prepare(factor: float) -> None:
    """Results with one scale saturate (factor > 1) or vanish (factor < 1); their inverse scale fits the factor."""
    from megatron_act.kernels import fp8_ops

    original = fp8_ops.forward

    def forward(*args: Any, scale: Any = None, **options: Any) -> Any:
        return original(*args, scale=None if scale is None else scale * factor, **options)

    fp8_ops.forward = forward
