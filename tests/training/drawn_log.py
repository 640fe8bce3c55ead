"""The log of a run over drawn cases: what was run, how far from the oracle, what the cases cover."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from drawn_cases import Case
from drawn_comparison import Differences


class DrawnLog:
    """Prints, and writes where asked to.

    Args:
        path: file, or None to print only.
    """

    def __init__(self, path: str | None) -> None:
        self.file = Path(path).open("w") if path else None  # noqa: SIM115  closed by close
        self.cases = 0
        self.seconds = 0.0
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        self.write(f"command: pytest {' '.join(sys.argv[1:])}")
        self.write(
            f"commit {commit.stdout.strip() or 'unknown'}, megatron-core {version('megatron-core')}, "
            f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, gloo"
        )

    def write(self, line: str) -> None:
        print(line)
        if self.file:
            print(line, file=self.file, flush=True)

    def add(self, case: Case, found: Differences, seconds: float, redraws: int) -> None:
        """A drawn case with its worst differences."""
        verdict = "equal" if not found.problems() else f"DIFFERS {found.problems()}"
        again = f", drawn again {redraws} times" if redraws else ""
        self.write(f"{self.cases} {case}: {verdict}: {found.worst()}; {seconds:.1f} s{again}")
        self.cases, self.seconds = self.cases + 1, self.seconds + seconds

    def add_mutant(self, mutant: str, case: Case, problems: Mapping[str, float]) -> None:
        """A broken reduction with what the comparison found."""
        worst = sorted(problems.items(), key=lambda pair: -pair[1])[:2]
        shown = ", ".join(f"{name} {error:.1e}" for name, error in worst)
        self.write(f"mutant {mutant}: {len(problems)} differences, {shown or 'NOT NOTICED'}; {case}")

    def add_coverage(self, counted: Mapping[str, Mapping[str, int]]) -> None:
        """How many cases have each value."""
        self.write("\ncoverage, cases by value:")
        for dimension, values in counted.items():
            self.write(f"  {dimension}: " + ", ".join(f"{value} {n}" for value, n in values.items()))

    def close(self) -> None:
        self.write(f"{self.cases} cases in {self.seconds:.0f} s")
        if self.file:
            self.file.close()
