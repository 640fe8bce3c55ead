"""What a check found: passed with what is there, or failed with expected, got and what to do."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_act.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One check's outcome; ``problem`` is empty where it passed."""

    name: str
    got: str
    problem: str = ""

    @property
    def line(self) -> str:
        """The failed check as one line."""
        return f"failed: {self.name}: {' '.join(self.problem.split())}"


def failed(name: str, expected: str, got: str, remedy: str) -> Finding:
    """A failed check."""
    return Finding(name, got, f"expected {expected}, got {got}: {remedy}")


def caught(name: str, check: Callable[[], str]) -> Finding:
    """Runs a check that returns what it found; its `UserError`, or any other exception, is the problem."""
    try:
        return Finding(name, check())
    except UserError as error:
        return Finding(name, "", str(error).removeprefix(f"{name}: "))
    except Exception as error:
        return failed(name, "a check that runs", f"{type(error).__name__}: {error}", "correct what it names")


def merge(ranks: Sequence[Iterable[Finding]]) -> list[Finding]:
    """One list from those of all ranks.

    Each problem once, with the ranks that have it. A check that passed everywhere but found different things (versions,
    GPUs, files) is a failure too: a job must be the same on all of its nodes.
    """
    found: dict[str, dict[Finding, list[int]]] = {}
    for rank, findings in enumerate(ranks):
        for finding in findings:
            found.setdefault(finding.name, {}).setdefault(finding, []).append(rank)
    return [merged for name, variants in found.items() for merged in _merge_one(name, variants, len(ranks))]


def _merge_one(name: str, variants: dict[Finding, list[int]], world: int) -> list[Finding]:
    problems = {finding: ranks for finding, ranks in variants.items() if finding.problem}
    if problems:
        return [
            Finding(name, finding.got, finding.problem + (f" ({_ranks(ranks)})" if len(ranks) < world else ""))
            for finding, ranks in problems.items()
        ]
    if len(variants) == 1:
        return [next(iter(variants))]
    got = "; ".join(f"{finding.got} ({_ranks(ranks)})" for finding, ranks in variants.items())
    return [failed(name, "the same on all ranks", got, "make the nodes equal")]


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}"


def report(findings: Sequence[Finding]) -> str:
    """A table of what passed, then a line for each failure, then the count."""
    passed = [finding for finding in findings if not finding.problem]
    width = max((len(finding.name) for finding in passed), default=0)
    rows = [f"  {finding.name.ljust(width)}  {finding.got}".rstrip() for finding in passed]
    problems = [finding.line for finding in findings if finding.problem]
    return "\n".join([*rows, *problems, f"preflight: {len(passed)} checks passed, {len(problems)} failed"])
