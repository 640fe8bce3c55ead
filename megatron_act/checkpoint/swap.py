"""Fits an activation's scalars to a trained model's activation: an experiment, for a model that will be trained on.

    minimise over the scalars, in each layer:  mean over x of (f(x; scalars) - parent(x))^2

x are the model's own pre-activations on a given text (fc1's outputs, `sampled`), or a standard normal distribution
where no text is given. The fit is of one function to another: what it leaves (``Fit.residual``) is noise in every MLP,
which training has to undo. Gated models have no such parent: f would have to stand for a product of two projections.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_act.checkpoint.import_flags import Source
from megatron_act.checkpoint.import_plan import Swapped
from megatron_act.checkpoint.safetensors_folder import SafetensorsFolder
from megatron_act.checkpoint.tokenizer import open_words, read_tokenizer
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

SAMPLES = 1 << 15  # values per layer: their mean square is known to 1 %
WINDOW = 512  # tokens that the model sees at once
LEAST = 1e-3  # distance of a bounded scalar from its bound: at the bound itself its gradient would be 0 for ever
WARNING = (
    "no --text: fitted over a standard normal distribution, not over what reaches the model's activations; give text "
    "of the kind that it will be trained on"
)


@dataclass(frozen=True)
class Fit:
    """One layer's fit: effective scalars, and the root mean square of what remains over that of the parent's values."""

    scalars: dict[str, float]
    residual: float


def check_swap(source: Source, activation: str) -> None:
    """Refuses what cannot be fitted.

    Raises:
        UserError: an unknown activation, a gated parent, experts.
    """
    try:
        kernels.get(activation)
    except ValueError as error:
        raise UserError(f"--activation: {error}") from None
    if source.family.activation == "swiglu":
        raise UserError(
            f"--activation {activation}: expected a model without a gate, got {source.family.architecture}, whose MLP "
            "is silu(gate x) * (up x): no function of one pre-activation stands for a product of two. Train anew, at "
            "1.5x the width (tools/compute_match.py)"
        )
    if source.experts:
        raise UserError(f"--activation {activation}: expected a dense model, got experts: not fitted yet")


def swap(source: Source, activation: str, text: str | None = None) -> tuple[Swapped, list[Fit], str | None]:
    """Fits an activation to every layer of a model.

    Args:
        source: the model folder.
        activation: the registry's name of the new one.
        text: what the model reads while its pre-activations are collected; None: a standard normal distribution.

    Returns:
        The raw scalars of each layer, the fits, and a warning or None.

    Raises:
        UserError: see `check_swap`; a text without a tokenizer in the folder.
    """
    check_swap(source, activation)
    layers = source.config["num_hidden_layers"]
    values = [_normal()] * layers if text is None else sampled(source, text)
    parents = _parents(source)
    fits = [fit(activation, x, parent(x)) for x, parent in zip(values, parents, strict=True)]
    params = kernels.get(activation).params
    raw = [{param.name: param.raw(each.scalars[param.name]) for param in params} for each in fits]
    return Swapped(activation, raw), fits, WARNING if text is None else None


def fit(activation: str, x: Tensor, wanted: Tensor) -> Fit:
    """The scalars that bring an activation closest to ``wanted`` at ``x``, in float64, from the papers' values.

    Args:
        activation: the registry's name.
        x: pre-activations, shape (n,).
        wanted: the parent's values there.
    """
    chosen, x, wanted = kernels.get(activation), x.double(), wanted.double()
    raw = [torch.tensor([param.raw_init], dtype=torch.float64, requires_grad=True) for param in chosen.params]
    scale = wanted.square().mean().clamp(min=1e-30)

    def loss() -> Tensor:
        return (chosen.reference(x, *raw) - wanted).square().mean() / scale

    if raw:
        _minimise(raw, loss)
    scalars = {
        param.name: _inside(param, float(value.detach())) for param, value in zip(chosen.params, raw, strict=True)
    }
    raw = [torch.tensor([param.raw(scalars[param.name])], dtype=torch.float64) for param in chosen.params]
    return Fit(scalars, math.sqrt(float(loss().detach())))


def _minimise(raw: Sequence[Tensor], loss: Callable[[], Tensor]) -> None:
    solver = torch.optim.LBFGS(
        raw, max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss()
        value.backward()
        return value

    solver.step(closure)  # type: ignore[arg-type]


def _inside(param: kernels.Param, raw: float) -> float:
    value = param.effective(raw)
    return max(value, param.offset + LEAST) if param.constrain == "softplus" else value


def _normal() -> Tensor:
    return torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _parents(source: Source) -> list[Callable[[Tensor], Tensor]]:
    """The model's activation in each layer, with its own scalars where it has some."""
    chosen, folder = kernels.get(source.family.activation), SafetensorsFolder(source.folder)

    def of_layer(layer: int) -> Callable[[Tensor], Tensor]:
        names = [f"model.layers.{layer}.mlp.act_fn.{param.name}" for param in chosen.params]
        if missing := [name for name in names if name not in folder.tensors]:
            raise UserError(f"--hf {source.folder}: expected a tensor {missing[0]}, the folder has none (dropped?)")
        raw = [folder.read(name).double() for name in names]
        return lambda x: chosen.reference(x.double(), *raw)

    return [of_layer(layer) for layer in range(source.config["num_hidden_layers"])]


@torch.no_grad()
def sampled(source: Source, text: str) -> list[Tensor]:
    """Pre-activations of each layer while the model reads a text: evenly spaced ones, about ``SAMPLES`` a layer.

    Raises:
        UserError: no tokenizer in the folder, or a text without tokens.
    """
    model = _model(source)
    ids = _tokens(read_tokenizer(source.folder).folder, text)
    found: list[list[Tensor]] = [[] for _ in model.model.layers]
    share = max(1, ids.numel() * source.config["intermediate_size"] // SAMPLES)
    for layer, kept in zip(model.model.layers, found, strict=True):
        layer.mlp.up_proj.register_forward_hook(
            lambda _module, _inputs, x, kept=kept: kept.append(x.flatten()[::share])
        )
    for window in ids.split(min(WINDOW, source.config["max_position_embeddings"])):
        model(window[None])
    return [torch.cat(kept).double() for kept in found]


def _tokens(folder: Path, text: str) -> Tensor:
    ids = open_words(folder)(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("--text: expected some tokens, got none")
    return torch.tensor(ids)


def _model(source: Source) -> Any:
    """The model by transformers; one of our own by this package's modelling file, whatever code its folder holds."""
    from transformers import AutoModelForCausalLM

    from megatron_act.checkpoint.modeling_megatron_act import MegatronActForCausalLM

    reader: Any = MegatronActForCausalLM if source.family.ships_code else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    return reader.from_pretrained(source.folder, **options).eval()
