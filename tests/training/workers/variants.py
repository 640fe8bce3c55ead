"""Task: pairs of ways to compute one model, with equal weights and tokens: losses, logits and every gradient."""

from typing import Any

import torch
from small_gpt import LENGTH, VOCAB, Variant, build, copy_weights, forward, parameters

from megatron_act.activation import activations_of


def compare(device: str, pairs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Per pair of variants the largest difference of each quantity, relative to the first variant's largest value."""
    return {name: difference(device, *(Variant(**fields) for fields in pair)) for name, pair in pairs.items()}


def difference(device: str, first: Variant, second: Variant) -> dict[str, float]:
    torch.manual_seed(3)
    reference = build(first, device)
    model = build(second, device)
    copy_weights(reference, model)
    with torch.no_grad():
        for module in activations_of(model):
            for raw in module.raw_scalars():
                raw += second.shift
    want, got = quantities(reference, device), quantities(model, device)
    return {name: worst(got[name], want[name]) for name in want}


def quantities(model: Any, device: str) -> dict[str, dict[str, torch.Tensor]]:
    """Logits and gradients by kind; scalars of one name are one tensor, over all layers.

    The loss is the mean square of the logits: the terms of a scalar's gradient then have mostly one sign, and the
    rounding of each to bf16 does not drown their sum.
    """
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(7)).to(device)
    logits = forward(model, tokens)
    torch.autograd.backward(logits.float().square().mean())
    scalars: dict[str, list[torch.Tensor]] = {}
    weights = {}
    for name, param in parameters(model).items():
        if "activation_func" in name:
            scalars.setdefault(name.rpartition(".")[2], []).append(param.grad)
        else:
            weights[name] = param.grad
    return {
        "logits": {"logits": logits.detach()},
        "scalars": {name: torch.cat(grads) for name, grads in scalars.items()},
        "weights": weights,
    }


def worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    errors = [(got[name].double() - want[name].double()).abs().max() / want[name].double().abs().max() for name in want]
    return float(max(errors))
