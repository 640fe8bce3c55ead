"""Random layouts, models and options give the gradients, gradient norms and losses of a plain fp64 model.

python -m pytest tests/training/test_drawn_layouts.py --drawn-cases 300 --drawn-log tests/training/drawn_cases.log
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import drawn_cases as drawn
import pytest
from drawn_cases import LEAST, Case, coverage, draw
from drawn_comparison import GRADIENT, MOVED, Differences, differences, has_bend, is_scalar, truth
from drawn_log import DrawnLog
from oracle_state import gather
from persistent_ranks import CASE_TIMEOUT_S, CaseFailed, PersistentRanks, persistent_ranks

from megatron_act.kernels import api as kernels

pytestmark = pytest.mark.distributed

REDRAWS = 10


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PersistentRanks]:
    with persistent_ranks(tmp_path_factory.mktemp("ranks") / "log.txt") as found:
        yield found


@pytest.fixture(scope="module")
def log(request: pytest.FixtureRequest) -> Iterator[DrawnLog]:
    found = DrawnLog(request.config.getoption("--drawn-log"))
    yield found
    found.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = draw(metafunc.config.getoption("--drawn-cases"))
        metafunc.parametrize("case", cases, ids=[f"{number}-{case.activation}" for number, case in enumerate(cases)])


def compare(ranks: PersistentRanks, case: Case) -> tuple[Case, Differences]:
    """Runs a case; another seed where fp32 need not decide as fp64 does."""
    for seed in range(case.seed, case.seed + REDRAWS):
        case = replace(case, seed=seed)
        outcome = ranks.run(case)
        known = truth(case, gather(outcome.shards))
        if not known.close:
            assert known.moved > MOVED, "expected the training to move the loss, it would show nothing"
            assert not case.clip or min(known.grad_norms) > drawn.CLIP, "expected every step to be clipped"
            return case, differences(outcome.ranks, outcome.shards, known)
    raise AssertionError(f"{case}: expected a seed without a close decision within {REDRAWS}, last: {known.close}")


def test_a_drawn_case_equals_the_oracle(case: Case, ranks: PersistentRanks, log: DrawnLog) -> None:
    started = time.monotonic()
    used, found = compare(ranks, case)
    log.add(used, found, time.monotonic() - started, used.seed - case.seed)
    assert found.problems() == {}, str(used)


def test_every_value_of_every_dimension_is_drawn(
    request: pytest.FixtureRequest, log: DrawnLog, capsys: pytest.CaptureFixture
) -> None:
    counted = coverage(draw(request.config.getoption("--drawn-cases")))
    with capsys.disabled():
        log.add_coverage(counted)
    assert {"tp", "cp", "ep", "experts", "activation", "reduction"} <= counted.keys()
    rare = {(key, value): n for key, values in counted.items() for value, n in values.items() if n < LEAST}
    assert rare == {}


def has_scalars(case: Case) -> bool:
    return bool(kernels.get(case.activation).params)


def splits_scalars(case: Case) -> bool:
    return has_scalars(case) and case.tp > 1


def is_replicated(case: Case) -> bool:
    """Whether several ranks have the gradients of the same parameters, in plain buffers."""
    plain = not (case.distributed_optimizer or case.overlap_grad_reduce or case.per_token_loss)
    return plain and case.dp * case.cp > 1


def divides_experts(case: Case) -> bool:
    """Whether experts' weights are reduced over other ranks than the rest: then Megatron's mark says which."""
    return case.experts != "none" and case.ep * case.etp != case.tp


KINDS = ("removed", "doubled", "averaged", "wrong-group")
SUITS: dict[str, Callable[[Case], bool]] = {  # the drawn cases that a broken reduction must change
    "backward": lambda case: splits_scalars(case) and case.reduction == "backward",
    "finalize": lambda case: splits_scalars(case) and case.reduction == "finalize",
    "data": lambda case: has_scalars(case) and is_replicated(case) and case.experts != "per expert",
    "data wrong-group": lambda case: has_scalars(case) and not case.distributed_optimizer and divides_experts(case),
    "norms": lambda case: case.sp and not case.distributed_optimizer,
    "bias": lambda case: case.sp and case.experts != "none" and case.bias,
    "norm": splits_scalars,
}
SPOILS: dict[str, Callable[[str], bool]] = {  # the gradients that it spoils, if they are not the scalars'
    "norms": lambda name: "norm" in name and not re.search("[qk]_layernorm", name),
    "bias": lambda name: name.endswith("linear_fc2.bias"),
    "norm": lambda name: False,  # the gradients are right, the norm counts them twice
}
MUTANTS = [f"{reduction} {kind}" for reduction in ("backward", "finalize", "data", "norms") for kind in KINDS]


def mutated(mutant: str) -> Case:
    """Of the drawn cases that the mutant must change the quickest; none whose activation has a bend, they are redrawn.

    A wrong group is that of the data-parallel ranks, which must be several.
    """
    suits = SUITS.get(mutant, SUITS[mutant.split()[0]])
    fits = lambda case: suits(case) and (case.dp * case.cp > 1 or "wrong-group" not in mutant)  # noqa: E731
    suited = [case for case in draw(200) if fits(case) and not has_bend(case.activation)]
    return replace(min(suited, key=lambda case: case.world * case.micro_batches), mutant=mutant)


@pytest.mark.parametrize("mutant", [*MUTANTS, "bias doubled", "norm doubled"])
def test_a_broken_reduction_is_noticed(mutant: str, ranks: PersistentRanks, log: DrawnLog) -> None:
    """It spoils what it should, by much, and nothing else: the other gradients of the step are right."""
    reduction = mutant.split()[0]
    case, found = compare(ranks, mutated(mutant))
    problems = found.problems()
    log.add_mutant(mutant, case, problems)
    spoiled = {name: error for name, error in problems.items() if name in found.gradients}
    assert problems
    assert [name for name in spoiled if not SPOILS.get(reduction, is_scalar)(name)] == []
    assert reduction == "norm" or max(spoiled.values()) > 100 * GRADIENT


@pytest.mark.parametrize(
    ("fault", "says", "timeout_s"),
    [
        ("raises", "rank 1 fails on purpose", CASE_TIMEOUT_S),
        ("exits", "rank 1: the process ended", CASE_TIMEOUT_S),
        ("waits", r"ranks \[0, 1\]: no answer in time", 5.0),
    ],
)
def test_a_failing_rank_fails_its_case_alone(fault: str, says: str, timeout_s: float, ranks: PersistentRanks) -> None:
    with pytest.raises(CaseFailed, match=says):
        ranks.run(Case(1, tp=2, mutant=fault), timeout_s)
    _, found = compare(ranks, Case(1, tp=2))
    assert found.problems() == {}
