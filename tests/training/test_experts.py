"""Mixture of experts: the scalars' gradients, losses, checkpoints and refusals do not depend on the layout."""

import json
from pathlib import Path

import pytest
from training_support import EP2, INITIAL, MOE, Run, Train, torchrun

from megatron_act.checkpoint.reader import MegatronCheckpoint

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
    right = [case for case in cases if case["mutant"] == "none" and not case["grouped"]]
    assert len(right) == 20
    for case in right:
        owned = set().union(*case["ranks"])
        assert owned == set(case["truth"]), label(case)  # every set of scalars lives on some rank
    assert {label(case): error(case) for case in right if error(case) > BOUND} == {}


@pytest.mark.distributed
def test_gradients_equal_the_unsharded_ones_through_grouped_experts(cases: list[dict]) -> None:
    """Megatron's TEGroupedMLP with a plain-torch grouped linear in place of Transformer Engine's."""
    grouped = [case for case in cases if case["grouped"]]
    assert {case["ep"] for case in grouped} == {1, 2, 4}
    assert {label(case): error(case) for case in grouped if error(case) > BOUND} == {}


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


TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1"]
LAYOUTS = {"ep1": (1, []), "dp2": (2, []), "ep2": (2, EP2), "tp2_ep2": (2, [*EP2, *TP2])}
STEPS = 8
TOLERANCE = 1e-4  # nats, fp32
WEIGHTS_ONLY = ["--no-load-optim", "--no-load-rng"]


def check(run: Run) -> Run:
    assert run.code == 0, run.log[-3000:]
    return run


def curves(forked_train: Train, sets: list[str], layouts: tuple[str, ...]) -> dict[str, Run]:
    """The same training in several layouts, all from one checkpoint of initial weights."""
    initial = check(forked_train(*MOE, *sets, *INITIAL)).checkpoint
    flags = [*MOE, *sets, "--train-iters", str(STEPS), "--save-interval", "4", "--load", str(initial), "--finetune"]
    return {
        name: check(forked_train(*flags, *WEIGHTS_ONLY, *LAYOUTS[name][1], ranks=LAYOUTS[name][0])) for name in layouts
    }


@pytest.fixture(scope="module")
def shared(forked_train: Train) -> dict[str, Run]:
    return curves(forked_train, [], ("ep1", "dp2", "ep2", "tp2_ep2"))


@pytest.fixture(scope="module")
def per_expert(forked_train: Train) -> dict[str, Run]:
    return curves(forked_train, ["--activation-per-expert"], ("ep1", "ep2"))


def assert_equal_runs(run: Run, reference: Run) -> None:
    assert len(reference.losses) == STEPS
    assert run.losses == pytest.approx(reference.losses, rel=0, abs=TOLERANCE)
    for ours, theirs in zip(run.steps, reference.steps, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert set(ours["scalars"]) == set(theirs["scalars"])
        for name, values in theirs["scalars"].items():
            assert ours["scalars"][name] == pytest.approx(values, rel=0, abs=TOLERANCE)
    assert run.records[0]["parameters"] == reference.records[0]["parameters"]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["dp2", "ep2", "tp2_ep2"])
def test_training_with_shared_scalars_does_not_depend_on_the_layout(shared: dict[str, Run], layout: str) -> None:
    assert_equal_runs(shared[layout], shared["ep1"])


@pytest.mark.distributed
def test_training_with_scalars_per_expert_does_not_depend_on_expert_parallelism(per_expert: dict[str, Run]) -> None:
    assert_equal_runs(per_expert["ep2"], per_expert["ep1"])


@pytest.mark.distributed
def test_every_set_of_scalars_moves(shared: dict[str, Run], per_expert: dict[str, Run]) -> None:
    experts = [f"expert_{number}." for number in range(4)]
    for run, prefixes, routed in ((shared["ep2"], [""], 4), (per_expert["ep2"], experts, 3)):
        last = run.steps[-1]["scalars"]
        for prefix in [*prefixes, "shared_experts."]:
            for name in ("alpha_p", "alpha_n"):
                assert len(last[prefix + name]) == (3 if prefix == "shared_experts." else routed)
                assert min(abs(value - 0.8) for value in last[prefix + name]) > TOLERANCE
        assert max(abs(value - 0.8) for values in last.values() for value in values) > 0.02
    assert len(per_expert["ep2"].steps[-1]["scalars"]["alpha_p"]) == 1  # the dense layer


@pytest.mark.distributed
def test_all_mlps_are_counted(shared: dict[str, Run], per_expert: dict[str, Run]) -> None:
    """A dense layer and three with shared experts: 1 + 3 x (routed + 1) sets of scalars."""
    line = "> megatron-act: xielu in 4 layers of this rank"
    assert f"{line} (7 sets of scalars)" in shared["ep2"].log
    assert f"{line} (16 sets of scalars)" in per_expert["ep1"].log
    assert f"{line} (10 sets of scalars)" in per_expert["ep2"].log


def scalar_keys(run: Run) -> set[str]:
    keys = tuple(MegatronCheckpoint(run.checkpoint).keys())
    return {key for key in keys if "activation_func" in key and "optim" not in key}


@pytest.mark.distributed
def test_checkpoint_keys_do_not_depend_on_expert_parallelism(
    shared: dict[str, Run], per_expert: dict[str, Run]
) -> None:
    for runs, routed, shape in ((shared, "mlp", (1,)), (per_expert, "mlp.experts.experts", (4, 1))):
        keys = [scalar_keys(run) for run in runs.values()]
        assert all(found == keys[0] for found in keys)
        assert f"decoder.layers.2.{routed}.activation_func.alpha_p" in keys[0]
        for run in runs.values():
            stored = MegatronCheckpoint(run.checkpoint).tensor(f"decoder.layers.2.{routed}.activation_func.alpha_p")
            assert tuple(stored.shape) == shape


def resumed(forked_train: Train, run: Run, folder: Path, *flags: str, ranks: int) -> Run:
    """Continues ``run`` from its checkpoint at step 4."""
    (folder / "iter_0000004").symlink_to(run.checkpoint / "iter_0000004")
    (folder / "latest_checkpointed_iteration.txt").write_text("4")
    done = check(forked_train(*MOE, "--train-iters", str(STEPS), "--load", str(folder), *flags, ranks=ranks))
    assert [step["iteration"] for step in done.steps] == [5, 6, 7, 8]
    return done


@pytest.mark.distributed
def test_saved_at_ep2_scalars_per_expert_go_on_at_ep1(
    per_expert: dict[str, Run], forked_train: Train, tmp_path: Path
) -> None:
    """With their optimizer state, which Megatron keeps in two optimizers at EP 2 (test_resharding: shared scalars)."""
    done = resumed(forked_train, per_expert["ep2"], tmp_path, "--activation-per-expert", ranks=1)
    for ours, reference in zip(done.steps, per_expert["ep2"].steps[4:], strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=0, abs=TOLERANCE)
        for name, values in reference["scalars"].items():
            assert ours["scalars"][name] == pytest.approx(values, rel=0, abs=TOLERANCE)


@pytest.mark.distributed
def test_resuming_at_the_same_expert_parallelism_repeats_the_run(
    per_expert: dict[str, Run], forked_train: Train, tmp_path: Path
) -> None:
    done = resumed(forked_train, per_expert["ep2"], tmp_path, "--activation-per-expert", *EP2, ranks=2)
    for ours, reference in zip(done.steps, per_expert["ep2"].steps[4:], strict=True):
        assert (ours["loss"], ours["scalars"]) == (reference["loss"], reference["scalars"])


@pytest.mark.distributed
def test_experts_that_keep_their_scalars_otherwise_are_refused(shared: dict[str, Run], forked_train: Train) -> None:
    load = ["--load", str(shared["ep2"].checkpoint), "--train-iters", "9"]
    other = forked_train(*MOE, *load, "--activation-per-expert")
    assert "expected scalars per expert, got a checkpoint with one set of scalars per layer" in other.log
    assert "Traceback" not in other.log.split("error:")[0]
