"""What an experiment would train, without training: its runs, the commands, tokens and FLOPs."""

import shlex
from pathlib import Path

from megatron_act.experiment.arms import Experiment
from megatron_act.experiment.held_out import placed
from megatron_act.experiment.jobs import command
from megatron_act.experiment.layout import Layout
from megatron_act.experiment.plan import Plan, make_plan
from megatron_act.experiment.records import run_folder
from megatron_act.experiment.runner import unfinished


def preview(experiment: Experiment, output: Path, layout: Layout) -> str:
    """A line of counts, the command of every unfinished run, and the comparisons that wait for results."""
    experiment = placed(experiment, output)
    plan = make_plan(experiment, layout, output)
    todo = unfinished(plan, output)
    commands = [shlex.join(command(run, run_folder(output, run), layout)) for run in todo]
    waiting = later(experiment, plan)
    lines = [f"{len(todo)} of {len(plan.runs)} known runs are to be trained", *commands]
    return "\n".join(lines + ([waiting] if waiting else []))


def later(experiment: Experiment, plan: Plan) -> str:
    """How many runs may follow when the known ones are finished; empty if none."""
    if not plan.waiting:
        return ""
    arms, seeds = len(experiment.arms), len(experiment.seeds)
    main = arms * seeds if "tokens" in plan.waiting else 0
    others = (arms - 1) * seeds * len([name for name in plan.waiting if name != "tokens"])
    return f"then, as far as results ask for them, up to {main + others} more: equal {', '.join(plan.waiting)}"
