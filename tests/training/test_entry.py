"""The entry point: --spec from a foreign one, --config, the frozen flags."""

import argparse
import re
from pathlib import Path
from signal import SIGTERM

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_support import MODEL_FLAGS, SAVE, Run, Train, torchrun

from megatron_act import arguments
from megatron_act.cpu_backend import FLAGS

WORKERS = Path(__file__).parent / "workers"


def logged_losses(log: str) -> list[str]:
    """The losses as Megatron prints them (its second line averages the first two steps)."""
    return re.findall(r"lm loss: (\S+)", log)


def lines_with(words: str, log: str) -> list[str]:
    return [line for line in log.splitlines() if words in line]


@pytest.mark.distributed
def test_spec_from_a_megatron_lm_entry_trains_the_same_model(data_flags: list[str]) -> None:
    """With biases, and Megatron's fusion of bias and GELU at its default, on: it is bypassed, and one line says so."""
    model = [word for word in MODEL_FLAGS if word != "--disable-bias-linear"]
    flags = [*model, *data_flags, "--train-iters", "5", "--tensor-model-parallel-size", "2"]
    ours = torchrun("-m", "megatron_act.pretrain_gpt", "--cpu", *flags, "--activation", "crrelu", ranks=2)
    assert ours.returncode == 0, ours.stdout[-3000:]
    script = [str(WORKERS / "on_cpu.py"), str(WORKERS / "megatron_lm_entry.py")]
    theirs = torchrun(*script, *FLAGS, *flags, "--spec", "megatron_act.specs", "crrelu", ranks=2)
    assert theirs.returncode == 0, theirs.stdout[-3000:]
    assert len(logged_losses(ours.stdout)) == 5
    assert logged_losses(theirs.stdout) == logged_losses(ours.stdout)
    for log in (ours.stdout, theirs.stdout):
        assert lines_with("bias-gelu-fusion", log) == [
            "> megatron-act: --no-bias-gelu-fusion is implied: crrelu adds the bias in its own kernel"
        ]


@pytest.fixture(scope="module")
def configured(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, EventAccumulator]:
    """Four steps by a config file, an evaluation after the second, and the TensorBoard events."""
    folder = tmp_path_factory.mktemp("configured")
    config = folder / "run.yaml"
    config.write_text("MODEL_ARGS:\n  --activation: crrelu\n  --train-iters: 7\n  --activation-init: [eps=0.3]\n")
    board = ["--tensorboard-dir", str(folder / "board"), "--log-throughput", "--log-timers-to-tensorboard"]
    steps = ["--train-iters", "4", "--eval-interval", "2", "--eval-iters", "1", "--lr", "0", "--min-lr", "0"]
    peak = ["--peak-tflops", "0.002"]
    run = train("--config", str(config), *steps, *board, *peak, "--check-for-spiky-loss")
    assert run.code == 0, run.log[-3000:]
    return run, EventAccumulator(str(folder / "board")).Reload()


@pytest.mark.distributed
def test_config_file_trains_and_the_command_line_wins(configured: tuple[Run, EventAccumulator]) -> None:
    run, events = configured
    assert run.records[0]["activation"] == "crrelu"
    assert [step["iteration"] for step in run.steps] == [1, 2, 3, 4]
    assert run.steps[-1]["scalars"] == {"eps": pytest.approx([0.3] * 4, abs=1e-7)}
    assert {f"activation/eps/layer_{layer}" for layer in (1, 2, 3, 4)} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("activation/eps/layer_3")] == pytest.approx([0.3] * 4)


@pytest.mark.distributed
def test_throughput_is_megatrons_own_with_its_evaluations_left_out(configured: tuple[Run, EventAccumulator]) -> None:
    """Megatron writes no first step, and as the second its mean with the first; ours has each."""
    run, events = configured
    seconds = [step["step_seconds"] for step in run.steps]
    theirs = {event.step: event.value for event in events.Scalars("iteration-time")}
    assert theirs == pytest.approx({2: (seconds[0] + seconds[1]) / 2, 3: seconds[2], 4: seconds[3]}, rel=1e-6)
    tflops = {event.step: event.value for event in events.Scalars("throughput")}
    assert [step["tflops_per_gpu"] for step in run.steps[2:]] == pytest.approx([tflops[3], tflops[4]], rel=1e-6)
    for step, elapsed in zip(run.steps, seconds, strict=True):
        assert step["tokens_per_second_per_gpu"] == pytest.approx(8 * 64 / elapsed)
        assert step["mfu"] == pytest.approx(step["tflops_per_gpu"] / 0.002)
    assert run.steps[2]["seconds"] - run.steps[1]["seconds"] > seconds[2]  # the clock that has the evaluation in it


@pytest.mark.distributed
def test_throughput_is_in_tensorboard_and_its_peak_in_the_log(configured: tuple[Run, EventAccumulator]) -> None:
    run, events = configured
    for name in ("step_seconds", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu"):
        written = [event.value for event in events.Scalars(f"throughput/{name}")]
        assert written == pytest.approx([step[name] for step in run.steps], rel=1e-6)
    assert run.records[0]["peak_tflops"] == 0.002
    assert lines_with("MFU of", run.log) == ["> megatron-act: MFU of 0.002 TFLOP/s per GPU (--peak-tflops)"]


@pytest.mark.distributed
def test_a_preflight_by_the_entry_point_trains_nothing(forked_train: Train) -> None:
    flags = ["--activation", "xielu", "--train-iters", "4", "--preflight-only"]
    passed = forked_train(*flags, "--save-interval", "2", "--tensor-model-parallel-size", "2", ranks=2)
    assert (passed.code, passed.records, passed.checkpoint.exists()) == (0, [], False), passed.log[-3000:]
    assert re.search(r"preflight: \d\d checks passed, 0 failed", passed.log)
    assert "room for" in passed.log and "needed for 2 more (all that this run will save)" in passed.log
    wrong = forked_train(*flags, "--num-attention-heads", "3")
    assert (wrong.code, wrong.records) == (2, [])
    assert "failed: --hidden-size by --num-attention-heads: expected a multiple of 3, got 32" in wrong.log


@pytest.mark.distributed
@pytest.mark.parametrize(("flags", "code", "saved"), [([], 0, ["1"]), (["--no-exit-signal-handler"], -SIGTERM, [])])
def test_sigterm_saves_unless_that_is_turned_off(
    flags: list[str], code: int, saved: list[str], forked_train: Train
) -> None:
    fault = ["fault", {"kind": "signal", "iteration": 1, "rank": 0, "number": SIGTERM}]
    run = forked_train("--activation", "xielu", "--train-iters", "3", *SAVE, *flags, prepare=fault)
    assert run.code == code
    assert [path.read_text() for path in run.checkpoint.glob("latest*")] == saved
    assert len(lines_with("> megatron-act: exiting program after receiving SIGTERM", run.log)) == len(saved)


@pytest.mark.distributed
def test_saves_by_the_clock_save_each_step_once(forked_train: Train) -> None:
    """The last step too, after which Megatron saves itself."""
    run = forked_train("--activation", "xielu", "--train-iters", "3", *SAVE, "--save-interval-minutes", "1e-9")
    said = [line.split()[4] for line in lines_with("> megatron-act: saved step", run.log)]
    assert said == ["1", "2", "3"], run.log[-3000:]


def test_our_flags_are_frozen() -> None:
    """A new flag is a decision: change this list with it."""
    parser = arguments.add_arguments(argparse.ArgumentParser(add_help=False))
    assert sorted(parser._option_string_actions) == [
        "--activation",
        "--activation-backend",
        "--activation-fp8-grad",
        "--activation-fp8-input-store",
        "--activation-fp8-output",
        "--activation-init",
        "--activation-init-missing",
        "--activation-per-expert",
        "--config",
        "--cpu",
        "--dataloader",
        "--export-best",
        "--hang-timeout-seconds",
        "--keep-last-checkpoints",
        "--log-dir",
        "--megatron-log",
        "--metrics-jsonl",
        "--no-exit-signal-handler",
        "--peak-tflops",
        "--preflight-only",
        "--recompute-activation-function",
        "--save-interval-minutes",
    ]
