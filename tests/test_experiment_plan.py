"""Which runs an experiment takes: learning rates first, then equal tokens, then other lengths; schedules; Slurm."""

import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_act.errors import UserError
from megatron_act.experiment.arms import Experiment, Run
from megatron_act.experiment.layout import Layout, override
from megatron_act.experiment.parse import load_experiment, parse_experiment
from megatron_act.experiment.plan import make_plan
from megatron_act.experiment.preview import preview
from megatron_act.experiment.records import run_folder, write_record
from megatron_act.experiment.schedule import at_length, at_rate, parse_schedule

ROOT = Path(__file__).resolve().parents[1]
CPU = Layout("cpu", 1, 1, 1, False, "a CPU")
BASE = {
    "--num-layers": 2,
    "--hidden-size": 32,
    "--num-attention-heads": 2,
    "--seq-length": 32,
    "--vocab-size": 128,
    "--train-iters": 100,
    "--lr": 0.01,
    "--disable-bias-linear": True,
    "--position-embedding-type": "rope",
    "--mock-data": True,
    "--tokenizer-type": "NullTokenizer",
}
CONTENT = {
    "name": "small",
    "base": BASE,
    "baseline": {"activation": "swiglu", "ffn_hidden_size": 64},
    "arms": ["relu2", "swiglu", "xielu"],
    "seeds": [1, 2, 3],
    "equal": ["tokens", "flops", "seconds"],
    "learning_rates": [0.01, 0.001],
    "tuning_seeds": [11, 12],
    "schedule": {"kind": "wsd", "final": 0.1},
}


def finish(output: Path, run: Run, loss: float, step_seconds: float = 1.0) -> None:
    """Leaves what a finished run leaves."""
    folder = run_folder(output, run)
    folder.clear()
    step = {"event": "step", "iteration": 1, "step_seconds": step_seconds}
    evaluation = {"event": "evaluation", "split": "validation", "loss": loss}
    folder.metrics.write_text(json.dumps(step) + "\n" + json.dumps(evaluation) + "\n")
    folder.checkpoint.mkdir()
    (folder.checkpoint / "latest_checkpointed_iteration.txt").write_text(str(run.train_iters))
    write_record(folder, run, [], 1.0)


def named(runs: tuple[Run, ...]) -> list[str]:
    return [run.folder for run in runs]


def tuned(experiment: Experiment, output: Path, better: dict[str, float]) -> None:
    """Finishes the tuning runs so that each arm does better at the given rate; one seed alone would say otherwise."""
    for run in make_plan(experiment, CPU, output).runs:
        chosen = run.rate == better[run.arm.name]
        finish(output, run, (3.0 if chosen else 3.1) + (0.3 if chosen == (run.seed == 12) else 0.0))


def test_rates_are_chosen_before_anything_else_is_planned(tmp_path: Path) -> None:
    experiment = parse_experiment(CONTENT, ROOT)
    plan = make_plan(experiment, CPU, tmp_path)
    assert named(plan.runs)[:3] == ["relu2-lr0.001-seed11", "relu2-lr0.01-seed11", "swiglu-lr0.001-seed11"]
    assert (len(plan.runs), plan.rates, plan.waiting) == (12, {}, ("tokens", "flops", "seconds"))
    better = {"relu2": 0.01, "swiglu": 0.001, "xielu": 0.01}
    tuned(experiment, tmp_path, better)
    plan = make_plan(experiment, CPU, tmp_path)
    assert plan.rates == better
    assert named(plan.runs)[12:15] == ["relu2-lr0.01-seed1", "swiglu-lr0.001-seed1", "xielu-lr0.01-seed1"]
    assert (len(plan.runs), plan.waiting) == (12 + 9, ("seconds",))
    assert plan.budgets == {name: dict.fromkeys(better, 100) for name in ("tokens", "flops")}
    words = " ".join(plan.runs[13].words)
    assert "--lr 0.001 " in words and "--min-lr 0.0001 " in words and "--seed 1 " in words


def test_equal_seconds_scales_steps_and_schedule_by_the_paired_times(tmp_path: Path) -> None:
    experiment = parse_experiment(CONTENT, ROOT)
    tuned(experiment, tmp_path, dict.fromkeys(("relu2", "swiglu", "xielu"), 0.01))
    pace = {"relu2": 0.8, "swiglu": 1.0, "xielu": 1.005}
    for run in make_plan(experiment, CPU, tmp_path).runs[12:]:
        slow_machine = {1: 1.0, 2: 30.0, 3: 2.0}[run.seed]  # an unpaired mean would let seed 2 decide
        finish(tmp_path, run, 3.0, pace[run.arm.name] * slow_machine)
    plan = make_plan(experiment, CPU, tmp_path)
    assert plan.budgets["seconds"] == {"relu2": 125, "swiglu": 100, "xielu": 100}  # half a percent is no difference
    assert named(plan.runs)[21:] == [f"relu2-lr0.01-seed{seed}-125steps" for seed in (1, 2, 3)]
    words = " ".join(plan.runs[21].words)
    for flags in ("--train-iters 125", "--lr-warmup-iters 12", "--lr-wsd-decay-iters 25", "--lr-decay-iters 125"):
        assert f"{flags} " in words
    assert plan.waiting == ()
    assert preview(experiment, tmp_path, CPU).splitlines()[0] == "3 of 24 known runs are to be trained"


def test_equal_flops_scales_by_the_residual_of_the_match(tmp_path: Path) -> None:
    wide = {**CONTENT, "align": 64, "arms": ["swiglu", "xielu"], "equal": ["flops"]}
    del wide["learning_rates"], wide["tuning_seeds"]
    experiment = parse_experiment(wide, ROOT)
    flops = [experiment.match(arm, CPU).report()["flops_per_token"] for arm in experiment.arms]
    assert flops[1] < 0.9 * flops[0]  # 64 wide, 96 would be equal
    plan = make_plan(experiment, CPU, tmp_path)
    assert plan.budgets == {
        "tokens": {"swiglu": 100, "xielu": 100},
        "flops": {"swiglu": 100, "xielu": round(100 * flops[0] / flops[1])},
    }
    assert len(plan.runs) == 6 + 3


def test_a_rate_that_diverges_is_out_and_an_arm_without_one_is_an_error(tmp_path: Path) -> None:
    experiment = parse_experiment({**CONTENT, "arms": ["xielu"]}, ROOT)
    runs = make_plan(experiment, CPU, tmp_path).runs
    for run in runs:
        finish(tmp_path, run, math.nan if run.rate == 0.01 and run.seed == 12 else 9.0 - run.rate)
    assert make_plan(experiment, CPU, tmp_path).rates == {"xielu": 0.001}
    for run in runs:
        finish(tmp_path, run, math.inf)
    with pytest.raises(UserError, match="learning_rates: expected one at which xielu converges, got none"):
        make_plan(experiment, CPU, tmp_path)


def test_schedules_are_megatrons_flags() -> None:
    wsd = parse_schedule({"kind": "wsd", "warmup": 0.05, "decay": 0.25, "final": 0.1})
    assert wsd.flags(200, 0.02) == {
        "--lr-warmup-iters": 10,
        "--lr-decay-iters": 200,
        "--min-lr": pytest.approx(0.002),
        "--lr-decay-style": "WSD",
        "--lr-wsd-decay-style": "minus_sqrt",
        "--lr-wsd-decay-iters": 50,
    }
    cosine = parse_schedule({"kind": "cosine"})
    assert cosine.flags(200, 0.02)["--lr-decay-style"] == "cosine"
    assert "--lr-wsd-decay-iters" not in cosine.flags(200, 0.02)
    flags = {"--train-iters": 100, "--lr-warmup-iters": 10, "--lr-decay-iters": 100, "--lr": 0.1, "--min-lr": 0.01}
    assert at_length(flags, 150) == {**flags, "--train-iters": 150, "--lr-warmup-iters": 15, "--lr-decay-iters": 150}
    assert at_rate(flags, 0.2) == {**flags, "--lr": 0.2, "--min-lr": pytest.approx(0.02)}


def test_evaluations_never_fall_on_the_last_step_twice() -> None:
    for evaluations, steps in ((1, 100), (4, 100), (4, 101), (3, 7)):
        experiment = parse_experiment(
            {**CONTENT, "evaluations": evaluations, "base": {**BASE, "--train-iters": steps}}, ROOT
        )
        words = experiment.runs(CPU)[0].words
        interval = int(words[words.index("--eval-interval") + 1])
        points = [*range(interval, steps + 1, interval), steps]  # Megatron's own, after the last step
        assert len(points) == len(set(points)) == evaluations


def test_threads_are_shared_by_the_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_act.experiment.layout.usable_cores", lambda: 8)
    machine = Layout("cpu", 2, 2, 4, False, "a CPU")
    assert override(machine, None, None) == machine
    assert override(machine, 1, None, None, jobs=2).threads_per_rank == 4
    assert override(machine, 1, None, None, jobs=16).threads_per_rank == 1
    there = override(machine, 4, 2, "cuda")
    assert (there.device, there.ranks, there.tensor_parallel, there.machine) == ("cuda", 4, 2, "a machine with cuda")


@pytest.mark.parametrize("name", ["small-cpu", "small-gpu"])
def test_the_small_experiments_are_valid_and_matched_exactly(name: str, tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "configs" / "experiments" / f"{name}.yaml").read_text())
    (tmp_path / "data").mkdir()
    for part in ("train", "valid"):
        (tmp_path / "data" / f"text_{part}.idx").write_bytes(b"")
    content.pop("tokenizer")
    content["base"]["--vocab-size"] = 2048
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(content))
    experiment = load_experiment(tmp_path / "e.yaml")
    assert [arm.name for arm in experiment.arms] == ["swiglu", "relu2", "xielu", "crrelu"]
    matches = [experiment.match(arm, CPU) for arm in experiment.arms]
    assert all(match.exact for match in matches)
    width = matches[0].target.ffn_hidden_size
    assert [match.target.ffn_hidden_size for match in matches] == [width, *[width * 3 // 2] * 3]


FAKE_SBATCH = """#!/usr/bin/env bash
set -eu
[[ "$1" == --parsable ]]
cp "$2" "$(dirname "$0")/submitted.sh"
echo "4711;cluster"
"""


def submit(folder: Path, content: dict, path: str) -> subprocess.CompletedProcess[str]:
    (folder / "e.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    tool = [sys.executable, str(ROOT / "tools/compare.py"), str(folder / "e.yaml"), "--output", str(folder / "out")]
    env = {**os.environ, "PATH": path}
    return subprocess.run([*tool, "--slurm"], capture_output=True, text=True, timeout=120, env=env, check=False)


def test_slurm_gets_one_array_of_the_unfinished_runs(tmp_path: Path) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(FAKE_SBATCH)
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    path = f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}"
    wanted = {"partition": "gpu", "time": "04:00:00", "parallel": 2}
    content = {**CONTENT, "layout": {"device": "cuda", "ranks": 1}, "slurm": wanted, "tuning_seeds": [11]}
    experiment = parse_experiment(content, ROOT)
    layout = experiment.layout(CPU)
    tuning = make_plan(experiment, layout, tmp_path / "out").runs
    finish(tmp_path / "out", tuning[0], 3.0)

    done = submit(tmp_path, content, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "job 4711: 5 runs; when it has ended: the same command with --report-only; then the same command again, for "
        "equal tokens, flops, seconds\n"
    )
    script = (sbatch.parent / "submitted.sh").read_text()
    for line in ("--job-name=small", "--array=0-4%2", "--partition=gpu", "--time=04:00:00", "--gpus-per-node=1"):
        assert f"#SBATCH {line}\n" in script
    # What a task runs, by its own shell: the command with the name of the run of its number.
    shown = script.replace("exec ", "printf '%s\\n' ")
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": "3"}
    words = subprocess.run(
        ["bash", "-c", shown], capture_output=True, text=True, env=env, check=True
    ).stdout.splitlines()
    assert words[1:] == [
        *(str(ROOT / "tools/compare.py"), str(tmp_path / "e.yaml"), "--output", str(tmp_path / "out")),
        *("--only", tuning[4].folder),
    ]
    description = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert [entry["folder"] for entry in description["runs"]] == [f"runs/{run.folder}" for run in tuning]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT, "error: layout: expected device and ranks with --slurm"),
        ({**CONTENT, "layout": {"device": "cpu", "ranks": 1}}, "error: --slurm: expected sbatch on PATH, got none"),
    ],
)
def test_slurm_refuses_what_it_cannot_plan_or_submit(tmp_path: Path, content: dict, message: str) -> None:
    done = submit(tmp_path, content, "/nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
