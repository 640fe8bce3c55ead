"""What a run writes down about its activations, in every layout the same, and the fixed held-out set."""

import itertools
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from forked_runs import ForkedRuns
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_support import MODEL_FLAGS, Run, Train, continuing

from megatron_act import stored_tokens
from megatron_act.kernels import api as kernels

pytestmark = pytest.mark.distributed

LAYERS = 4
ONE_STEP = "--activation xielu --train-iters 1 --lr 0.0 --min-lr 0.0".split()  # noqa: SIM905
LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", "2"],
    "pipeline": ["--pipeline-model-parallel-size", "2"],
    "distributed": ["--use-distributed-optimizer"],
    "clipped": ["--clip-grad", "1e-4"],
}


def trained(train: Train, *flags: str, ranks: int = 1) -> Run:
    run = train(*ONE_STEP, *flags, ranks=ranks)
    assert run.code == 0, run.log[-3000:]
    return run


@pytest.fixture(scope="module")
def start(forked_train: Train, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that load one set of weights in any layout; the first step then sees the same batch everywhere."""
    run = trained(forked_train, "--save-interval", "1000")
    return [*continuing(run, 1, tmp_path_factory.mktemp("start")), "--finetune"]


@pytest.fixture(scope="module")
def plain(forked_train: Train, start: list[str]) -> dict:
    return trained(forked_train, *start).steps[0]


def test_fields_of_a_step(plain: dict) -> None:
    assert set(plain["scalars"]) == set(plain["scalar_gradients"]) == {"alpha_p", "alpha_n"}
    for name in ("negative_fraction", "zero_fraction"):
        assert len(plain[name]) == LAYERS
    assert all(0.2 < share < 0.8 for share in plain["negative_fraction"])
    assert plain["zero_fraction"] == [0.0] * LAYERS
    assert plain["peak_memory_bytes"] > 50 << 20
    assert 0 < plain["telemetry_seconds"] < 1


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layout_writes_the_same(forked_train: Train, start: list[str], plain: dict, name: str) -> None:
    """Tensor-parallel ranks count their columns, pipeline ranks their layers; a shard's gradient comes from its owner;
    clipping is undone."""
    step = trained(forked_train, *start, *LAYOUTS[name], ranks=1 if name == "clipped" else 2).steps[0]
    assert step["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    for scalar, values in plain["scalar_gradients"].items():
        assert step["scalar_gradients"][scalar] == pytest.approx(values, rel=2e-4, abs=1e-8)
    if name != "distributed":  # there the last rank samples its own half of the batch
        assert step["negative_fraction"] == pytest.approx(plain["negative_fraction"], abs=1e-3)
    if name == "clipped":
        assert plain["grad_norm"] > 1e-2  # clipping to 1e-4 has something to do


def test_gradients_are_the_losses_slope(forked_train: Train, plain: dict, start: list[str]) -> None:
    """Central difference of the first batch's loss in the effective alpha_p of all layers at once."""
    width = 0.05
    losses = [
        trained(forked_train, "--activation-init", f"alpha_p={0.8 + sign * width}").steps[0]["loss"] for sign in (-1, 1)
    ]
    fresh = trained(forked_train).steps[0]
    param = kernels.get("xielu").params[0]
    per_effective = 1 - math.exp(-param.init)  # d effective / d raw of softplus
    slope = sum(fresh["scalar_gradients"]["alpha_p"]) / per_effective
    assert slope == pytest.approx((losses[1] - losses[0]) / (2 * width), rel=0.03)


def test_sparsity_of_relu2_and_the_board(forked_train: Train, tmp_path: Path) -> None:
    """ReLU^2 is 0 where the pre-activation is negative; TensorBoard gets what the JSONL gets, and pictures."""
    run = trained(forked_train, "--activation", "relu2", "--train-iters", "2")
    for step in run.steps:
        assert step["zero_fraction"] == pytest.approx(step["negative_fraction"], abs=1e-6)
        assert step["scalars"] == step["scalar_gradients"] == {}
    run = trained(forked_train, "--tensorboard-dir", str(tmp_path), "--log-interval", "2", "--train-iters", "4")
    assert [step["iteration"] for step in run.steps] == [2, 4]
    events = EventAccumulator(str(tmp_path)).Reload()
    last = run.steps[-1]
    for tag, value in {
        "activation/alpha_n/layer_2": last["scalars"]["alpha_n"][1],
        "activation_gradient/alpha_p/layer_3": last["scalar_gradients"]["alpha_p"][2],
        "activation_gradient/alpha_p/norm": math.hypot(*last["scalar_gradients"]["alpha_p"]),
        "preactivation/negative_fraction/layer_4": last["negative_fraction"][3],
        "preactivation/zero_fraction/layer_1": last["zero_fraction"][0],
    }.items():
        assert events.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-6)
    pictures = events.Images("activation/curves")
    assert [picture.step for picture in pictures] == [2, 4]
    assert (pictures[0].height, pictures[0].width) == (240, 320)


@pytest.fixture(scope="module")
def held_out_flags(data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Training data, and its first documents as held-out data of their own; an odd number of windows."""
    words = dict(pairwise(data_flags))
    prefix = str(tmp_path_factory.mktemp("held_out") / "held_out")
    documents = itertools.islice(stored_tokens.read(words["--data-path"]).documents(), 9)
    stored_tokens.write(Path(prefix), list(documents))
    tokenizer = ["--tokenizer-type", words["--tokenizer-type"], "--tokenizer-model", words["--tokenizer-model"]]
    cache = ["--data-cache-path", words["--data-cache-path"]]
    return [*tokenizer, *cache, "--train-data-path", words["--data-path"], "--valid-data-path", prefix]


def validations(forked: ForkedRuns, folder: Path, *flags: str, ranks: int = 1) -> list[float]:
    """The validation losses of two steps without learning: after the first, and after the last."""
    folder.mkdir()
    words = ["--cpu", *MODEL_FLAGS, *ONE_STEP, "--train-iters", "2", "--full-validation", *flags]
    words += ["--eval-interval", "1", "--metrics-jsonl", str(folder / "m.jsonl")]
    codes = forked.run(words, ranks, folder / "log.txt")
    assert not any(codes), (folder / "log.txt").read_text()[-3000:]
    lines = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "evaluation"]


def test_full_validation_is_one_number_whatever_seed_batch_and_layout(
    forked: ForkedRuns, start: list[str], held_out_flags: list[str], tmp_path: Path
) -> None:
    first = validations(forked, tmp_path / "a", *held_out_flags, *start)
    assert len(first) == 3 and max(first) - min(first) == 0.0  # after steps 1 and 2, and at the end
    assert first[0] == pytest.approx(math.log(512), abs=0.5)
    for number, flags in enumerate((["--seed", "77"], ["--micro-batch-size", "1"])):
        other = validations(forked, tmp_path / f"b{number}", *held_out_flags, *start, *flags)
        assert other == pytest.approx(first, abs=2e-6)
    two = validations(forked, tmp_path / "c", *held_out_flags, *start, *LAYOUTS["tensor"], ranks=2)
    assert two == pytest.approx(first, abs=2e-6)
