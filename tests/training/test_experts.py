"""Mixture of experts: the scalars' gradients, losses, checkpoints and refusals do not depend on the layout."""

import json
from pathlib import Path

import pytest
from training_support import torchrun

WORKERS = Path(__file__).parent / "workers"
BOUND = 1e-10  # of the gradient, fp64


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    """All layouts on 4 ranks, with shared scalars and with one set per expert, right and with each mutant."""
    done = torchrun(str(WORKERS / "expert_gradients.py"), ranks=4)
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))[7:])


def label(case: dict) -> str:
    sets = "per expert" if case["per_expert"] else "shared"
    return f"tp{case['tp']} ep{case['ep']} etp{case['etp']} {case['dispatcher']} {sets}: {case['mutant']}"


def error(case: dict) -> float:
    """Worst relative error of any set of scalars on any rank."""
    pairs = [
        (value, truth)
        for rank in case["ranks"]
        for name, values in rank.items()
        for value, truth in zip(values, case["truth"][name], strict=True)
    ]
    return max(abs(value - truth) / max(1, abs(truth)) for value, truth in pairs)


@pytest.mark.distributed
def test_gradients_equal_the_unsharded_ones_in_every_layout(cases: list[dict]) -> None:
    right = [case for case in cases if case["mutant"] == "none"]
    assert len(right) == 20
    for case in right:
        owned = set().union(*case["ranks"])
        assert owned == set(case["truth"]), label(case)  # every set of scalars lives on some rank
    assert {label(case): error(case) for case in right if error(case) > BOUND} == {}


@pytest.mark.distributed
def test_an_expert_without_tokens_has_zero_gradients(cases: list[dict]) -> None:
    """Under overlap-grad-reduce, which refuses a missing gradient."""
    found = [
        rank["expert 3"] for case in cases if case["mutant"] == "none" for rank in case["ranks"] if "expert 3" in rank
    ]
    assert len(found) > 10
    assert all(values == [0.0, 0.0] for values in found)
    assert all(min(map(abs, case["truth"]["expert 1"])) > 1 for case in cases if case["per_expert"])


def is_caught(case: dict) -> bool:
    """Whether a mutant changes the groups that are summed over: else it is the right program."""
    tp, ep, etp = case["tp"], case["ep"], case["etp"]
    return {
        "no tensor sum": tp > 1 or (case["per_expert"] and etp > 1),
        "other buffer": ep * etp != tp,
        "also over experts": ep > 1 if case["per_expert"] else ep * etp != tp,
    }[case["mutant"]]


@pytest.mark.distributed
@pytest.mark.parametrize("mutant", ["no tensor sum", "other buffer", "also over experts"])
def test_a_wrong_reduction_gives_wrong_gradients(cases: list[dict], mutant: str) -> None:
    mutants = [case for case in cases if case["mutant"] == mutant]
    assert sum(is_caught(case) for case in mutants) >= 10
    assert [label(case) for case in mutants if (error(case) > 1e-3) != is_caught(case)] == []
