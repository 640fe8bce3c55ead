"""Renders the README's GPU figures from ``tests/gpu_results.json``, and its table of bytes from ``fp8_bytes``.

python -m megatron_act.benchmark.readme     (rewrites what is between the markers of README.md)
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_act import fp8_bytes
from megatron_act.benchmark import fp8_report
from megatron_act.benchmark.cases import FULL
from megatron_act.benchmark.report import footnote, mlp_table, rows_table
from megatron_act.benchmark.table import Row
from megatron_act.readme_section import ROOT, committed, main, replaced

BEGIN = "<!-- GPU figures: written by python -m megatron_act.benchmark.readme -->"
END = "<!-- end of GPU figures -->"
BYTES_BEGIN = "<!-- FP8 bytes: written by python -m megatron_act.benchmark.readme -->"
BYTES_END = "<!-- end of FP8 bytes -->"
COMMAND = "WHEELS=dir bash tests/gpu/run.sh"
NO_RUN = (
    f"No GPU run is committed yet. On a machine with an NVIDIA GPU `{COMMAND}` makes one in 8 minutes: the\n"
    "GPU tests and the benchmark, as `tests/gpu_results.json`, from which this section is then written."
)
PICTURE = "tests/gpu_results.png"
TIMED_OUT = (124, 137)  # exit codes of `timeout`
SHOWN_FACTS = ("driver", "SM clock", "CUDA", "torch", "triton", "Python")


def section(results: dict[str, Any] | None, picture: bool = False) -> str:
    """The text between the markers; ``results`` is the content of the JSON, None where there is none."""
    if not results:
        return NO_RUN
    parts = [_benchmark(results["benchmark"])] if "benchmark" in results else []
    if picture and parts:
        parts.append(f"![Share of a copy's bandwidth, every row]({PICTURE})")
    parts += [_fp8(results[name], *tables) for name, tables in FP8_PARTS.items() if "figures" in results.get(name, {})]
    parts += [_tests(name, part) for name, part in results.items() if "tests" in part]
    return "\n\n".join(parts)


def _benchmark(part: dict[str, Any]) -> str:
    figures = part["figures"]
    shown = [row for row in figures["rows"] if row["activation"] in FULL and _first_or_small(row, figures["rows"])]
    tables = [_machine(part), rows_table(shown), footnote(shown), *_others(figures["rows"])]
    if mlp := [entry for entry in figures["mlp"] if entry["shape"] in {row["shape"] for row in shown}]:
        tables += ["The activation in its MLP on one rank, forward and backward:", mlp_table(mlp)]
    tables += [f"Not in the table: {note}." for note in figures["notes"]]
    return "\n\n".join(tables)


def _machine(part: dict[str, Any]) -> str:
    header = part["figures"]["header"]
    facts = ", ".join(f"{name} {header[name]}" for name in SHOWN_FACTS if name in header)
    return (
        f"`{part['command']}` on {header.get('GPU', header.get('processor'))}, {facts}, commit {part['commit']}, "
        f"{part['date']}. Copy: {header['copy']}. Compared with {header['compared with']}; "
        f"not installed: {header.get('not installed', 'none')}. Device time, buffers larger than L2."
    )


def _fp8(part: dict[str, Any], title: str, table: Callable[[list[Row]], str], note: Callable[[list[Row]], str]) -> str:
    """The first shape of a part about FP8."""
    header, rows = part["figures"]["header"], part["figures"]["rows"]
    facts = ", ".join(f"{name} {header[name]}" for name in (*SHOWN_FACTS, "Transformer Engine") if name in header)
    where = f"`{part['command']}` on {header.get('GPU', header.get('processor'))}, {facts}"
    shown = [row for row in rows if row["shape"] == rows[0]["shape"]]
    lines = [f"{title}: {where}, commit {part['commit']}, {part['date']}.", table(shown), note(shown)]
    lines += [f"Not in the table: {left_out}." for left_out in part["figures"]["notes"]]
    return "\n\n".join(lines)


FP8_PARTS = {
    "te-bandwidth": ("Activation and FP8", fp8_report.rows_table, fp8_report.rows_footnote),
    "te-mlp": ("The MLP under FP8, forward and backward", fp8_report.mlp_table, fp8_report.mlp_footnote),
}


def _first_or_small(row: Row, rows: list[Row]) -> bool:
    """The activation's first shape, and generation."""
    shapes = list(dict.fromkeys(each["shape"] for each in rows if each["activation"] == row["activation"]))
    with_backward = {each["shape"] for each in rows if each["op"] == "backward"}
    return row["shape"] == shapes[0] or row["shape"] not in with_backward


def _others(rows: list[Row]) -> list[str]:
    """One sentence for the activations without a row of their own."""
    rest = [row for row in rows if row["activation"] not in FULL]
    if not rest:
        return []
    found = []
    for op in dict.fromkeys(row["op"] for row in rest):
        shares = [row["percent_of_copy"] for row in rest if row["op"] == op]
        low, high = f"{min(shares):.0f}", f"{max(shares):.0f}"
        found.append(f"{op} {low if low == high else f'{low} to {high}'} %")
    return [f"{', '.join(dict.fromkeys(row['activation'] for row in rest))}: {', '.join(found)} of the copy."]


def _tests(name: str, part: dict[str, Any]) -> str:
    counts = ", ".join(f"{len(part['tests'][outcome])} {outcome}" for outcome in ("passed", "failed", "skipped"))
    stopped = ", stopped at the time limit" if part["exit_code"] in TIMED_OUT else ""
    return f"Tests on the GPU, {name}: {counts}{stopped} (commit {part['commit']}, {part['date']})."


def rendered(readme: str, root: Path = ROOT) -> str:
    """``readme`` with the GPU figures as ``root``'s JSON has them.

    Raises:
        UserError: no markers, or a JSON that cannot be read.
    """
    results = committed(root / "tests" / "gpu_results.json", f"run {COMMAND} again")
    return replaced(readme, BEGIN, END, section(results, (root / PICTURE).exists()))


def with_bytes(readme: str) -> str:
    """``readme`` with the table of `fp8_bytes`.

    Raises:
        UserError: no markers.
    """
    return replaced(readme, BYTES_BEGIN, BYTES_END, fp8_bytes.table())


if __name__ == "__main__":
    sys.exit(main(__doc__, lambda readme: with_bytes(rendered(readme))))
