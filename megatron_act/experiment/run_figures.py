"""How the runs went and what their differences are worth: tests, learning rates, gradient norms, speed and memory."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_act.experiment.budget_table import BUDGET_NAMES
from megatron_act.experiment.panels import Results, arm_key, common_steps, count_axis, grid, layer_key, runs_of, smooth
from megatron_act.experiment.style import INK, arm_style, layer_colours
from megatron_act.experiment.table import GIB


def differences(results: Results) -> Figure | None:
    """Every pair's mean difference with its 95 % interval, a panel for each comparison; None with one seed."""
    found = {name: [p for p in each["pairs"] if p["low"] is not None] for name, each in results["budgets"].items()}
    found = {name: pairs for name, pairs in found.items() if pairs}
    if not found:
        return None
    rows = max(len(pairs) for pairs in found.values())
    figure = Figure(figsize=(2.2 + 2.6 * len(found), 1.3 + 0.34 * rows), layout="constrained")
    every = figure.subplots(1, len(found), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, pairs) in zip(every, found.items(), strict=True):
        _difference_panel(axes, pairs, BUDGET_NAMES[name])
    return figure


def _difference_panel(axes: Axes, pairs: list[dict[str, Any]], title: str) -> None:
    axes.axvline(0.0, color=INK, linewidth=1.0, linestyle=":")
    for row, pair in enumerate(pairs):
        certain = pair["p_holm"] < 0.05
        colour = arm_style(0)["color"] if certain else INK
        axes.plot([pair["low"], pair["high"]], [row, row], color=colour, linewidth=2.0, alpha=1.0 if certain else 0.6)
        axes.plot(pair["mean"], row, "o", color=colour, markersize=5, fillstyle="full" if certain else "none")
    names = [f"{pair['second']} - {pair['first']}" for pair in pairs]
    axes.set_yticks(range(len(pairs)), names)
    axes.set(title=title, xlabel="difference, nats", ylim=(len(pairs) - 0.4, -0.6))
    axes.grid(axis="y", visible=False)


def learning_rates(results: Results) -> Figure | None:
    """Mean validation loss of the tuning runs against the learning rate; None where none were compared."""
    if not results["sweep"]:
        return None
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, arm in enumerate(results["arms"]):
        losses = {float(rate): values for rate, values in results["sweep"].get(arm["name"], {}).items()}
        means = {rate: np.mean(values) for rate, values in sorted(losses.items()) if None not in values}
        axes.plot(list(means), list(means.values()), marker="o", markersize=4, **arm_style(index))
        if arm["rate"] in means:
            axes.plot(
                arm["rate"], means[arm["rate"]], "o", markersize=9, fillstyle="none", color=arm_style(index)["color"]
            )
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss", title="Tuning runs; ringed: chosen")
    rates = results["learning_rates"]
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    arm_key(figure, results)
    return figure


def gradient_norms(results: Results) -> Figure:
    """Norm of all gradients before clipping, of every arm, mean over seeds."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, arm in enumerate(results["arms"]):
        runs = runs_of(results, arm["name"])
        steps = common_steps(runs)
        norms = np.array([run["curve"]["grad_norms"][:steps] for run in runs], dtype=np.float64).mean(axis=0)
        known = np.isfinite(norms)
        tokens = np.asarray(runs[0]["curve"]["tokens"][:steps])[known]
        axes.plot(tokens, smooth(norms[known]), linewidth=1.5, label=arm["name"], **arm_style(index))
    axes.set(xlabel="training tokens", ylabel="gradient norm", yscale="log", title="Gradient norm before clipping")
    count_axis(axes)
    axes.legend(handlelength=3.2)
    return figure


def scalar_gradients(results: Results) -> Figure | None:
    """Absolute gradient of every layer's raw scalars; None without any."""
    panels = [
        (arm["name"], name)
        for arm in results["arms"]
        for name in runs_of(results, arm["name"])[0]["curve"]["scalar_gradients"]
    ]
    if not panels:
        return None
    figure, layers = grid(len(panels)), 0
    for axes, (arm, name) in zip(figure.axes, panels, strict=True):
        layers = max(layers, _gradient_panel(axes, runs_of(results, arm), name))
    layer_key(figure, layers, initial=False)
    return figure


def _gradient_panel(axes: Axes, runs: list[dict[str, Any]], name: str) -> int:
    steps = common_steps(runs)
    values = np.abs([run["curve"]["scalar_gradients"][name][:steps] for run in runs]).mean(axis=0)
    for layer, colour in enumerate(layer_colours(values.shape[1])):
        axes.plot(runs[0]["curve"]["tokens"][:steps], smooth(values[:, layer]), color=colour, linewidth=1.3)
    axes.set(title=f"{runs[0]['name']}: {name}", xlabel="training tokens", ylabel="|dL/d raw|", yscale="log")
    count_axis(axes)
    return values.shape[1]


def speed_and_memory(results: Results) -> Figure:
    """Tokens per second and peak memory of every arm, each run a dot, means as bars."""
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(results["arms"])), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, results, "tokens_per_second", 1.0)
    _bars(right, results, "peak_memory_bytes", GIB)
    left.set(xlabel="tokens per second")
    count_axis(left)
    right.set(xlabel="peak memory, GiB")
    left.set_yticks(range(len(results["arms"])), [arm["name"] for arm in results["arms"]])
    left.invert_yaxis()
    return figure


def _bars(axes: Axes, results: Results, key: str, unit: float) -> None:
    for index, arm in enumerate(results["arms"]):
        values = [run[key] / unit for run in runs_of(results, arm["name"]) if run[key] is not None]
        if values:
            colour = arm_style(index)["color"]
            axes.barh(index, math.fsum(values) / len(values), height=0.55, color=colour, alpha=0.35)
            axes.plot(values, [index] * len(values), ".", color=colour, markersize=5)
    axes.grid(axis="y", visible=False)
