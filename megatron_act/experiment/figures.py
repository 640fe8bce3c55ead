"""The report's figures: loss curves, scalars by layer over time, activations as learned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from megatron_act.experiment.style import INK, arm_style, house_style, layer_colours, save_png, to_svg
from megatron_act.kernels import api as kernels

SMOOTHED_SHARE = 0.04  # of a run: width of the moving average
X_RANGE = (-4.0, 3.0)  # pre-activations shown
COLUMNS = 4  # panels side by side
LEGEND_LAYERS = 8  # more layers get a colour bar
GATE = {"swiglu": "silu", "geglu": "gelu"}  # the elementwise part of a gated MLP
Results = dict[str, Any]


def smooth(values: list[float]) -> np.ndarray:
    """Centred moving average over `SMOOTHED_SHARE` of the points; at both ends over the part of it that exists."""
    array = np.asarray(values, dtype=np.float64)
    reach = int(len(array) * SMOOTHED_SHARE / 2)
    total = np.concatenate([[0.0], np.cumsum(array)])
    index = np.arange(len(array))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach, len(array) - 1) + 1
    return (total[high] - total[low]) / (high - low)


def loss_against_tokens(results: Results) -> Figure:
    """Training loss of every arm against tokens."""
    return _loss_figure(results, lambda run, tokens: tokens, "training tokens", "Training loss against tokens")


def loss_against_flops(results: Results) -> Figure:
    """Training loss of every arm against the FLOPs spent."""
    return _loss_figure(
        results,
        lambda run, tokens: tokens * run["flops_per_token"],
        "training FLOPs (matmuls, forward and backward)",
        "Training loss against FLOPs",
    )


def _loss_figure(
    results: Results, to_x: Callable[[dict[str, Any], np.ndarray], np.ndarray], label: str, title: str
) -> Figure:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ends: list[float] = []
    for index, arm in enumerate(results["arms"]):
        runs = [run for run in results["runs"] if run["name"] == arm["name"]]
        ends += _loss_lines(axes, runs, to_x, arm_style(index), arm["name"])
    _zoom(axes, ends)
    axes.set(xlabel=label, ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.legend(handlelength=3.2)
    return figure


def _loss_lines(axes: Axes, runs: list[dict[str, Any]], to_x: Any, style: dict[str, Any], name: str) -> list[float]:
    """Draws one arm: each run's raw loss faintly, the smoothed mean over runs; returns the visible range."""
    steps = min(len(run["curve"]["tokens"]) for run in runs)  # an unfinished run has fewer
    tokens = np.asarray(runs[0]["curve"]["tokens"][:steps], dtype=np.float64)
    losses = np.array([run["curve"]["losses"][:steps] for run in runs], dtype=np.float64)
    known = np.isfinite(losses).all(axis=0)  # a skipped step has none
    x, losses = to_x(runs[0], tokens[known]), losses[:, known]
    for row in losses:
        axes.plot(x, row, color=style["color"], alpha=0.22, linewidth=0.7)
    mean = smooth(list(losses.mean(axis=0)))
    axes.plot(x, mean, linewidth=1.8, label=name, **style)
    return [float(np.min(mean)), float(mean[len(mean) // 20])]


def _zoom(axes: Axes, ends: list[float]) -> None:
    """Leaves the first steps' fall out of the range: it is the same for every arm and flattens the rest."""
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def trainable_arms(results: Results) -> list[dict[str, Any]]:
    """Arms whose activation has scalars."""
    return [arm for arm in results["arms"] if arm["scalars_final"]]


def scalars_over_time(results: Results) -> Figure | None:
    """One panel per scalar and arm: every layer's effective value against tokens; None without trainable arms."""
    panels = [(arm, name) for arm in trainable_arms(results) for name in arm["scalars_final"]]
    if not panels:
        return None
    grid = _grid(len(panels))
    for axes, (arm, name) in zip(grid.axes, panels, strict=True):
        _scalar_panel(axes, [run for run in results["runs"] if run["name"] == arm["name"]], name)
    _layer_key(grid, _layers(results))
    return grid


def _scalar_panel(axes: Axes, runs: list[dict[str, Any]], name: str) -> None:
    run, steps = runs[0], min(len(run["curve"]["tokens"]) for run in runs)
    tokens = run["curve"]["tokens"][:steps]
    by_step = np.mean([run["curve"]["scalars"][name][:steps] for run in runs], axis=0)
    colours = layer_colours(by_step.shape[1])
    axes.axhline(run["scalars_initial"][name][0], color=INK, linewidth=0.9, linestyle=":")
    for layer in range(by_step.shape[1]):
        axes.plot(tokens, by_step[:, layer], color=colours[layer], linewidth=1.5)
    axes.set(title=f"{run['name']}: {name}", xlabel="training tokens", ylabel=f"{name}, effective value")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.ticklabel_format(axis="y", useOffset=False)


def activation_curves(results: Results) -> Figure:
    """Every arm's activation: initial and learned by layer; fixed ones as they are."""
    arms = results["arms"]
    grid = _grid(len(arms))
    for axes, arm in zip(grid.axes, arms, strict=True):
        _activation_panel(axes, arm)
    if trainable_arms(results):
        _layer_key(grid, _layers(results))
    return grid


def activation_changes(results: Results) -> Figure | None:
    """What training added to each trainable activation, by layer; None without trainable arms."""
    arms = trainable_arms(results)
    if not arms:
        return None
    grid = _grid(len(arms))
    for axes, arm in zip(grid.axes, arms, strict=True):
        _change_panel(axes, arm)
    _layer_key(grid, _layers(results))
    return grid


def _layers(results: Results) -> int:
    return max(len(next(iter(arm["scalars_final"].values()))) for arm in trainable_arms(results))


def activation_values(arm: dict[str, Any], x: np.ndarray, scalars: dict[str, list[float]], layer: int) -> np.ndarray:
    """f(x) of one layer by the registry's reference, in float64; a gated MLP's gate for swiglu and geglu."""
    activation = kernels.get(GATE.get(arm["activation"], arm["activation"]))
    raw = [torch.tensor([param.raw(scalars[param.name][layer])], dtype=torch.float64) for param in activation.params]
    return activation.reference(torch.from_numpy(x), *raw).numpy()


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


def _grid(panels: int) -> Figure:
    """A figure with ``panels`` axes, at most `COLUMNS` in a row."""
    columns, rows = min(panels, COLUMNS), -(-panels // COLUMNS)
    figure = Figure(figsize=(max(4.0, 2.6 * columns), 2.6 * rows + 0.4), layout="constrained")
    figure.subplots(rows, columns, squeeze=False)
    for surplus in figure.axes[panels:]:
        surplus.remove()
    return figure


def _layer_key(figure: Figure, layers: int) -> None:
    """Says which colour is which layer, above the panels; many layers name only the first, middle and last."""
    from matplotlib.lines import Line2D

    shown = range(layers) if layers <= LEGEND_LAYERS else (0, layers // 2, layers - 1)
    colours = layer_colours(layers)
    handles = [Line2D([], [], color=colours[layer], linewidth=2) for layer in shown]
    labels = [f"layer {layer + 1}" for layer in shown]
    handles.append(Line2D([], [], color=INK, linewidth=1, linestyle=":"))
    figure.legend(handles, [*labels, "initial"], loc="outside upper center", ncols=len(labels) + 1)


FIGURES: dict[str, tuple[str, Callable[[Results], Figure | None]]] = {
    "loss_tokens": ("Training loss against tokens: moving average over the faint raw loss.", loss_against_tokens),
    "loss_flops": ("Training loss against matmul FLOPs spent.", loss_against_flops),
    "scalars": (
        "The trainable scalars of each layer while training, means over seeds; dotted: initial value.",
        scalars_over_time,
    ),
    "activations": ("The activations after training, by layer; dotted: before.", activation_curves),
    "activation_changes": ("What training changed: learned less initial curve, by layer.", activation_changes),
}


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Writes every figure as ``folder/NAME.png`` and returns the same as SVG for the page, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    with house_style():
        for name, (_, make) in FIGURES.items():
            figure = make(results)
            if figure is not None:
                save_png(figure, folder / f"{name}.png")
                pictures[name] = to_svg(figure, name.replace("_", "-"))
    return pictures
