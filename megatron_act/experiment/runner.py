"""Trains whatever of an experiment's plan is not finished, one run after another or several at a time."""

import contextlib
import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_act.errors import UserError
from megatron_act.experiment.arms import Experiment, Run
from megatron_act.experiment.held_out import HeldOut, prepare
from megatron_act.experiment.jobs import Job, command
from megatron_act.experiment.layout import Layout, check_jobs
from megatron_act.experiment.machine import describe_machine
from megatron_act.experiment.plan import Plan, make_plan
from megatron_act.experiment.records import is_finished, run_folder

POLL_SECONDS = 0.3


def run_arms(experiment: Experiment, output: str | Path, layout: Layout, force: bool = False, jobs: int = 1) -> None:
    """Trains every run of an experiment into ``output`` and writes ``experiment.json`` there.

    Args:
        experiment: see `arms`.
        output: folder; made with its parents. Finished runs of the same command and inputs are kept.
        layout: the machine's (`layout.detect`).
        force: run finished ones again.
        jobs: runs at a time.

    Raises:
        UserError: bad input, found here or by a run.
        RunFailed: a run ended for another reason.
    """
    output, layout = Path(output).resolve(), experiment.layout(layout, jobs)
    check_jobs(layout, jobs)
    with locked(output) as lock:
        if force:
            _forget(output)
        experiment, held_out = prepare(experiment, output)
        trained = 0
        while True:  # results of one round may add runs to the next
            plan = make_plan(experiment, layout, output)
            write_description(experiment, plan, output, layout, held_out)
            todo = unfinished(plan, output)
            if not trained and len(todo) < len(plan.runs):
                print(f"{len(plan.runs) - len(todo)} of {len(plan.runs)} runs finished already, kept", file=sys.stderr)
            if not todo:
                return
            train_all(todo, output, layout, lock, jobs)
            trained += len(todo)


def run_one(experiment: Experiment, output: str | Path, layout: Layout, folder: str) -> None:
    """Trains one run of the plan by its folder's name, beside others of the same experiment: a task of a job array.

    Raises:
        UserError: a name that the plan lacks, or bad input.
        RunFailed: the run ended for another reason.
    """
    output, layout = Path(output).resolve(), experiment.layout(layout)
    experiment, _ = prepare(experiment, output)
    runs = {run.folder: run for run in make_plan(experiment, layout, output).runs}
    if folder not in runs:
        raise UserError(f"--only: expected one of {', '.join(runs)}, got {folder!r}")
    with locked(output, f".lock-{folder}") as lock:
        if not is_finished(run_folder(output, runs[folder]), runs[folder]):
            train_all([runs[folder]], output, layout, lock, 1)


def unfinished(plan: Plan, output: Path) -> list[Run]:
    """The plan's runs that are still to be trained."""
    return [run for run in plan.runs if not is_finished(run_folder(output, run), run)]


def train_all(runs: list[Run], output: Path, layout: Layout, lock: int, jobs: int) -> None:
    """Trains the runs in order, ``jobs`` at a time; if one fails or we are interrupted, none goes on."""
    waiting, active = list(enumerate(runs, start=1)), dict[int, Job]()
    try:
        while waiting or active:
            for slot in range(jobs):
                if slot not in active and waiting:
                    number, run = waiting.pop(0)
                    if len(runs) > 1:
                        print(f"[{number}/{len(runs)}] {run.label}", file=sys.stderr, flush=True)
                    active[slot] = Job(run, run_folder(output, run), layout, lock, slot)
            for slot in [slot for slot, job in active.items() if job.poll()]:
                del active[slot]
            time.sleep(POLL_SECONDS)
    except BaseException:  # Ctrl-C above all: nothing may go on training
        for job in active.values():
            job.stop()
        raise


def write_description(
    experiment: Experiment, plan: Plan, output: Path, layout: Layout, held_out: HeldOut | None
) -> None:
    """Writes ``experiment.json``: what the results and the report need besides the runs' own files."""
    content = {
        "name": experiment.name,
        "baseline": experiment.baseline,
        "reference": experiment.reference.name,
        "layout": str(layout),
        "machine": describe_machine(),
        "data": {part: list(prefixes) for part, prefixes in experiment.data.items()} or "mock data",
        "corpus": experiment.corpus,
        "held_out": held_out and asdict(held_out),
        "seeds": list(experiment.seeds),
        "steps": experiment.steps,
        "learning_rates": list(experiment.learning_rates),
        "tuning_seeds": list(experiment.tuning_seeds),
        "rates": plan.rates,
        "budgets": plan.budgets,
        "waiting": list(plan.waiting),
        "runs": [_entry(run, output, layout) for run in plan.runs],
    }
    draft = output / "experiment.partial"
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(output / "experiment.json")


def _entry(run: Run, output: Path, layout: Layout) -> dict[str, Any]:
    return {
        "name": run.arm.name,
        "activation": run.arm.activation,
        "seed": run.seed,
        "rate": run.rate,
        "folder": f"runs/{run.folder}",
        "flags": run.arm.flags,
        "train_iters": run.train_iters,
        "command": shlex.join(command(run, run_folder(output, run), layout)),
        "match": run.match.report(),
    }


def _forget(output: Path) -> None:
    for record in output.glob("runs/*/run.json"):
        record.unlink()


@contextlib.contextmanager
def locked(output: Path, name: str = ".lock") -> Iterator[int]:
    """Makes the folder and holds its lock; yields the descriptor, for children to inherit.

    Raises:
        UserError: a folder that cannot be written, or that another process holds.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = os.open(output / name, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(f"--output: expected a folder to write, got {output}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError:
        raise UserError(f"--output: expected a folder of its own, got {output}: another run is writing there") from None
    finally:
        os.close(lock)
