"""The small reproduction without training: steps that fit the time, a run that goes on, and what it says beforehand."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_act.errors import UserError
from megatron_act.experiment import small
from megatron_act.experiment.layout import Layout
from megatron_act.experiment.parse import parse_experiment

ROOT = Path(__file__).resolve().parents[1]
CPU = Layout("cpu", 1, 1, 1, False, "a CPU")
PRESET = small.PRESETS["cpu"]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder whose data are there."""
    import numpy as np
    from tokenizers import Tokenizer, models

    from megatron_act import stored_tokens

    (tmp_path / "data" / "tokenizer").mkdir(parents=True)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).save(str(tmp_path / "data" / "tokenizer" / "tokenizer.json"))
    for part in ("train", "valid"):
        stored_tokens.write(tmp_path / "data" / f"text_{part}", [np.zeros(300_000, np.uint16)])
    return tmp_path


def flags(*words: str) -> argparse.Namespace:
    return small.parser().parse_args(words)


def test_steps_fill_the_time(output: Path) -> None:
    """The plan's runs at these steps, added up one by one, take the time given and no more."""
    experiment = parse_experiment(small.content(flags(), PRESET), output)
    paces, start, seconds = [0.1, 0.08, 0.12, 0.11], 9.0, 6000.0
    steps = small.fitting_steps(experiment, paces, start, seconds)

    def total(steps: int) -> float:
        reference = paces[0]  # swiglu
        tuning, main, others = 3 * 1, 8, 3 * 8
        validated = 50_000 * (4 - 1) / 2048 / 3  # in training steps: one validation is in the start's time
        runs = [*((pace, tuning + main) for pace in paces), (reference, others)]
        return sum(n * (start + (steps + validated) * pace) for pace, n in runs)

    assert total(steps) <= seconds < total(steps + 10)
    assert small.runs_at_most(experiment) == 4 * (3 + 8) + 24
    assert small.fitting_steps(experiment, paces, start, 300.0) == 0


def test_the_text_bounds_the_steps(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """300,000 tokens four times over are 585 batches of 2,048, however fast the machine is."""

    def trial(experiment: object, folder: Path, *_: object, **__: object) -> None:
        for arm in ("swiglu", "relu2", "xielu", "crrelu"):
            run = folder / "runs" / f"{arm}-seed0"
            run.mkdir(parents=True)
            line = {"event": "step", "iteration": 1, "step_seconds": 0.001}
            (run / "metrics.jsonl").write_text((json.dumps(line) + "\n") * 12)
            (run / "run.json").write_text(json.dumps({"seconds": 5.012}))

    monkeypatch.setattr(small, "run_arms", trial)
    experiment = parse_experiment(small.content(flags(), PRESET), output)
    assert small.steps_by_trial(experiment, CPU, 2, output, 60) == 4 * 300_000 // 2048
    assert "--data PARQUET for more" in capsys.readouterr().out
    for run in (output / "trial" / "runs").iterdir():
        (run / "run.json").write_text(json.dumps({"seconds": 500.0}))
    monkeypatch.setattr(small, "run_arms", lambda *_, **__: None)
    with pytest.raises(UserError, match="--minutes: expected time for 12 steps a run, got 60: raise it"):
        small.steps_by_trial(experiment, CPU, 2, output, 60)


def test_the_same_flags_go_on_and_others_are_refused(output: Path) -> None:
    args = flags("--seeds", "2", "--steps", "70", "--corpus", "poems")
    first = small.settled(args, PRESET, CPU, 1, output)
    assert (first.seeds, first.steps, first.corpus) == ((1, 2), 70, "poems")
    assert small.settled(args, PRESET, CPU, 1, output) == first
    without = flags("--seeds", "2", "--corpus", "poems")  # the steps are in the file: no second trial
    assert small.settled(without, PRESET, CPU, 1, output) == first
    with pytest.raises(
        UserError, match=r"--output: expected the experiment of .*experiment\.yaml, got flags for another"
    ):
        small.settled(flags("--seeds", "3", "--steps", "70", "--corpus", "poems"), PRESET, CPU, 1, output)
    assert yaml.safe_load((output / "experiment.yaml").read_text())["base"]["--train-iters"] == 70


def test_a_dry_run_says_what_and_leaves_nothing(tmp_path: Path) -> None:
    words = ["--dry-run", "--steps", "50", "--jobs", "1", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_act.experiment.small", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "runs: swiglu, relu2, xielu, crrelu x (3 learning rates x 1 tuning seeds + " in done.stdout
    assert "steps a run: 50; 1 at a time" in done.stdout and "not FineWeb-Edu" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_with_data_prints_the_commands(output: Path) -> None:
    text = small.described(flags("--steps", "50"), PRESET, CPU, 1, ["x.parquet"], output)
    commands = [line for line in text.splitlines() if "megatron_act.pretrain_gpt" in line]
    assert len(commands) == 12  # the tuning runs; the others wait for their learning rates
    assert all(f"--valid-data-path {output}/held_out " in line and "--train-iters 50 " in line for line in commands)
    assert text.splitlines()[-1] == "then, as far as results ask for them, up to 80 more: equal tokens, flops, seconds"
