"""Two panels on a data set: how long its documents are, and how its tokens are distributed."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from megatron_act.data.inspect_statistics import Lengths, TokenCounts
from megatron_act.experiment.style import COLOURS, INK, house_style, save_png

BINS = 48
PERCENTILES = (5, 50, 95)
COVERAGES = (0.5, 0.9, 0.99)


def draw(title: str, lengths: Lengths, tokens: TokenCounts, path: Path) -> Figure:
    """Write the figure as PNG, on white."""
    with house_style():
        figure = Figure(figsize=(10.4, 4.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        _lengths_panel(left, lengths)
        _tokens_panel(right, tokens)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
        save_png(figure, path)
    return figure


def length_shares(lengths: Lengths) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole-numbered bounds of bins even on a log scale, and each bin's share of the documents and of the tokens."""
    low, high = max(1, int(lengths.values[0])), int(lengths.values[-1]) + 1
    bounds = np.unique(np.geomspace(low, high, BINS + 1).round().astype(np.int64))
    values = np.maximum(lengths.values, low)  # an empty document is drawn with the shortest
    documents, _ = np.histogram(values, bounds, weights=lengths.counts)
    tokens, _ = np.histogram(values, bounds, weights=lengths.counts * lengths.values)
    return bounds, documents / lengths.counts.sum(), tokens / max(1, tokens.sum())


def _lengths_panel(axes: Axes, lengths: Lengths) -> None:
    bounds, documents, tokens = length_shares(lengths)
    axes.stairs(documents, bounds, fill=True, color=COLOURS[0], alpha=0.55, label="of the documents")
    axes.stairs(tokens, bounds, color=COLOURS[1], linewidth=1.8, label="of the tokens")
    axes.set_ylim(0, 1.22 * max(documents.max(), tokens.max()))  # room for the percentiles' names
    for percent in PERCENTILES:
        value = max(1, lengths.percentile(percent))
        axes.axvline(value, color=INK, linewidth=0.9, linestyle=":")
        name = "median" if percent == 50 else f"{percent} %"
        axes.annotate(
            f" {name}\n {value:,}", (value, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color=INK
        )
    axes.set_xscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if documents.max() > 0.05 else 1))
    axes.set(title="Document length", xlabel="tokens in a document", ylabel="share in each bin")
    _finish(axes)


def _tokens_panel(axes: Axes, tokens: TokenCounts) -> None:
    shares = tokens.shares()
    ranks = np.arange(1, len(shares) + 1)
    axes.plot(ranks, shares, color=COLOURS[0], linewidth=1.8)
    axes.plot(ranks, shares[0] / ranks, color=INK, linewidth=0.9, linestyle=":", label="1 / rank (Zipf)")
    places = np.minimum(np.searchsorted(np.cumsum(shares), COVERAGES), len(shares) - 1)
    axes.plot(ranks[places], shares[places], "o", color=COLOURS[1], markersize=5)
    covered = [
        f"{ranks[place]:,} tokens are {coverage:.0%} of the text"
        for coverage, place in zip(COVERAGES, places, strict=True)
    ]
    axes.text(0.03, 0.04, "\n".join(covered), transform=axes.transAxes, fontsize=8.5, color=COLOURS[1])
    sampled = "" if tokens.seen == tokens.total else f" (of {tokens.seen:,} tokens, sampled)"
    axes.set(xscale="log", yscale="log", title="Token frequency" + sampled)
    axes.set(xlabel="rank of the token", ylabel="share of all tokens")
    axes.set_ylim(bottom=shares[-1] / 3)
    _finish(axes)


def _finish(axes: Axes) -> None:
    """Plain numbers below, the grid behind, the legend on the title's line, where no data is."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=2, borderaxespad=0.0)
