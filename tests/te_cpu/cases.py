"""Layers, data and passes that the tests of the stand-in share; in the child process."""

from typing import Any

import torch
from torch import Tensor

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
TOKENS, INPUTS, OUTPUTS = 160, 192, 224  # more than a block of 128, and not a multiple of one
BLACKWELL = (10, 0)


def recipe_of(name: str, form: str = "E4M3", **options: Any) -> Any:
    """TE's recipe; MXFP8 on a device that has it."""
    from transformer_engine.common import recipe

    from te_cpu import loader

    kinds = {
        "delayed": recipe.DelayedScaling,
        "tensorwise": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }
    if name == "mxfp8":
        loader.set_capability(BLACKWELL)
    return kinds[name](fp8_format=getattr(recipe.Format, form), **options)


def linear(**options: Any) -> Any:
    import transformer_engine.pytorch as te

    return te.Linear(INPUTS, OUTPUTS, **{"bias": False, "params_dtype": torch.float32, **options})


def data(*leading: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An input, whose rows differ in size by factors up to 2^12, and an output gradient."""
    leading = leading or (TOKENS,)
    sizes = torch.exp2(torch.randint(-6, 7, (*leading, 1)).float())
    x = (torch.randn(*leading, INPUTS) * sizes).to(dtype)
    return x.requires_grad_(), torch.randn(*leading, OUTPUTS).to(dtype)


def passes(module: Any, recipe: Any, x: Tensor, grad: Tensor, **options: Any) -> list[Tensor]:
    """Output and gradients of input and parameters of one forward and backward pass."""
    import transformer_engine.pytorch as te

    module.zero_grad()
    x.grad = None
    with te.autocast(enabled=recipe is not None, recipe=recipe):
        y = module(x, **options)
    y.backward(grad)
    return [y.detach(), x.grad, *(param.grad for param in module.parameters() if param.grad is not None)]


def assert_equal(got: list[Tensor], want: list[Tensor], what: str = "") -> None:
    assert len(got) == len(want), what
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{what} tensor {number}: {(a - b).abs().max()}"


def input_quantizer(module: Any) -> Any:
    """A copy of a layer's own, for tensors that autograd may see; the layer has had a pass."""
    quantizer = module.quantizers["scaling_fwd"][0].copy()
    quantizer.internal = quantizer.optimize_for_gemm = False
    quantizer.set_usage(rowwise=True, columnwise=True)
    return quantizer
