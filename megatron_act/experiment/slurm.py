"""An experiment's unfinished runs as one Slurm job array: a task trains one run, with ``tools/compare.py --only``."""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_act.errors import UserError
from megatron_act.experiment.arms import Experiment
from megatron_act.experiment.held_out import prepare
from megatron_act.experiment.layout import Layout
from megatron_act.experiment.plan import Plan, make_plan
from megatron_act.experiment.runner import locked, unfinished, write_description

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare.py"


def submit(experiment: Experiment, file: str, output: str | Path, layout: Layout) -> str:
    """Writes ``OUTPUT/slurm/array.sh`` for what is not finished and hands it to sbatch.

    Args:
        experiment: parsed; its ``slurm`` are the sbatch options.
        file: its YAML, which the tasks read again.
        output: the experiment's folder, on a file system that the nodes share.
        layout: this machine's; the experiment's wishes decide where the tasks run.

    Returns:
        What to tell the person: the job's number, or that nothing is left to do.

    Raises:
        UserError: no ``layout`` in the YAML to plan with, or sbatch refuses.
    """
    if experiment.device is None or experiment.ranks is None:
        raise UserError("layout: expected device and ranks with --slurm (this machine may have no GPU), got none: add")
    output = Path(output).resolve()
    with locked(output):
        plan, runs = _planned(experiment, output, layout)
        if not runs:
            return "nothing to submit: every run is finished"
        folder = output / "slurm"
        folder.mkdir(exist_ok=True)
        options = _options(experiment, len(runs), folder)
        script = array_script(options, runs, file, output)
        (folder / "array.sh").write_text(script, encoding="utf-8")
    number = _sbatch(folder / "array.sh")
    later = f"; then the same command again, for equal {', '.join(plan.waiting)}" if plan.waiting else ""
    return f"job {number}: {len(runs)} runs; when it has ended: the same command with --report-only{later}"


def _planned(experiment: Experiment, output: Path, layout: Layout) -> tuple[Plan, list[str]]:
    layout = experiment.layout(layout)
    experiment, held_out = prepare(experiment, output)
    plan = make_plan(experiment, layout, output)
    write_description(experiment, plan, output, layout, held_out)
    return plan, [run.folder for run in unfinished(plan, output)]


def _options(experiment: Experiment, runs: int, folder: Path) -> dict[str, Any]:
    """The sbatch options: ours, and over them the experiment's."""
    wanted = dict(experiment.slurm)
    parallel = wanted.pop("parallel", None)
    gpus = {"gpus-per-node": experiment.ranks} if experiment.device == "cuda" else {}
    return {
        "job-name": experiment.name,
        "nodes": 1,
        "ntasks": 1,  # torchrun starts the ranks
        **gpus,
        "output": folder / "%A_%a.log",
        **wanted,
        "array": f"0-{runs - 1}" + (f"%{parallel}" if parallel else ""),
    }


def array_script(options: Mapping[str, Any], runs: Sequence[str], file: str, output: Path) -> str:
    """The batch script: one task a run, chosen by the task's number."""
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    words = [sys.executable, str(TOOL), str(Path(file).resolve()), "--output", str(output), "--only"]
    names = "\n".join(f"  {shlex.quote(run)}" for run in runs)
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *lines,
            "set -euo pipefail",
            f"runs=(\n{names}\n)",
            f'exec {shlex.join(words)} "${{runs[$SLURM_ARRAY_TASK_ID]}}"',
            "",
        ]
    )


def _sbatch(script: Path) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"--slurm: expected sbatch on PATH, got none: submit {script} where it is") from None
    if done.returncode:
        raise UserError(f"--slurm: expected sbatch to take {script}, got: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]
