"""The papers' comparison at a size that one machine finishes: one H100 in two hours, two CPU cores in one.

``bash launch/reproduce_small.sh`` runs this after the set-up. A trial of a few steps of each arm decides how many steps
fit the time (``--steps`` decides instead); ``experiment.yaml`` in the output folder keeps that, so an interrupted run
goes on with the same command. Every training run is one process; runs at a time: one for each GPU or core.
"""

import argparse
import json
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_act.data import sample_path
from megatron_act.errors import FAILED, UserError, run_cli
from megatron_act.experiment.arms import Experiment
from megatron_act.experiment.held_out import placed
from megatron_act.experiment.jobs import RunFailed
from megatron_act.experiment.layout import Layout, detect, usable_cores
from megatron_act.experiment.parse import parse_experiment, read_yaml
from megatron_act.experiment.preview import preview
from megatron_act.experiment.quickstart import prepare_data
from megatron_act.experiment.readme import SAMPLE
from megatron_act.experiment.records import RunFolder, read_lines, step_seconds
from megatron_act.experiment.report import write_report
from megatron_act.experiment.results import collect
from megatron_act.experiment.runner import run_arms
from megatron_act.experiment.table import terminal_table
from megatron_act.stored_tokens import read

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "experiments"
TRIAL_STEPS = 12
TIME_SHARE = 0.85  # of the minutes: the rest is for what a trial cannot see
MAX_EPOCHS = 4  # more passes over the same text would measure memory, not learning
FORWARD_SHARE = 1 / 3  # of a training step's time: what validating as many tokens takes
FILE = "experiment.yaml"


@dataclass(frozen=True)
class Preset:
    """A kind of machine.

    Attributes:
        file: the experiment in `CONFIGS`.
        minutes: within which all runs end.
        vocab_size: of the BPE that is trained on the corpus.
    """

    file: str
    minutes: int
    vocab_size: int


PRESETS = {"cpu": Preset("small-cpu.yaml", 60, 2048), "cuda": Preset("small-gpu.yaml", 120, 16384)}


def parser() -> argparse.ArgumentParser:
    """The command line of ``launch/reproduce_small.sh``."""
    first = (__doc__ or "").split("\n")[0]
    parse = argparse.ArgumentParser(prog="launch/reproduce_small.sh", description=first, allow_abbrev=False)
    parse.add_argument(
        "--data", nargs="+", metavar="PARQUET", help="FineWeb-Edu parquet files (default: the packaged sample)"
    )
    parse.add_argument("--corpus", metavar="NAME", help="the data's name in the report (default: its files' names)")
    parse.add_argument(
        "--output", type=Path, default=Path("reproduce_small"), metavar="DIR", help="default: reproduce_small"
    )
    parse.add_argument("--minutes", type=int, metavar="N", help="time for all runs (default: 60 on CPUs, 120 on GPUs)")
    parse.add_argument("--steps", type=int, metavar="N", help="steps of each run, instead of a trial and the minutes")
    parse.add_argument("--seeds", type=int, metavar="N", help="the first N seeds (default: all)")
    parse.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one for each GPU or core)")
    parse.add_argument("--dry-run", action="store_true", help="say what would be done, train nothing")
    parse.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parse


def run(args: argparse.Namespace) -> int:
    """Every stage, in order; the page's path is printed last."""
    output, machine = args.output.resolve(), detect(ranks=1)
    preset = PRESETS[machine.device]
    jobs = args.jobs or default_jobs(machine)
    inputs = [str(item) for item in args.data or [sample_path()]]
    if args.dry_run:
        print(described(args, preset, machine, jobs, inputs, output))
        return 0
    print(machine, flush=True)
    prepare_data(inputs, output / "data", preset.vocab_size)
    experiment = settled(args, preset, machine, jobs, output)
    print(
        f"{experiment.name}: {experiment.steps} steps a run, {runs_at_most(experiment)} runs at most, {jobs} at a time"
    )
    run_arms(experiment, output, machine, jobs=jobs)
    path = write_report(output)
    print(terminal_table(collect(output)))
    print(path)
    return 0


def default_jobs(machine: Layout) -> int:
    """Runs at a time: one for each GPU or core."""
    if machine.device == "cpu":
        return usable_cores()
    import torch

    return torch.cuda.device_count()


def settled(args: argparse.Namespace, preset: Preset, machine: Layout, jobs: int, output: Path) -> Experiment:
    """The experiment of ``output``: as its file has it, else with steps that fit the time, which are written down.

    Raises:
        UserError: flags that ask for another experiment than the one that is there.
    """
    wanted = content(args, preset)
    if (output / FILE).is_file():
        there = read_yaml(output / FILE)
        steps = args.steps or there["base"]["--train-iters"]
        if with_steps(wanted, steps) != there:
            raise UserError(
                f"--output: expected the experiment of {output / FILE}, got flags for another: choose another"
            )
        return parse_experiment(there, output)
    steps = args.steps or steps_by_trial(
        parse_experiment(wanted, output), machine, jobs, output, _minutes(args, preset)
    )
    chosen = with_steps(wanted, steps)
    (output / FILE).write_text(yaml.safe_dump(chosen, sort_keys=False), encoding="utf-8")
    return parse_experiment(chosen, output)


def content(args: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    """The preset's YAML with the flags' seeds and corpus."""
    found = read_yaml(CONFIGS / preset.file)
    names = " ".join(Path(item).name for item in args.data or [])
    seeds = found["seeds"][: args.seeds] if args.seeds else found["seeds"]
    return {**found, "seeds": seeds, "corpus": args.corpus or names or SAMPLE}


def with_steps(found: dict[str, Any], steps: int) -> dict[str, Any]:
    """The YAML's content with another number of steps."""
    return {**found, "base": {**found["base"], "--train-iters": steps}}


def _minutes(args: argparse.Namespace, preset: Preset) -> int:
    return args.minutes or preset.minutes


def steps_by_trial(experiment: Experiment, machine: Layout, jobs: int, output: Path, minutes: int) -> int:
    """Trains `TRIAL_STEPS` of each arm and says how many steps all runs have time for.

    Raises:
        UserError: not even the trial's number of steps.
    """
    print(f"trial: {TRIAL_STEPS} steps of each arm", file=sys.stderr, flush=True)
    trial = replace(
        experiment,
        base={**experiment.base, "--train-iters": TRIAL_STEPS, "--log-interval": 1},
        seeds=(0,),
        learning_rates=(),
        tuning_seeds=(),
        equal=("tokens",),
        evaluations=1,
    )
    run_arms(trial, output / "trial", machine, jobs=jobs)
    folders = [RunFolder(output / "trial" / "runs" / run.folder) for run in trial.runs(trial.layout(machine, jobs))]
    paces = [step_seconds(folder) for folder in folders]
    started = [_start_seconds(folder) for folder in folders]
    steps = fitting_steps(experiment, paces, max(started), 60 * minutes * jobs * TIME_SHARE)
    most = (
        MAX_EPOCHS * sum(len(read(prefix).tokens) for prefix in experiment.data["train"]) // tokens_per_step(experiment)
    )
    if steps > most:
        print(f"steps: {most}, {MAX_EPOCHS} passes over the text, not the {steps} that fit: --data PARQUET for more")
    if min(steps, most) < TRIAL_STEPS:
        raise UserError(
            f"--minutes: expected time for {TRIAL_STEPS} steps a run, got {minutes}: raise it or give --steps"
        )
    return min(steps, most)


def _start_seconds(folder: RunFolder) -> float:
    """What a run takes beside its steps and its validation: imports, building the model, the checkpoint."""
    record = json.loads(folder.record.read_text(encoding="utf-8"))
    lines = [line for line in read_lines(folder.metrics) if line["event"] == "step"]
    return max(0.0, record["seconds"] - sum(line["step_seconds"] for line in lines))


def fitting_steps(experiment: Experiment, paces: list[float], start: float, seconds: float) -> int:
    """Steps a run so that all runs take ``seconds`` of one worker, rounded down to tens.

    Args:
        experiment: its arms, in the order of ``paces``.
        paces: seconds a step of each arm.
        start: seconds of a run beside its steps (the trial's validation included: once too often rather than never).
        seconds: of all workers together.
    """
    tokens = experiment.held_out_tokens or 0
    validation = FORWARD_SHARE * (experiment.evaluations - 1) * tokens / tokens_per_step(experiment)  # in steps
    reference = paces[experiment.arms.index(experiment.reference)]
    tuning = len(experiment.learning_rates) * len(experiment.tuning_seeds)
    seeds, others = len(experiment.seeds), _longer_runs(experiment)
    per_step = sum(paces) * (tuning + seeds) + others * reference
    slack = seconds - start * runs_at_most(experiment) - validation * per_step
    return max(0, int(slack / per_step) // 10 * 10)


def _longer_runs(experiment: Experiment) -> int:
    return (len(experiment.arms) - 1) * len(experiment.seeds) * ("seconds" in experiment.equal)


def runs_at_most(experiment: Experiment) -> int:
    """All runs: tuning, equal tokens, and equal seconds if every arm's steps take another time."""
    tuning = len(experiment.learning_rates) * len(experiment.tuning_seeds)
    return len(experiment.arms) * (tuning + len(experiment.seeds)) + _longer_runs(experiment)


def tokens_per_step(experiment: Experiment) -> int:
    """Of the global batch."""
    return int(experiment.base["--global-batch-size"]) * int(experiment.base["--seq-length"])


def described(
    args: argparse.Namespace, preset: Preset, machine: Layout, jobs: int, inputs: list[str], output: Path
) -> str:
    """What would be done; with the commands, where the data are there already."""
    found = content(args, preset)
    arms, seeds = found["arms"], found["seeds"]
    tuning = f"{len(found['learning_rates'])} learning rates x {len(found['tuning_seeds'])} tuning seeds"
    steps = (
        str(args.steps)
        if args.steps
        else f"as many as fit {_minutes(args, preset)} minutes by a trial of {TRIAL_STEPS}"
    )
    lines = [
        str(machine),
        f"experiment: {CONFIGS / preset.file}",
        f"data: {' '.join(inputs)} -> {output / 'data'} (BPE of {preset.vocab_size} tokens), named {found['corpus']!r}",
        f"runs: {', '.join(arms)} x ({tuning} + {len(seeds)} seeds), then other lengths for equal seconds",
        f"steps a run: {steps}; {jobs} at a time",
    ]
    try:
        experiment = parse_experiment(with_steps(found, args.steps or found["base"]["--train-iters"]), output)
    except UserError:
        return "\n".join([*lines, "commands: once the data are there"])
    layout = experiment.layout(machine, jobs)
    return "\n".join([*lines, preview(placed(experiment, output), output, layout)])


def main() -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's notice cleans up like Ctrl-C
    return run_cli(lambda: _trained(args), args.debug)


def _trained(args: argparse.Namespace) -> int:
    try:
        return run(args)
    except RunFailed as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
