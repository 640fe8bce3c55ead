"""Merges one part of run.sh into tests/gpu_results.json, in the working folder.

python3 tests/gpu/evidence.py check
python3 tests/gpu/evidence.py record kernels --exit-code 0 --seconds 90 --command "bash tests/gpu/run.sh"
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path("tests/gpu_results.json")
WORK = Path(".gpu")
OUTCOMES = ("passed", "failed", "skipped")
FIGURES = {"benchmark": "kernels.json", "te-bandwidth": "fp8.json", "te-mlp": "mlp.json"}  # in .gpu/PART; the rest test


def load() -> dict[str, Any]:
    """Every part so far.

    Raises:
        ValueError: the file holds something else.
    """
    if not RESULTS.exists():
        return {}
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(part, dict) for part in found.values()):
        raise ValueError("no object of parts")
    return found


def merge(results: dict[str, Any], part: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The other parts stay; parts in alphabetical order, so that a diff shows what changed."""
    return dict(sorted({**results, part: entry}.items()))


def read_outcomes(path: Path) -> dict[str, Any]:
    """Names of the tests that passed, and those that failed or were skipped with why; none if nothing ran."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: dict[str, dict[str, str]] = {outcome: {} for outcome in OUTCOMES}
    for line in lines:
        entry = json.loads(line)
        for outcome in OUTCOMES:  # a test that passed and then failed in its tear-down has failed
            found[outcome].pop(entry["test"], None)
        found[entry["outcome"]][entry["test"]] = entry["why"]
    return {"passed": list(found["passed"]), "failed": found["failed"], "skipped": found["skipped"]}


def left_by(part: str, exit_code: int) -> dict[str, Any]:
    """The part's figures, or its tests' outcomes; {} where it wrote nothing.

    A part of Transformer Engine that ended before its first test is one failure, with the last line of its log.
    """
    if part in FIGURES:
        path = WORK / part / FIGURES[part]
        found = {"figures": json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}
    else:
        found = {"tests": read_outcomes(WORK / f"{part}.jsonl")}
    if part.startswith("te-") and exit_code and not any(found.get("tests", found).values()):
        return {"tests": {"passed": [], "failed": {part: _last_line(WORK / f"{part}.log")}, "skipped": {}}}
    return found


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line[:200] for line in reversed(lines) if line.strip()), "")


def _engine(part: str) -> dict[str, str]:
    """Transformer Engine's version, where the part is about it."""
    if part.startswith("te-") and importlib.util.find_spec("transformer_engine"):
        return {"Transformer Engine": importlib.metadata.version("transformer-engine")}
    return {}


def record(args: argparse.Namespace) -> int:
    """A benchmark that wrote nothing leaves the figures of an earlier one, which have their own date.

    Exit code 124 is the time limit's.
    """
    from megatron_act.benchmark.header import facts

    results, found = load(), left_by(args.part, args.exit_code)
    if not found or (args.part in FIGURES and "figures" not in found and "figures" in results.get(args.part, {})):
        return 0
    ended = {"seconds": args.seconds, "exit_code": args.exit_code}
    entry = {"command": args.command, **facts(), **_engine(args.part), **ended, **found}
    text = json.dumps(merge(results, args.part, entry), indent=1) + "\n"
    new = RESULTS.with_suffix(".json.part")
    new.write_text(text, encoding="utf-8")
    new.replace(RESULTS)
    return 0


def check() -> int:
    """2 with one line where the file cannot be merged into."""
    try:
        load()
    except ValueError as error:
        print(
            f"tests/gpu/run.sh: {RESULTS}: expected the JSON of earlier parts, got {error}: remove it", file=sys.stderr
        )
        return 2
    return 0


def main() -> int:
    """Entry point; returns the exit code."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parse.add_subparsers(dest="action", required=True)
    actions.add_parser("check", help="whether the file can be merged into")
    recording = actions.add_parser("record", help="merge one part")
    recording.add_argument("part")
    recording.add_argument("--command", required=True)
    recording.add_argument("--exit-code", type=int, required=True)
    recording.add_argument("--seconds", type=int, required=True)
    args = parse.parse_args()
    return check() if args.action == "check" else record(args)


if __name__ == "__main__":
    sys.exit(main())
