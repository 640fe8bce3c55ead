"""What a run prints and where: one line a step on the console with the record's figures, Megatron's output in files."""

import json
import re
from pathlib import Path

import pytest
from training_support import Run, Train

from megatron_act.step_line import evaluation_line, step_line

pytestmark = pytest.mark.distributed

STEPS = 4
XIELU = ["--activation", "xielu", "--train-iters", str(STEPS), "--peak-tflops", "0.002"]
EVALUATED = ["--eval-interval", "2", "--eval-iters", "1"]
LAYOUTS = {"pp2": ["--pipeline-model-parallel-size", "2"], "tp2": ["--tensor-model-parallel-size", "2"]}
CONSOLE = re.compile(r"> megatron-act: .*|megatron-act: CPU backend .*|step \d/4 \| .*|evaluation at step \d \| .*")


@pytest.fixture(scope="module", params=list(LAYOUTS))
def run(request: pytest.FixtureRequest, forked_train: Train) -> Run:
    """Under a pipeline the loss is on rank 1, the line on rank 0."""
    saving = ["--save-interval", "1000", "--ckpt-format", "torch"]
    done = forked_train(*XIELU, *EVALUATED, *saving, *LAYOUTS[request.param], ranks=2)
    assert done.code == 0, done.log[-3000:]
    return done


def lines(run: Run, start: str) -> list[str]:
    return [line for line in run.log.splitlines() if line.startswith(start)]


def test_a_line_a_step_has_the_records_figures(run: Run) -> None:
    """Read back from the line by hand, and as a whole."""
    assert lines(run, "step ") == [step_line(record, STEPS, 2) for record in run.steps]
    assert len(run.steps) == STEPS
    for line, record in zip(lines(run, "step "), run.steps, strict=True):
        figures = dict(re.findall(r"(loss|lr|MFU|grad|alpha_p|alpha_n) (\S+)", line))
        assert float(figures["loss"]) == pytest.approx(record["loss"], abs=5.1e-5)
        assert float(figures["MFU"]) == pytest.approx(100 * record["mfu"], abs=0.051)
        assert float(figures["grad"]) == pytest.approx(record["grad_norm"], rel=5.1e-3)
        for name in ("alpha_p", "alpha_n"):
            ends = [float(end) for end in figures[name].split("..")]
            values = record["scalars"][name]
            assert len(values) == 4 and ends == pytest.approx([min(values), max(values)], rel=5.1e-3)
        tokens, unit = re.search(r"\| (\S+) (k )?tok/s", line).groups()
        rate = 2 * record["tokens_per_second_per_gpu"] / (1000 if unit else 1)
        assert float(tokens) == pytest.approx(rate, rel=5.1e-3)


def test_time_left_is_the_mean_step_without_the_first(run: Run) -> None:
    seconds = [step["step_seconds"] for step in run.steps]
    expected = [None, 2 * seconds[1], (seconds[1] + seconds[2]) / 2, None]
    assert [step["eta_seconds"] for step in run.steps] == [value and pytest.approx(value) for value in expected]
    assert [" | ETA " in line for line in lines(run, "step ")] == [False, True, True, False]


def test_a_line_an_evaluation(run: Run) -> None:
    records = [record for record in run.records if record["event"] == "evaluation"]
    assert [record["iteration"] for record in records] == [2, 4, 4]
    assert lines(run, "evaluation ") == [evaluation_line(record) for record in records]


def test_the_console_holds_our_lines_and_the_files_megatrons(run: Run) -> None:
    assert [line for line in run.log.splitlines() if not CONSOLE.fullmatch(line)] == []
    assert lines(run, "> megatron-act: saved step") == [f"> megatron-act: saved step 4 to {run.checkpoint}"]
    first, last = ((run.checkpoint / "logs" / f"rank_0000{rank}.log").read_text() for rank in (0, 1))
    assert "- arguments -" in first and "- arguments -" not in last
    assert re.findall(r" iteration +(\d)/ +4 \|", last) == ["1", "2", "3", "4"]
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", last)]
    assert losses[2:] == pytest.approx(run.losses[2:], rel=1e-6)  # the second is Megatron's mean of two
    for line in lines(run, "step "):
        assert line in first and line not in last
    for text in (first, last):
        assert text.startswith("==== ") and "Warning" in text


def test_a_crash_is_on_the_console_with_the_place_of_the_rest(forked_train: Train, tmp_path: Path) -> None:
    """The last rank's, whose lines the console never has."""
    logs = tmp_path / "logs"
    done = forked_train(
        *XIELU, "--log-dir", str(logs), ranks=2, prepare=["logs", {"kind": "crash", "rank": 1, "step": 2}]
    )
    assert done.code == 1
    for text in (done.log, (logs / "rank_00001.log").read_text()):
        assert "Traceback (most recent call last)" in text and "ValueError: something gave way" in text
    assert re.search(rf"rank 1 on \S+ ends by ValueError; its whole output: {logs}/rank_00001.log", done.log)
    assert len(lines(done, "step ")) == 1


def test_skipped_steps_and_raw_output(forked_train: Train) -> None:
    """Steps 2 and 3 of two records of two steps; ``--megatron-log`` leaves both kinds of lines on the console."""
    skip = ["logs", {"kind": "skip", "steps": [2, 3]}]
    done = forked_train(*XIELU, "--log-interval", "2", "--megatron-log", "--save-interval", "1000", prepare=skip)
    assert done.code == 0, done.log[-3000:]
    assert [(step["skipped_steps"], step["nan_steps"]) for step in done.steps] == [(1, 1), (1, 1)]
    assert [line.count(" | 1 skipped (1 not finite)") for line in lines(done, "step ")] == [1, 1]
    assert re.findall(r"number of nan iterations: +(\d)", done.log)[-1] == "1"
    assert done.steps[0]["eta_seconds"] == pytest.approx(2 * done.steps[0]["step_seconds"])  # without the first step
    assert "- arguments -" in done.log and not (done.checkpoint / "logs").exists()


STAND_IN = """
import json, pathlib
FILE = pathlib.Path(__file__).with_name("calls.jsonl")
def note(*call): FILE.open("a").write(json.dumps(call) + chr(10))
def init(**words): note("init", words["project"], words["name"])
def plain(value): return value if isinstance(value, str) else float(value)
def log(values, step): note("log", step, {name: plain(value) for name, value in values.items()})
def Image(array): return f"{array.shape[1]}x{array.shape[0]}"
def finish(): note("finish")
class config: update = staticmethod(lambda values: None)
"""


def test_wandb_gets_what_the_record_has(forked_train: Train, tmp_path: Path) -> None:
    """A module in wandb's place, without a TensorBoard, which Megatron's own figures would need."""
    (tmp_path / "wandb.py").write_text(STAND_IN)
    flags = ["--wandb-project", "p", "--wandb-exp-name", "e", "--wandb-save-dir", str(tmp_path / "saved")]
    done = forked_train(
        *XIELU,
        *EVALUATED,
        *flags,
        *LAYOUTS["pp2"],
        ranks=2,
        prepare=["logs", {"kind": "path", "folder": str(tmp_path)}],
    )
    assert done.code == 0, done.log[-3000:]
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert (calls[0], calls[-1]) == (["init", "p", "e"], ["finish"])
    steps: dict[int, dict] = {}
    for _, step, values in calls[1:-1]:
        steps.setdefault(step, {}).update(values)
    for record in done.steps:
        values = steps[record["iteration"]]
        for name in ("step_seconds", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu"):
            assert values[f"throughput/{name}"] == record[name]
        for layer in range(4):
            assert values[f"activation/alpha_p/layer_{layer + 1}"] == record["scalars"]["alpha_p"][layer]
        megatrons = [values[name] for name in ("lm loss", "learning-rate", "grad-norm")]
        assert megatrons == [record[name] for name in ("loss", "learning_rate", "grad_norm")]
        assert values["activation/curves"] == "320x240"
    evaluation = next(record for record in done.records if record["event"] == "evaluation")
    assert steps[2]["lm loss validation"] == evaluation["loss"]


def test_wandb_that_is_not_installed_is_refused_before_anything_starts(forked_train: Train, tmp_path: Path) -> None:
    """A folder of runs that it has left in the working directory does not count as the package."""
    (tmp_path / "wandb").mkdir()
    path = ["logs", {"kind": "path", "folder": str(tmp_path)}]
    flags = ["--wandb-project", "p", "--wandb-save-dir", str(tmp_path)]
    done = forked_train(*XIELU, *flags, ranks=2, prepare=path)
    assert done.code == 2 and done.records == []
    assert done.log.splitlines() == [
        "error: --wandb-project: expected the package wandb, got none: pip install wandb, or remove the flag"
    ]


def test_a_wandb_run_without_a_name_is_refused_before_megatron_does_on_the_last_rank(
    forked_train: Train, tmp_path: Path
) -> None:
    (tmp_path / "wandb.py").write_text(STAND_IN)
    path = ["logs", {"kind": "path", "folder": str(tmp_path)}]
    done = forked_train(*XIELU, "--wandb-project", "p", "--wandb-save-dir", str(tmp_path), ranks=2, prepare=path)
    expected = "error: --wandb-project: expected --wandb-exp-name NAME with it, got none: add it"
    assert done.code == 2 and done.log.splitlines() == [expected]
