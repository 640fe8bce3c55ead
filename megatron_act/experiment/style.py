"""How figures look: colours for colour-blind readers too, SVG that follows the page's light or dark scheme."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
from matplotlib import colormaps
from matplotlib.figure import Figure

# Okabe and Ito's palette, the entries that read on white and on black; lines differ in dashes as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
INK = "#24292f"  # becomes the page's text colour in SVG
PAPER = "#ffffff"
DPI = 150

_RC: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "font.size": 9.5,
    "svg.fonttype": "none",
}


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib's settings for every figure of the report."""
    with matplotlib.rc_context(_RC):
        yield


def arm_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the arm at ``index`` of the experiment."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def layer_colours(layers: int) -> list[Any]:
    """One colour per layer along an even ramp, the first darkest; readable on white and on black."""
    ramp = colormaps["plasma"]
    return [ramp(0.3 + 0.52 * layer / max(1, layers - 1)) for layer in range(layers)]


def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure on white."""
    figure.savefig(path, dpi=DPI, facecolor=PAPER, bbox_inches="tight")


def to_svg(figure: Figure, name: str) -> str:
    """The figure as inline SVG: transparent, in the page's text colour, with ids of its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    head, _, body = svg.partition(">")
    width = re.search(r' width="([^"]*)"', head)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    natural = width[1] if width else "100%"  # equal letters in every figure; the page lets it shrink
    return f'{head} style="width: {natural}">{body}'
