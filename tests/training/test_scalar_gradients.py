"""The scalars' gradients under tensor parallelism equal the unsharded ones; without the reduction they do not."""

import json
from pathlib import Path

import pytest
from training_support import torchrun

WORKER = str(Path(__file__).parent / "workers" / "scalar_gradients.py")
BOUND = {"float32": 1e-6, "float64": 1e-10}  # of the sum of the absolute terms

pytestmark = pytest.mark.distributed


def errors(ranks: int, *flags: str) -> dict[tuple[str, str, str], float]:
    """Worst relative error over the ranks by (activation, scalar, dtype), for every trainable activation."""
    done = torchrun(WORKER, *flags, ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))[7:])
    found = {}
    for name, scalars in report.items():
        for key, values in scalars.items():
            for dtype in BOUND:
                assert len(values[dtype]) == ranks
                worst = max(abs(value - values["truth"]) for value in values[dtype])
                found[name, key, dtype] = worst / values["terms"]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_equal_the_unsharded_ones(ranks: int) -> None:
    found = errors(ranks)
    assert {("xielu", "alpha_p", "float32"), ("xielu", "alpha_n", "float64"), ("crrelu", "eps", "float64")} <= set(
        found
    )
    assert {key: error for key, error in found.items() if error > BOUND[key[2]]} == {}


def test_without_the_reduction_every_scalar_is_wrong() -> None:
    found = errors(2, "--without-reduction")
    assert {key: error for key, error in found.items() if error < 100 * BOUND[key[2]]} == {}
