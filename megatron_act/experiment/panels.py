"""What the report's figures share: grids of panels, keys of layers and arms, the runs that a figure shows."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from megatron_act.experiment.style import INK, arm_style, layer_colours

COLUMNS = 4  # panels side by side
LEGEND_LAYERS = 8  # more layers name only the first, middle and last
SMOOTHED_SHARE = 0.04  # of a run: width of the moving average
Results = dict[str, Any]


def runs_of(results: Results, arm: str) -> list[dict[str, Any]]:
    """The arm's runs at equal tokens, one per seed."""
    main = set(results["main"])
    return [run for run in results["runs"] if run["name"] == arm and run["folder"] in main]


def common_steps(runs: list[dict[str, Any]]) -> int:
    """Logged steps that all runs have: an unfinished one has fewer."""
    return min(len(run["curve"]["tokens"]) for run in runs)


def smooth(values: list[float] | np.ndarray) -> np.ndarray:
    """Centred moving average over `SMOOTHED_SHARE` of the points; at both ends over the part of it that exists."""
    array = np.asarray(values, dtype=np.float64)
    reach = int(len(array) * SMOOTHED_SHARE / 2)
    total = np.concatenate([[0.0], np.cumsum(array)])
    index = np.arange(len(array))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach, len(array) - 1) + 1
    return (total[high] - total[low]) / (high - low)


def single(width: float = 7.2, height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def grid(panels: int) -> Figure:
    """A figure with ``panels`` axes, at most `COLUMNS` in a row."""
    columns, rows = min(panels, COLUMNS), -(-panels // COLUMNS)
    figure = Figure(figsize=(max(4.0, 2.6 * columns), 2.6 * rows + 0.4), layout="constrained")
    figure.subplots(rows, columns, squeeze=False)
    for surplus in figure.axes[panels:]:
        surplus.remove()
    return figure


def layer_key(figure: Figure, layers: int, initial: bool = True) -> None:
    """Says which colour is which layer, above the panels."""
    shown = range(layers) if layers <= LEGEND_LAYERS else (0, layers // 2, layers - 1)
    colours = layer_colours(layers)
    handles = [Line2D([], [], color=colours[layer], linewidth=2) for layer in shown]
    labels = [f"layer {layer + 1}" for layer in shown]
    if initial:
        handles.append(Line2D([], [], color=INK, linewidth=1, linestyle=":"))
        labels.append("initial")
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def arm_key(figure: Figure, results: Results) -> None:
    """Says which colour and dashes are which arm, above the panels."""
    handles = [Line2D([], [], linewidth=2, **arm_style(index)) for index in range(len(results["arms"]))]
    labels = [arm["name"] for arm in results["arms"]]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), handlelength=3.2)


def count_axis(axes: Axes) -> None:
    """Large counts as 1 M, 2 G."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
