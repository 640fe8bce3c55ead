"""Merges one part of run.sh into tests/gpu_results.json, in the working folder.

python3 tests/gpu/evidence.py check
python3 tests/gpu/evidence.py record kernels --exit-code 0 --seconds 90 --command "bash tests/gpu/run.sh"
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path("tests/gpu_results.json")
WORK = Path(".gpu")
OUTCOMES = ("passed", "failed", "skipped")


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


def entry_of(part: str, command: str, exit_code: int, seconds: int) -> dict[str, Any]:
    """What is recorded of a part; ``exit_code`` 124 is the time limit's.

    Raises:
        FileNotFoundError: a benchmark that wrote nothing.
    """
    from megatron_act.benchmark.header import facts

    shared = {"command": command, **facts(), "seconds": seconds, "exit_code": exit_code}
    if part != "benchmark":
        return {**shared, "tests": read_outcomes(WORK / f"{part}.jsonl")}
    return {**shared, "figures": json.loads((WORK / "benchmark" / "kernels.json").read_text(encoding="utf-8"))}


def record(args: argparse.Namespace) -> int:
    """A benchmark that wrote nothing leaves the figures of an earlier one, which have their own date."""
    try:
        entry = entry_of(args.part, args.command, args.exit_code, args.seconds)
    except FileNotFoundError:
        return 0
    text = json.dumps(merge(load(), args.part, entry), indent=1) + "\n"
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
