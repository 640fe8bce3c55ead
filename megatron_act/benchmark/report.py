"""A run as JSON, CSV, Markdown and a picture; the files appear whole or not at all."""

import csv
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_act.benchmark.picture import picture
from megatron_act.benchmark.table import OURS, Row, others_of
from megatron_act.benchmark.timing import EVENTS
from megatron_act.errors import UserError
from megatron_act.experiment.table import markdown

STEM = "kernels"
Result = dict[str, Any]  # header: name and value; rows: table.Row; mlp: mlp.shares; notes
SHARED = ("op", "activation", "shape", "dtype", "bytes_per_element", "gb_per_s", "percent_of_copy")
TIMES = ("median_us", "p20_us", "p80_us", "method")
MLP_HEADINGS = ("activation", "shape", "hidden", "fc1 µs", "activation µs", "fc2 µs", "its share", "slowest part")
RATIO_NOTE = "vs: time of the other over ours, above 1 ours is faster."
EVENTS_NOTE = "*: not capturable in a CUDA graph, timed launch by launch with what Python needs for it."


def check_folder(folder: Path) -> None:
    """Raises UserError where the files could not be written later."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"--output: expected a folder that can be written, got {folder} ({error.strerror})") from None


def rounded(value: Any) -> Any:
    """Every float in it with five digits: more would be noise, and a diff of nothing else."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def write(result: Result, folder: Path) -> list[Path]:
    """Writes ``kernels.json``, ``.csv``, ``.md`` and ``.png``; returns their paths."""
    result = rounded(result)
    more = {"csv": csv_text(result["rows"]).encode(), "png": picture(result)}
    return save(STEM, result, page(result), folder, more)


def save(stem: str, result: Result, text: str, folder: Path, more: Mapping[str, bytes] | None = None) -> list[Path]:
    """``stem.json``, ``stem.md`` and ``more`` by suffix; returns their paths."""
    data = (json.dumps(rounded(result), indent=1) + "\n").encode()
    contents = {"json": data, "md": text.encode(), **(more or {})}
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in contents.items():
        (folder / f".{stem}.{suffix}.part").write_bytes(content)
    return [(folder / f".{stem}.{suffix}.part").replace(folder / f"{stem}.{suffix}") for suffix in contents]


def csv_text(rows: list[Row]) -> str:
    """One line per row, the others' figures in columns of their own."""
    columns = [*SHARED, *(f"{OURS} {key}" for key in TIMES)]
    columns += [f"{name} {key}" for name in others_of(rows) for key in (*TIMES, "over_ours")]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {key: row[key] for key in SHARED} | {f"{OURS} {key}": row[key] for key in TIMES}
        flat |= {f"{name} {key}": value for name, other in row["others"].items() for key, value in other.items()}
        writer.writerow(flat)
    return stream.getvalue()


def page(result: Result) -> str:
    """The Markdown page: header, rows, the MLP, notes."""
    parts = ["# Activation kernels", "  \n".join(f"{name}: {value}" for name, value in result["header"].items())]
    parts += [rows_table(result["rows"]), footnote(result["rows"])]
    if result["mlp"]:
        parts += ["## Share of the MLP's time, forward and backward", mlp_table(result["mlp"])]
    if result["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in result["notes"])]
    return "\n\n".join(parts) + "\n"


def rows_table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    others = others_of(rows)
    headings = ("activation", "op", "shape", "bytes/element", "µs (p20 to p80)", "GB/s", "% of copy")
    return markdown((*headings, *(f"vs {name}" for name in others)), [_cells(row, others) for row in rows])


def footnote(rows: list[Row]) -> str:
    """How to read the ratios."""
    marked = any(EVENTS in (each["method"] for each in (row, *row["others"].values())) for row in rows)
    return f"{RATIO_NOTE} {EVENTS_NOTE}" if marked else RATIO_NOTE


def _cells(row: Row, others: list[str]) -> list[str]:
    return [
        row["activation"], row["op"], row["shape"], str(row["bytes_per_element"]), time_text(row),
        f"{row['gb_per_s']:,.1f}", f"{row['percent_of_copy']:.1f}",
        *(ratio(row["others"].get(name)) for name in others),
    ]  # fmt: skip


def time_text(row: Row) -> str:
    """``123.4 (120.0 to 130.0)``, with a star where launches were timed one by one."""
    mark = "*" if row["method"] == EVENTS else ""
    return f"{row['median_us']:,.1f}{mark} ({row['p20_us']:,.1f} to {row['p80_us']:,.1f})"


def ratio(other: dict[str, Any] | None) -> str:
    """``1.25x``, starred as the time is; empty where nothing was measured."""
    if other is None:
        return ""
    return f"{other['over_ours']:.2f}x{'*' if other['method'] == 'events' else ''}"


def mlp_table(entries: list[dict[str, Any]]) -> str:
    """Time of an MLP's parts, per activation."""
    rows = [
        [
            entry["activation"],
            entry["shape"],
            str(entry["hidden"]),
            *(f"{entry[f'{part}_us']:,.0f}" for part in ("fc1", OURS, "fc2")),
            f"{entry['share_percent']:.0f} %",
            entry["slowest"],
        ]
        for entry in entries
    ]
    return markdown(MLP_HEADINGS, rows)
