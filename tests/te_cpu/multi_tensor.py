"""Functions over lists of tensors of ``transformer_engine_torch``: norms, scaling and Adam for Megatron's optimizer."""

import torch
from torch import Tensor

Lists = list[list[Tensor]]


def multi_tensor_l2norm(
    chunk_size: int, noop: Tensor, lists: Lists, per_tensor: bool | None = None
) -> tuple[Tensor, Tensor]:
    """(norm of all as fp32 [1], norms of each as fp32 [n] or empty)"""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms[:0]


def multi_tensor_scale(chunk_size: int, is_infinite: Tensor, lists: Lists, scale: float) -> None:
    """lists[1] = scale * lists[0]; ``is_infinite`` becomes 1 where a source is not finite."""
    for source, target in zip(*lists, strict=True):
        if not source.isfinite().all():
            is_infinite.fill_(1)
        target.copy_(source.float() * scale)


def multi_tensor_scale_tensor(chunk_size: int, is_infinite: Tensor, lists: Lists, scale: Tensor) -> None:
    """``multi_tensor_scale`` by a tensor of one number."""
    multi_tensor_scale(chunk_size, is_infinite, lists, float(scale))


def multi_tensor_adam(
    chunk_size: int,
    noop: Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam (mode 0: decay in the gradient) or AdamW (mode 1), in place, fp32 inside.

    lists: gradients, parameters, first moments, second moments and, if there are five, fp32 master parameters.
    """
    first, second = (1.0 - beta1**step, 1.0 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, param, m, v, *masters in zip(*lists, strict=True):
        value = (masters or [param])[0]
        decay = weight_decay * value.float()
        g = grad.float() if mode else grad.float() + decay
        m.copy_(beta1 * m.float() + (1.0 - beta1) * g)
        v.copy_(beta2 * v.float() + (1.0 - beta2) * g * g)
        update = (m.float() / first) / ((v.float() / second).sqrt() + epsilon)
        value.copy_(value.float() - lr * (update + decay if mode else update))
        param.copy_(value)


EXPORTS = (multi_tensor_l2norm, multi_tensor_scale, multi_tensor_scale_tensor, multi_tensor_adam)
