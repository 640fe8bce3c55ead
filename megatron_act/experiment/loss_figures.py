"""Loss against tokens, FLOPs and time: the mean over seeds in the band of its 95 % interval."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from megatron_act.experiment.intervals import CONFIDENCE, t_quantile
from megatron_act.experiment.panels import Results, common_steps, count_axis, runs_of, single, smooth
from megatron_act.experiment.style import arm_style

ToX = Callable[[list[dict[str, Any]], int], np.ndarray]


def loss_against_tokens(results: Results) -> Figure:
    """Training loss of every arm against tokens."""
    return _loss_figure(results, _tokens, "training tokens", "Training loss against tokens")


def loss_against_flops(results: Results) -> Figure:
    """Training loss of every arm against the FLOPs spent."""

    def to_flops(runs: list[dict[str, Any]], steps: int) -> np.ndarray:
        return _tokens(runs, steps) * runs[0]["flops_per_token"]

    label = "training FLOPs (matmuls, forward and backward)"
    return _loss_figure(results, to_flops, label, "Training loss against FLOPs")


def loss_against_seconds(results: Results) -> Figure:
    """Training loss of every arm against the time spent on training steps, mean over seeds."""
    label = "seconds of training steps (no evaluations, checkpoints or start-up)"
    figure = _loss_figure(results, _seconds, label, "Training loss against wall clock")
    figure.axes[0].xaxis.set_major_formatter(ScalarFormatter())  # no milliseconds
    return figure


def validation_against_tokens(results: Results) -> Figure | None:
    """Validation loss of every arm against tokens; None where it was measured once or never."""
    points = min(len(run["curve"]["validation"]) for arm in results["arms"] for run in runs_of(results, arm["name"]))
    if points < 2:
        return None
    figure, axes = single()
    for index, arm in enumerate(results["arms"]):
        rows = np.array([run["curve"]["validation"][:points] for run in runs_of(results, arm["name"])])
        _band(axes, rows[0, :, 0], rows[:, :, 1], arm_style(index))
        axes.plot(rows[0, :, 0], rows[:, :, 1].mean(axis=0), marker="o", markersize=3.5, **_line(index, arm))
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)", title="Validation loss")
    count_axis(axes)
    axes.legend(handlelength=3.2)
    return figure


def _tokens(runs: list[dict[str, Any]], steps: int) -> np.ndarray:
    return np.asarray(runs[0]["curve"]["tokens"][:steps], dtype=np.float64)


def _seconds(runs: list[dict[str, Any]], steps: int) -> np.ndarray:
    return np.mean([run["curve"]["train_seconds"][:steps] for run in runs], axis=0)


def _loss_figure(results: Results, to_x: ToX, label: str, title: str) -> Figure:
    figure, axes = single()
    ends: list[float] = []
    for index, arm in enumerate(results["arms"]):
        ends += _loss_lines(axes, runs_of(results, arm["name"]), to_x, index, arm)
    _zoom(axes, ends)
    axes.set(xlabel=label, ylabel="loss (nats per token)", title=title)
    count_axis(axes)
    axes.legend(handlelength=3.2)
    return figure


def _loss_lines(axes: Axes, runs: list[dict[str, Any]], to_x: ToX, index: int, arm: dict[str, Any]) -> list[float]:
    """Draws one arm: the smoothed mean over runs in its band, or over one run's raw loss; returns the visible range."""
    steps = common_steps(runs)
    losses = np.array([run["curve"]["losses"][:steps] for run in runs], dtype=np.float64)
    known = np.isfinite(losses).all(axis=0)  # a skipped step has none
    x = to_x(runs, steps)[known]
    smoothed = np.array([smooth(row[known]) for row in losses])
    if not len(x):
        return []
    if len(runs) == 1:
        axes.plot(x, losses[0, known], color=arm_style(index)["color"], alpha=0.22, linewidth=0.7)
    _band(axes, x, smoothed, arm_style(index))
    mean = smoothed.mean(axis=0)
    axes.plot(x, mean, **_line(index, arm))
    return [float(np.min(mean)), float(mean[len(mean) // 20])]


def _line(index: int, arm: dict[str, Any]) -> dict[str, Any]:
    return {"linewidth": 1.6, "label": arm["name"], **arm_style(index)}


def _band(axes: Axes, x: np.ndarray, rows: np.ndarray, style: dict[str, Any]) -> None:
    """The 95 % interval of the mean at each point."""
    runs = len(rows)
    if runs < 2:
        return
    half = t_quantile(0.5 + CONFIDENCE / 2, runs - 1) * rows.std(axis=0, ddof=1) / math.sqrt(runs)
    mean = rows.mean(axis=0)
    axes.fill_between(x, mean - half, mean + half, color=style["color"], alpha=0.16, linewidth=0)


def _zoom(axes: Axes, ends: list[float]) -> None:
    """Leaves the first steps' fall out of the range: it is the same for every arm and flattens the rest."""
    if not ends:
        return
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
