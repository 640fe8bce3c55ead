"""What the activations became: scalars over time and by depth, curves by layer, what reaches them."""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_act.experiment.panels import Results, arm_key, common_steps, count_axis, grid, layer_key, runs_of
from megatron_act.experiment.style import INK, arm_style, layer_colours
from megatron_act.kernels import api as kernels

X_RANGE = (-4.0, 3.0)  # pre-activations shown
GATE = {"swiglu": "silu", "geglu": "gelu"}  # the elementwise part of a gated MLP
MOMENTS = (0.25, 0.5, 1.0)  # of the run, in the profiles by depth
FRACTIONS = {"negative_fraction": "share of negative pre-activations", "zero_fraction": "share of zero activations"}


def trainable_arms(results: Results) -> list[dict[str, Any]]:
    """Arms whose activation has scalars."""
    return [arm for arm in results["arms"] if arm["scalars_final"]]


def _layers(results: Results) -> int:
    return max(len(next(iter(arm["scalars_final"].values()))) for arm in trainable_arms(results))


def _by_step(runs: list[dict[str, Any]], column: str, name: str) -> np.ndarray:
    """Mean over runs, shape (steps, layers)."""
    steps = common_steps(runs)
    return np.mean([run["curve"][column][name][:steps] for run in runs], axis=0)


def scalars_over_time(results: Results) -> Figure | None:
    """One panel per scalar and arm: every layer's effective value against tokens; None without trainable arms."""
    panels = [(arm, name) for arm in trainable_arms(results) for name in arm["scalars_final"]]
    if not panels:
        return None
    figure = grid(len(panels))
    for axes, (arm, name) in zip(figure.axes, panels, strict=True):
        _scalar_panel(axes, runs_of(results, arm["name"]), name)
    layer_key(figure, _layers(results))
    return figure


def _scalar_panel(axes: Axes, runs: list[dict[str, Any]], name: str) -> None:
    by_step = _by_step(runs, "scalars", name)
    tokens = runs[0]["curve"]["tokens"][: len(by_step)]
    axes.axhline(runs[0]["scalars_initial"][name][0], color=INK, linewidth=0.9, linestyle=":")
    for layer, colour in enumerate(layer_colours(by_step.shape[1])):
        axes.plot(tokens, by_step[:, layer], color=colour, linewidth=1.5)
    axes.set(title=f"{runs[0]['name']}: {name}", xlabel="training tokens", ylabel=f"{name}, effective value")
    count_axis(axes)
    axes.ticklabel_format(axis="y", useOffset=False)


def scalars_by_depth(results: Results) -> Figure | None:
    """One panel per scalar and arm: the profile over the layers at several moments, each seed's end as dots."""
    panels = [(arm, name) for arm in trainable_arms(results) for name in arm["scalars_final"]]
    if not panels:
        return None
    figure = grid(len(panels))
    for axes, (arm, name) in zip(figure.axes, panels, strict=True):
        _depth_panel(axes, runs_of(results, arm["name"]), name)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _depth_panel(axes: Axes, runs: list[dict[str, Any]], name: str) -> None:
    by_step = _by_step(runs, "scalars", name)
    layers = np.arange(1, by_step.shape[1] + 1)
    axes.axhline(runs[0]["scalars_initial"][name][0], color=INK, linewidth=0.9, linestyle=":")
    for moment, colour in zip(MOMENTS, layer_colours(len(MOMENTS)), strict=True):
        row = by_step[max(0, round(moment * len(by_step)) - 1)]
        axes.plot(layers, row, color=colour, marker="o", markersize=3, label=f"{moment:.0%} of the run")
    for run in runs if len(runs) > 1 else ():
        axes.plot(layers, run["scalars_final"][name], ".", color=layer_colours(len(MOMENTS))[-1], alpha=0.35, zorder=1)
    axes.set(title=f"{runs[0]['name']}: {name}", xlabel="layer", ylabel=f"{name}, effective value")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)


def activation_values(arm: dict[str, Any], x: np.ndarray, scalars: dict[str, list[float]], layer: int) -> np.ndarray:
    """f(x) of one layer by the registry's reference, in float64; a gated MLP's gate for swiglu and geglu."""
    activation = kernels.get(GATE.get(arm["activation"], arm["activation"]))
    raw = [torch.tensor([param.raw(scalars[param.name][layer])], dtype=torch.float64) for param in activation.params]
    return activation.reference(torch.from_numpy(x), *raw).numpy()


def activation_curves(results: Results) -> Figure:
    """Every arm's activation: initial and learned by layer; fixed ones as they are."""
    arms = results["arms"]
    figure = grid(len(arms))
    for axes, arm in zip(figure.axes, arms, strict=True):
        _activation_panel(axes, arm)
    if trainable_arms(results):
        layer_key(figure, _layers(results))
    return figure


def activation_changes(results: Results) -> Figure | None:
    """What training added to each trainable activation, by layer; None without trainable arms."""
    arms = trainable_arms(results)
    if not arms:
        return None
    figure = grid(len(arms))
    for axes, arm in zip(figure.axes, arms, strict=True):
        _change_panel(axes, arm)
    layer_key(figure, _layers(results))
    return figure


def _x_values() -> np.ndarray:
    return np.linspace(*X_RANGE, 281)


def _activation_panel(axes: Axes, arm: dict[str, Any]) -> None:
    x, initial = _x_values(), arm["scalars_initial"]
    layers = len(next(iter(initial.values()))) if initial else 0
    for layer, colour in zip(range(layers), layer_colours(layers), strict=True):
        axes.plot(x, activation_values(arm, x, arm["scalars_final"], layer), color=colour, linewidth=1.4)
    style: dict[str, Any] = {"linestyle": ":", "linewidth": 1.2} if layers else {"linestyle": "-", "linewidth": 1.6}
    axes.plot(x, activation_values(arm, x, initial, 0), color=INK, **style)
    gate = GATE.get(arm["activation"])
    title = f"{arm['name']} (its gate, {gate})" if gate else arm["name"]
    axes.set(title=title if layers else f"{title}, fixed", xlabel="pre-activation x", ylabel="f(x)")


def _change_panel(axes: Axes, arm: dict[str, Any]) -> None:
    x, final = _x_values(), arm["scalars_final"]
    layers = len(next(iter(final.values())))
    start = activation_values(arm, x, arm["scalars_initial"], 0)
    axes.axhline(0.0, color=INK, linewidth=0.9, linestyle=":")
    for layer, colour in zip(range(layers), layer_colours(layers), strict=True):
        axes.plot(x, activation_values(arm, x, final, layer) - start, color=colour, linewidth=1.4)
    axes.set(title=f"{arm['name']}: learned less initial", xlabel="pre-activation x", ylabel="change of f(x)")


def preactivations(results: Results) -> Figure | None:
    """Shares of negative pre-activations and of zero activations by layer at the end; None where none were counted."""
    arms = [(index, arm) for index, arm in enumerate(results["arms"]) if arm["fractions_final"]]
    if not arms:
        return None
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2), FRACTIONS.items(), strict=True):
        for index, arm in arms:
            shares = arm["fractions_final"][name]
            axes.plot(range(1, len(shares) + 1), shares, marker="o", markersize=3.5, **arm_style(index))
        axes.set(xlabel="layer", ylabel=label, ylim=(-0.03, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    arm_key(figure, results)
    return figure
