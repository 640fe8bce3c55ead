"""Renders the README's figures of the small reproduction from ``launch/reproduce_small.json``.

cp reproduce_small/summary.json launch/reproduce_small.json && python -m megatron_act.experiment.readme
(rewrites what is between the two markers of README.md)
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from megatron_act.experiment.budget_table import BUDGET_NAMES, paper_note, paper_table
from megatron_act.readme_section import ROOT, committed, main, replaced

RESULTS = Path("launch") / "reproduce_small.json"
PICTURE = Path("launch") / "reproduce_small.png"
BEGIN = "<!-- small reproduction: written by python -m megatron_act.experiment.readme -->"
END = "<!-- end of the small reproduction -->"
SAMPLE = "the packaged sample (openings of 6,400 Wikipedia articles), not FineWeb-Edu"
COMMAND = "bash launch/reproduce_small.sh"
NO_RUN = f"No run is committed yet: `{COMMAND}` makes one, from which this section is then written."


def section(results: dict[str, Any] | None, picture: bool = False) -> str:
    """The text between the markers; ``results`` is a ``summary.json``, None where there is none."""
    if not results:
        return NO_RUN
    parts = [_origin(results), paper_table(results), paper_note(results), _verdicts(results)]
    if picture:
        parts.append(f"![Differences in loss between arms, {results['corpus']}]({PICTURE.as_posix()})")
    return "\n\n".join(parts)


def _origin(results: dict[str, Any]) -> str:
    machine, arm, versions = results["machine"], results["arms"][0], results["runs"][0]["versions"]
    facts = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "megatron_act")
    shares = statistics.median(run["telemetry_share"] for run in results["runs"])
    size = f"{arm['parameters']:,} parameters, {arm['tokens']:,} training tokens a run, {len(results['runs'])} runs"
    return (
        f"`{_command(results)}`: {size}. Corpus: {results['corpus']}. {results['layout']}; {facts}, "
        f"commit {machine.get('commit', 'unknown')}. Telemetry took {shares:.2%} of the training time."
    )


def _command(results: dict[str, Any]) -> str:
    data = "" if results["corpus"] == SAMPLE else " --data PARQUET..."
    return f"{COMMAND}{data} --seeds {len(results['seeds'])} --steps {results['steps']}"


def _verdicts(results: dict[str, Any]) -> str:
    """What may be said, pair by pair; comparisons with the same runs are named together."""
    lines: dict[str, list[str]] = {}
    for name, comparison in results["budgets"].items():
        for pair in comparison["pairs"]:
            lines.setdefault(pair["verdict"], []).append(BUDGET_NAMES[name])
    return "\n".join(f"- {' and '.join(names)}: {words}" for words, names in lines.items())


def rendered(readme: str, root: Path = ROOT) -> str:
    """``readme`` with the section as ``root``'s JSON has it.

    Raises:
        UserError: no markers, or a JSON that cannot be read.
    """
    results = committed(root / RESULTS, "copy summary.json again")
    return replaced(readme, BEGIN, END, section(results, (root / PICTURE).exists()))


if __name__ == "__main__":
    sys.exit(main(__doc__, rendered))
