"""Which runs an experiment takes, as far as the finished ones let it be known.

1. With several learning rates: every arm x rate x tuning seed. An arm's rate is the one with the lowest mean validation
   loss; the seeds that chose it do not judge it.
2. Equal tokens: every arm x seed.
3. Equal FLOPs and equal seconds: the arms whose FLOPs per token or step time differ from the reference's get other
   numbers of steps, their schedules scaled, and run again with every seed. Cutting a longer run short instead would
   compare a run that has decayed its learning rate with one that has not. A step's time is the median over seeds of the
   ratio to the reference's run of the same seed.

A step of this that needs results is planned when they are there.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_act.errors import UserError
from megatron_act.experiment.arms import Arm, Experiment, Run
from megatron_act.experiment.layout import Layout
from megatron_act.experiment.records import final_validation, is_finished, run_folder, step_seconds

SAME_TIME = 0.01  # step times that differ by less are equal: timing is not better than that

Steps = dict[str, int]  # by arm


@dataclass(frozen=True)
class Plan:
    """The runs known by now.

    Attributes:
        runs: in the order of training, without repetition.
        rates: the learning rate of each arm, empty where there is nothing to choose or it is not chosen yet.
        budgets: for each comparison that is planned, the steps of each arm.
        waiting: the comparisons that need results first.
    """

    runs: tuple[Run, ...]
    rates: dict[str, float] = field(default_factory=dict)
    budgets: dict[str, Steps] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()


def make_plan(experiment: Experiment, layout: Layout, output: Path) -> Plan:
    """The plan with what ``output`` holds by now.

    Raises:
        UserError: an arm or a layout that cannot be built, or an arm that diverged at every learning rate.
    """
    tuning = tuning_runs(experiment, layout)
    if not _all_finished(tuning, output):
        return Plan(tuple(tuning), waiting=experiment.equal)
    rates = choose_rates(experiment, tuning, output)
    main = experiment.runs(layout, rates)
    finished = _all_finished(main, output)
    budgets: dict[str, Steps] = {}
    for budget in experiment.equal:
        if budget != "seconds" or finished:
            costs = _costs(experiment, layout, main, output, budget)
            budgets[budget] = steps_of(experiment, costs, SAME_TIME if budget == "seconds" else 0.0)
    runs = {run.folder: run for run in (*tuning, *main, *_other_lengths(experiment, layout, rates, budgets))}
    return Plan(tuple(runs.values()), rates, budgets, tuple(b for b in experiment.equal if b not in budgets))


def tuning_runs(experiment: Experiment, layout: Layout) -> list[Run]:
    """The runs that choose the learning rates."""
    return [
        experiment.run(arm, seed, layout, rate)
        for seed in experiment.tuning_seeds
        for arm in experiment.arms
        for rate in experiment.learning_rates
    ]


def choose_rates(experiment: Experiment, tuning: list[Run], output: Path) -> dict[str, float]:
    """Each arm's rate of the lowest mean validation loss over the tuning seeds; a rate that diverged is out."""
    return {arm.name: _best(arm, sweep(arm, tuning, output)) for arm in experiment.arms} if tuning else {}


def _best(arm: Arm, losses: Mapping[float, list[float | None]]) -> float:
    known = {rate: [loss for loss in values if loss is not None] for rate, values in losses.items()}
    means = {rate: statistics.fmean(values) for rate, values in known.items() if len(values) == len(losses[rate])}
    if not means:
        raise UserError(f"learning_rates: expected one at which {arm.name} converges, got none: add lower ones")
    return min(means, key=lambda rate: means[rate])


def sweep(arm: Arm, tuning: list[Run], output: Path) -> dict[float, list[float | None]]:
    """The arm's validation losses by learning rate, one per tuning seed; None where it diverged."""
    losses: dict[float, list[float | None]] = {}
    for run in tuning:
        if run.arm == arm and run.rate is not None:
            losses.setdefault(run.rate, []).append(final_validation(run_folder(output, run)))
    return losses


def _all_finished(runs: list[Run], output: Path) -> bool:
    return all(is_finished(run_folder(output, run), run) for run in runs)


def _costs(experiment: Experiment, layout: Layout, main: list[Run], output: Path, budget: str) -> dict[str, float]:
    """What one step of each arm costs, in units of the reference's."""
    reference = experiment.reference
    if budget == "tokens":
        return {arm.name: 1.0 for arm in experiment.arms}
    if budget == "flops":
        flops = {arm.name: experiment.match(arm, layout).report()["flops_per_token"] for arm in experiment.arms}
        return {name: value / flops[reference.name] for name, value in flops.items()}
    seconds = {(run.arm.name, run.seed): step_seconds(run_folder(output, run)) for run in main}
    return {
        arm.name: statistics.median(
            seconds[arm.name, seed] / seconds[reference.name, seed] for seed in experiment.seeds
        )
        for arm in experiment.arms
    }


def steps_of(experiment: Experiment, costs: Mapping[str, float], tolerance: float) -> Steps:
    """Steps for which each arm spends what the reference spends; costs within ``tolerance`` of it are equal."""
    return {
        name: experiment.steps if abs(cost - 1) <= tolerance else max(1, round(experiment.steps / cost))
        for name, cost in costs.items()
    }


def _other_lengths(
    experiment: Experiment, layout: Layout, rates: Mapping[str, float], budgets: Mapping[str, Steps]
) -> list[Run]:
    return [
        experiment.run(arm, seed, layout, rates.get(arm.name), steps[arm.name])
        for steps in budgets.values()
        for seed in experiment.seeds
        for arm in experiment.arms
        if steps[arm.name] != experiment.steps
    ]
