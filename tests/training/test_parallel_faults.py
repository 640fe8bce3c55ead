"""A reduction of the scalars' gradients that is missing, doubled or averaged stops the run at its first step."""

import re
from pathlib import Path

import pytest
from training_support import MODEL_FLAGS, Run, Train, torchrun

from megatron_act.cpu_backend import FLAGS

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).parent / "workers" / "reductions.py")
TP2 = ["--tensor-model-parallel-size", "2"]
SHARDED = [*TP2, "--use-distributed-optimizer", "--overlap-grad-reduce"]  # on 4 ranks: 2 data-parallel ones
GRADIENT = re.compile(
    r"RuntimeError: layer 1, alpha_p: expected the gradient (\S+), the sum of all ranks' partials, got (\S+): "
    r"ratio (\S+), expected 1 \(2 tensor-parallel, (\d) data-parallel ranks"
)


def broken(forked_train: Train, fault: str, flags: list[str], ranks: int) -> Run:
    run = forked_train(
        "--activation", "xielu", "--train-iters", "4", *flags, ranks=ranks, prepare=["reductions", {"variant": fault}]
    )
    assert run.code != 0
    assert "no all-reduce of your own" in run.log, run.log[-3000:]
    return run


@pytest.mark.parametrize(
    ("fault", "flags", "ranks", "ratio"),
    [
        ("none", TP2, 2, None),
        ("both", TP2, 2, 2.0),
        ("marked", [*TP2, "--sequence-parallel"], 2, 2.0),
        ("average", TP2, 2, 0.5),
        ("both", SHARDED, 4, 2.0),
        ("wrong_group", SHARDED, 4, None),
    ],
)
def test_a_wrong_reduction_stops_the_run(
    fault: str, flags: list[str], ranks: int, ratio: float | None, forked_train: Train
) -> None:
    run = broken(forked_train, fault, flags, ranks)
    assert run.steps == []
    found = GRADIENT.search(run.log)
    assert found, run.log[-3000:]
    want, got, shown = (float(found.group(index)) for index in (1, 2, 3))
    assert shown == pytest.approx(got / want, rel=1e-3)
    assert int(found.group(4)) == ranks // 2
    if ratio is None:
        assert abs(shown - 1) > 0.01
    else:
        assert shown == pytest.approx(ratio, rel=1e-4)


def test_a_run_through_spec_is_checked_at_its_second_step(data_flags: list[str]) -> None:
    """Megatron-LM's own entry point: the sum in the backward pass is the only one there is."""
    spec = ["--spec", "megatron_act.specs", "xielu", "--train-iters", "4"]
    done = torchrun(WORKER, *FLAGS, *MODEL_FLAGS, *data_flags, *spec, *TP2, ranks=2)
    assert done.returncode != 0
    found = GRADIENT.search(done.stdout)
    assert found, done.stdout[-3000:]
    assert abs(float(found.group(3)) - 1) > 0.01
    assert "iteration        1/" in done.stdout
    assert "iteration        2/" not in done.stdout


def test_replicas_that_drift_apart_are_not_saved(forked_train: Train) -> None:
    run = broken(forked_train, "drift", [*TP2, "--save-interval", "3"], 2)
    assert len(run.steps) == 3
    assert not (run.checkpoint / "latest_checkpointed_iteration.txt").exists()
    found = re.search(
        r"RuntimeError: layer 3, alpha_n: expected equal raw values on 2 tensor-parallel ranks, got (\S+) to (\S+) "
        r"\(1 of 8 scalars differ\)",
        run.log,
    )
    assert found, run.log[-3000:]
    assert float(found.group(2)) - float(found.group(1)) == pytest.approx(1e-3, abs=2e-6)
