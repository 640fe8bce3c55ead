"""The roofline: how near to a copy's bandwidth every row comes, and where the others are."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from megatron_act.benchmark.cases import DECODE_ROWS
from megatron_act.benchmark.table import Row, others_of
from megatron_act.benchmark.timing import EVENTS
from megatron_act.experiment.style import COLOURS, DPI, INK, PAPER, house_style

MARKERS = ("o", "D", "s", "^", "v", "P", "X")
ROW_INCHES, WIDTH_INCHES = 0.21, 8.6
ABOVE_INCHES, TITLE_INCHES = 1.5, 0.55  # header and legend; title and gap of a panel
OP_TITLES = {
    "forward": "forward",
    "backward": "backward: gradients of x and of the scalars",
    "backward+value": "backward and the forward value again (recomputing)",
}


def picture(result: dict[str, Any]) -> bytes:
    """A PNG: one panel per operation, one bar per activation and shape, one marker per competitor."""
    panels = _panels(result["rows"])
    heights = [len(rows) * ROW_INCHES + TITLE_INCHES for rows in panels.values()]
    with house_style():
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + ABOVE_INCHES), layout="constrained")
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        styles = _styles(result["rows"])
        right = _right_end(result["rows"])
        for axes, (title, rows) in zip(grid, panels.items(), strict=True):
            _panel(axes, title, rows, styles, right)
        grid[-1].set_xlabel("% of the bandwidth of a plain copy, measured in the same run")
        launched = any(other["method"] == EVENTS for row in result["rows"] for other in row["others"].values())
        hollow = "; hollow: with launch costs" if launched else ""
        _legend(figure, styles, _title(result["header"]) + hollow)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=DPI, facecolor=PAPER)
    return stream.getvalue()


def _panels(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by title; steps of generation apart, because there a launch costs more than the memory."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        small = int(row["shape"].split("x")[0]) <= DECODE_ROWS
        title = "forward, steps of generation: the launch dominates" if small else OP_TITLES[row["op"]]
        panels.setdefault(title, []).append(row)
    return dict(sorted(panels.items(), key=lambda item: _order(item[0])))


def _order(title: str) -> int:
    titles = list(OP_TITLES.values())
    return titles.index(title) if title in titles else len(titles)


def _styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Marker and colour of everybody but us."""
    looks = zip(others_of(rows), MARKERS, (*COLOURS[1:], INK, INK), strict=False)
    return {name: {"marker": marker, "color": colour} for name, marker, colour in looks}


def _right_end(rows: list[Row]) -> float:
    """In %: beyond the copy only as far as a bar of ours or a marker goes, and not without end."""
    shown = [row["percent_of_copy"] for row in rows]
    shown += [row["percent_of_copy"] / other["over_ours"] for row in rows for other in row["others"].values()]
    return min(260.0, max(112.0, 1.12 * max(shown)))


def _panel(axes: Axes, title: str, rows: list[Row], styles: dict[str, dict[str, Any]], right: float) -> None:
    places = _places(rows)
    axes.barh(places, [row["percent_of_copy"] for row in rows], height=0.72, color=COLOURS[0], alpha=0.35, zorder=1)
    for place, row in zip(places, rows, strict=True):
        axes.plot([row["percent_of_copy"]] * 2, [place - 0.36, place + 0.36], color=COLOURS[0], linewidth=2.2, zorder=2)
        for name, other in row["others"].items():
            reached = min(row["percent_of_copy"] / other["over_ours"], right)
            fill = "none" if other["method"] == EVENTS else "full"
            axes.plot(reached, place, markersize=4.6, alpha=0.95, zorder=3, fillstyle=fill, **styles[name])
        axes.text(1.012, place, _speed(row), transform=axes.get_yaxis_transform(), fontsize=7.5, va="center", color=INK)
    axes.axvline(100.0, color=INK, linewidth=1.2, zorder=2)
    axes.set_yticks(places, [f"{row['activation']}  {row['shape'].replace('x', ' x ')}" for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=7.8)
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, right), ylim=(places[-1] + 0.7, -0.7), title=title)


def _places(rows: list[Row]) -> list[float]:
    """Heights from the top; a gap where an activation with several shapes begins or ends."""
    places, height = [], 0.0
    count = {row["activation"]: 0 for row in rows}
    for row in rows:
        count[row["activation"]] += 1
    for before, row in zip([rows[0], *rows[:-1]], rows, strict=True):
        apart = before["activation"] != row["activation"]
        height += 0.45 if apart and max(count[before["activation"]], count[row["activation"]]) > 1 else 0.0
        places.append(height)
        height += 1.0
    return places


def _speed(row: Row) -> str:
    return f"{row['median_us']:,.0f} µs" if row["median_us"] >= 100 else f"{row['median_us']:.1f} µs"


def _title(header: dict[str, str]) -> str:
    where = header.get("GPU") or f"CPU run (torch reference, no kernels): {header.get('processor', '')}"
    return f"{where}\ntorch {header['torch']}, Triton {header['triton']}, commit {header['commit']}, {header['date']}"


def _legend(figure: Figure, styles: dict[str, dict[str, Any]], title: str) -> None:
    handles: list[Any] = [Patch(color=COLOURS[0], alpha=0.5, label="megatron-act (time at the right)")]
    handles += [Line2D([], [], linestyle="", markersize=5.5, label=name, **style) for name, style in styles.items()]
    handles.append(Line2D([], [], color=INK, linewidth=1.2, label="a plain copy"))
    legend = figure.legend(handles=handles, loc="outside upper left", ncols=4, title=title, alignment="left")
    legend.get_title().set_fontsize(10)
