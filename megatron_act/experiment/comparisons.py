"""The arms given equally much of one thing (tokens, FLOPs or seconds): intervals by arm, paired tests by pair.

What is compared is the validation loss, in nats per token; the training loss where no run was validated. A difference
is called one only where Holm's correction over all pairs of the comparison leaves p below 0.05; otherwise the sentence
says how small a difference the study could have seen.
"""

from dataclasses import asdict
from itertools import combinations
from typing import Any

from megatron_act.experiment.intervals import Paired, holm, mean_interval, paired

LEVEL = 0.05
METRICS = ("validation_loss", "final_train_loss")
SPREAD = (*METRICS, "validation_perplexity", "bits_per_byte", "tokens_per_second", "train_seconds", "peak_memory_bytes")

Result = dict[str, Any]


def compare(runs: dict[str, list[Result]], steps: dict[str, int]) -> Result:
    """One comparison.

    Args:
        runs: finished runs of each arm, in the experiment's order of arms; an arm may have none yet.
        steps: each arm's steps.

    Returns:
        ``metric``, ``steps``, ``arms`` (one entry per arm with runs), ``pairs`` (of arms with runs of the same seed).
    """
    metric = _metric([run for group in runs.values() for run in group])
    return {
        "metric": metric,
        "steps": steps,
        "arms": [arm_entry(name, group) for name, group in runs.items() if group],
        "pairs": _pairs(runs, metric),
    }


def _metric(runs: list[Result]) -> str:
    return METRICS[0] if any(run[METRICS[0]] is not None for run in runs) else METRICS[1]


def arm_entry(name: str, runs: list[Result]) -> Result:
    """One arm over its seeds: what its runs share, and the interval of what differs."""
    first = runs[0]
    shared = ("tokens", "total_flops", "rate")
    return {
        "name": name,
        "steps": first["train_iters"],
        **{key: first[key] for key in shared},
        "seeds": [run["seed"] for run in runs],
        "diverged": [run["seed"] for run in runs if run["diverged"]],
        **{key: spread([run[key] for run in runs]) for key in SPREAD},
    }


def spread(values: list[float | None]) -> Result:
    """The interval of the values; all None where one is absent: a mean over the runs that converged would flatter."""
    known = [value for value in values if value is not None]
    if len(known) != len(values) or not known:
        return {"n": len(values), "mean": None, "sd": None, "low": None, "high": None}
    return asdict(mean_interval(known))


def _pairs(runs: dict[str, list[Result]], metric: str) -> list[Result]:
    found = []
    for first, second in combinations(runs, 2):
        values = [
            {run["seed"]: run[metric] for run in runs[name] if run[metric] is not None} for name in (first, second)
        ]
        seeds = [seed for seed in values[0] if seed in values[1]]
        if seeds:
            test = paired(*([group[seed] for seed in seeds] for group in values))
            found.append(_pair_entry(first, second, seeds, test))
    known = [pair for pair in found if pair["p"] is not None]
    for pair, p in zip(known, holm([pair["p"] for pair in known]), strict=True):
        pair["p_holm"] = p
    return [{**pair, "verdict": verdict(pair)} for pair in found]


def _pair_entry(first: str, second: str, seeds: list[int], test: Paired) -> Result:
    numbers = {"p": test.p, "p_holm": None, "detectable": test.detectable}
    return {"first": first, "second": second, "seeds": seeds, **asdict(test.interval), **numbers}


def verdict(pair: Result) -> str:
    """What the pair shows, in one sentence; never a winner without an interval."""
    first, second, mean = pair["first"], pair["second"], pair["mean"]
    if pair["p"] is None:
        return f"{second} and {first}: one pair of runs, no interval, nothing claimed"
    interval = f"[{pair['low']:+.4f}, {pair['high']:+.4f}]"
    order = f"{second} is {'lower' if mean < 0 else 'higher'} than {first} by {abs(mean):.4f} nats {interval}"
    if pair["p_holm"] < LEVEL:
        return order
    if pair["p"] < LEVEL:
        return f"{order}, which does not outlast Holm's correction (p = {pair['p_holm']:.2g}): not claimed"
    seen = f"the study would have seen {pair['detectable']:.4f} in 80 % of cases"
    return f"no difference seen between {second} and {first}: {mean:+.4f} nats {interval}; {seen}"
