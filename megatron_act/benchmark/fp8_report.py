"""FP8 rows and the MLP under FP8 as JSON and Markdown."""

from typing import Any

from megatron_act.benchmark.fp8_mlp import BASELINES
from megatron_act.benchmark.fp8_ways import UNFUSED
from megatron_act.benchmark.report import EVENTS_NOTE, RATIO_NOTE, Result, ratio, time_text
from megatron_act.benchmark.table import Row, others_of
from megatron_act.benchmark.timing import EVENTS
from megatron_act.experiment.table import NOTHING, markdown

ROWS_NOTE = (
    "of byte ratio: the time of bf16 and quantizer over ours, as a share of what their bytes allow (aim: 90 %). "
    "A current scale's gradient has no row: its two passes move what they would save."
)
MLP_NOTE = "vs: time of the other over this one, above 1 this one is faster (aim: 1.00 for ReLU², 0.98 for SwiGLU)."
FIXED = ("recipe", "activation", "op", "shape", "bytes/element", "µs (p20 to p80)", "GB/s", "% of copy")


def rows_table(rows: list[Row]) -> str:
    """The FP8 rows as a Markdown table."""
    others = others_of(rows)
    headings = (*FIXED, *(f"vs {name}" for name in others), "byte ratio", "of byte ratio")
    return markdown(headings, [_cells(row, others) for row in rows])


def _cells(row: Row, others: list[str]) -> list[str]:
    reached = row["percent_of_byte_ratio"]
    return [
        row["recipe"], row["activation"], row["op"], row["shape"], f"{row['bytes_per_element']:.4g}",
        time_text(row), f"{row['gb_per_s']:,.1f}", f"{row['percent_of_copy']:.1f}",
        *(ratio(row["others"].get(name)) for name in others),
        f"{row['byte_ratio']:.2f}x", NOTHING if reached is None else f"{reached:.0f} %",
    ]  # fmt: skip


def rows_footnote(rows: list[Row]) -> str:
    """How to read the rows."""
    marked = any(EVENTS in (each["method"] for each in (row, *row["others"].values())) for row in rows)
    return " ".join([RATIO_NOTE, ROWS_NOTE, *_reached(rows), *([EVENTS_NOTE] if marked else [])])


def mlp_footnote(_rows: list[Row]) -> str:
    """How to read the MLPs."""
    return MLP_NOTE


def mlp_table(rows: list[Row]) -> str:
    """The MLPs as a Markdown table."""
    headings = ("recipe", "tokens x hidden x width", "MLP", "its width", "ms (p20 to p80)", "TFLOP/s")
    return markdown((*headings, *(f"vs {name}" for name in BASELINES)), [_mlp_cells(row) for row in rows])


def _mlp_cells(row: Row) -> list[str]:
    low, middle, high = (row[key] / 1e3 for key in ("p20_us", "median_us", "p80_us"))
    return [
        row["recipe"], row["shape"], row["mlp"], str(row["width"]),
        f"{middle:,.2f} ({low:,.2f} to {high:,.2f})", f"{row['tflops']:,.3g}",
        *(f"{row['over'][name]:.2f}x" if name in row["over"] else "" for name in BASELINES),
    ]  # fmt: skip


def _reached(rows: list[Row]) -> list[str]:
    """What was reached of the FP8 rows' aim: one sentence for each unfused way."""
    found = []
    for name in UNFUSED:
        reached = [row["percent_of_byte_ratio"] for row in rows if name in row["others"]]
        if reached:
            enough = sum(percent >= 90 for percent in reached)
            found.append(f"Over {name}: {enough} of {len(reached)} rows reach 90 % of their byte ratio.")
    return found


def rows_page(result: Result) -> str:
    """``fp8.md``."""
    rows = result["rows"]
    return _page("Activation and FP8", result, [rows_table(rows), rows_footnote(rows)])


def mlp_page(result: Result) -> str:
    """``mlp.md``."""
    return _page("The MLP under FP8, forward and backward", result, [mlp_table(result["rows"]), MLP_NOTE])


def _page(title: str, result: dict[str, Any], parts: list[str]) -> str:
    header = "  \n".join(f"{name}: {value}" for name, value in result["header"].items())
    notes = ["## Notes", "\n".join(f"- {note}" for note in result["notes"])] if result["notes"] else []
    return "\n\n".join([f"# {title}", header, *parts, *notes]) + "\n"
