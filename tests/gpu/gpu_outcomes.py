"""pytest plugin of run.sh: appends each test's outcome to the file $GPU_OUTCOMES the moment it is known."""

import json
import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line per test; set-up and tear-down count only where they go wrong or skip."""
    if report.when == "call" or report.outcome != "passed":
        _append({"test": report.nodeid, "outcome": report.outcome, "why": _why(report)})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported is a failure."""
    if report.failed:
        _append({"test": report.nodeid, "outcome": "failed", "why": "cannot be collected"})


def _why(report: pytest.TestReport) -> str:
    """The reason of a skip, the last line of an error."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    if report.failed and hasattr(report.longrepr, "reprcrash"):
        return report.longrepr.reprcrash.message.split("\n")[0][:200]
    return ""


def _append(entry: dict[str, str]) -> None:
    with Path(os.environ["GPU_OUTCOMES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
