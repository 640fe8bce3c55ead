"""Recompute of whole layers, flags and weights taken from checkpoints, asynchronous saves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_support import MODEL_FLAGS, ROOT, SAVE, Run, Train, environment

from megatron_act.checkpoint.reader import MegatronCheckpoint

WORKERS = Path(__file__).parent / "workers"
XIELU = ["--activation", "xielu", "--activation-init", "alpha_p=0.7", "alpha_n=0.9"]
TP2 = [*XIELU, "--bf16", "--tensor-model-parallel-size", "2", "--train-iters", "3"]
AGAIN = "--recompute-activation-function"
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp"]
STILL = ["--lr", "0", "--min-lr", "0"]

pytestmark = pytest.mark.distributed


EXPERTS = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-aux-loss-coeff", "0.01"]
BASE = ["--cpu", *MODEL_FLAGS, "--train-iters", "1", "--mock-data"]
REFUSED = {
    "nothing to recompute": ([*BASE, AGAIN], [AGAIN, "--activation NAME"]),
    "nothing to fill": ([*BASE, "--activation-init-missing"], ["--activation-init-missing", "--activation NAME"]),
    "fp8": ([*BASE, *XIELU, AGAIN, "--fp8-format", "hybrid"], [AGAIN, "--fp8-format", "remove one"]),
    "grouped": ([*BASE, *XIELU, *EXPERTS, AGAIN, "--moe-grouped-gemm"], [AGAIN, "--moe-grouped-gemm", "remove one"]),
    "offload": ([*BASE, *XIELU, AGAIN, "--cpu-offloading-num-layers", "1"], [AGAIN, "--cpu-offloading-num-layers"]),
    "megatron fsdp": ([*BASE, *XIELU, "--use-megatron-fsdp"], ["--use-megatron-fsdp", "remove it"]),
    "torch fsdp2": ([*BASE, *XIELU, "--use-torch-fsdp2"], ["--use-torch-fsdp2", "remove it"]),
    "async": ([*BASE, *XIELU, "--async-save"], ["nvidia-resiliency-ext", "--async-strategy mcore"]),
}


def trained(run: Run) -> Run:
    assert run.code == 0, run.log[-3000:]
    return run


@pytest.fixture(scope="module")
def recomputing(forked_train: Train) -> Run:
    return trained(forked_train(*TP2, AGAIN, *SAVE, ranks=2))


def test_recompute_changes_nothing_in_experts(forked_train: Train) -> None:
    """Routed experts one after the other, weighted per token, sharing their layer's scalars."""
    flags = [*XIELU, *EXPERTS, "--train-iters", "2"]
    ours, reference = trained(forked_train(*flags, AGAIN)), trained(forked_train(*flags))
    assert [(s["loss"], s["grad_norm"], s["scalars"]) for s in ours.steps] == [
        (s["loss"], s["grad_norm"], s["scalars"]) for s in reference.steps
    ]
    assert len(ours.steps) == 2


@pytest.fixture(scope="module")
def gelu(forked_train: Train) -> Run:
    return trained(forked_train("--train-iters", "1", *SAVE))


@pytest.fixture(scope="module")
def plain(forked_train: Train) -> Run:
    return trained(forked_train(*TP2, *SAVE, "--async-save", "--async-strategy", "mcore", ranks=2))


@pytest.mark.parametrize("flags", [None, [AGAIN, *FULL], [AGAIN, *SELECTIVE]], ids=["none", "full", "selective"])
def test_recompute_changes_nothing(forked_train: Train, plain: Run, recomputing: Run, flags: list[str] | None) -> None:
    """bf16, TP 2, two micro-batches a step: losses, gradient norms and scalars of three steps, exactly."""
    other = plain if flags is None else trained(forked_train(*TP2, *flags, ranks=2))
    assert len(other.steps) == 3
    for ours, reference in zip(recomputing.steps, other.steps, strict=True):
        for key in ("loss", "grad_norm", "scalars"):
            assert ours[key] == reference[key]


def test_an_asynchronous_save_holds_the_same_weights(plain: Run, recomputing: Run) -> None:
    """The two runs are bit for bit the same; one saved in the background."""
    ours, reference = MegatronCheckpoint(plain.checkpoint), MegatronCheckpoint(recomputing.checkpoint)
    assert ours.keys() == reference.keys() and ours.iteration == 3
    for name in tuple(ours.keys()):
        assert torch.equal(ours.tensor(name), reference.tensor(name)), name


def test_use_checkpoint_args_restores_our_flags(forked_train: Train, recomputing: Run) -> None:
    words = ["--use-checkpoint-args", "--bf16", "--load", str(recomputing.checkpoint), *STILL, "--train-iters", "4"]
    run = trained(forked_train(*words, "--no-load-optim"))
    restored = f"--activation xielu --activation-init alpha_p=0.7 alpha_n=0.9 --activation-backend auto {AGAIN}"
    assert f"from the checkpoint's arguments: {restored}" in run.log
    assert run.records[0]["activation"] == "xielu"
    assert [step["iteration"] for step in run.steps] == [4]
    assert run.steps[0]["scalars"] == recomputing.steps[-1]["scalars"]


def test_finetune_starts_at_zero_with_weights_and_scalars(forked_train: Train, recomputing: Run) -> None:
    run = trained(
        forked_train(
            *XIELU, "--bf16", "--finetune", "--load", str(recomputing.checkpoint), *STILL, "--train-iters", "1"
        )
    )
    assert [step["iteration"] for step in run.steps] == [1]
    assert run.steps[0]["scalars"] == recomputing.steps[-1]["scalars"]
    assert run.losses[0] < recomputing.losses[0] - 0.1  # the same first batch, after three steps


def test_missing_scalars_are_filled_and_named(forked_train: Train, gelu: Run) -> None:
    flags = ["--activation-init-missing", "--finetune", "--load", str(gelu.checkpoint), *STILL, "--train-iters", "1"]
    run = trained(forked_train(*XIELU, *flags, *SAVE))
    line = "weights of a gelu checkpoint (its scalars, ignored: none); filled in 4 activations of this rank: "
    assert line + "alpha_p=0.7, alpha_n=0.9" in run.log
    old, new = MegatronCheckpoint(gelu.checkpoint), MegatronCheckpoint(run.checkpoint)
    assert set(new.keys()) - set(old.keys()) == {
        f"decoder.layers.mlp.activation_func.{n}" for n in ("alpha_p", "alpha_n")
    }
    for name in tuple(old.keys()):
        assert torch.equal(old.tensor(name), new.tensor(name)), name
    assert run.steps[0]["scalars"] == {"alpha_p": pytest.approx([0.7] * 4), "alpha_n": pytest.approx([0.9] * 4)}


def test_a_fill_that_cannot_work_is_refused(forked_train: Train, gelu: Run) -> None:
    flags = [*XIELU, "--activation-init-missing", "--load", str(gelu.checkpoint), "--train-iters", "2"]
    for more, words in (
        ([], ["--finetune", "--no-load-optim", "gelu", "xielu"]),
        (["--finetune", "--ffn-hidden-size", "80"], ["--ffn-hidden-size 80", "96"]),
    ):
        run = forked_train(*flags, *more)
        assert run.code != 0
        line = next(line for line in run.log.splitlines() if line.startswith("error: "))
        assert [word for word in words if word not in line] == []


def test_flags_that_cannot_go_together_are_refused_in_one_line() -> None:
    words = json.dumps([command for command, _ in REFUSED.values()])
    command = [sys.executable, str(WORKERS / "refusals.py"), words]
    done = subprocess.run(command, env=environment(), text=True, capture_output=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))[7:])
    for (case, (_, expected)), result in zip(REFUSED.items(), report, strict=True):
        assert result["code"] == 2, (case, result)
        assert result["error"].startswith("error: ") and result["error"].count("\n") == 1, case
        assert [word for word in expected if word not in result["error"]] == [], (case, result)
