"""From the runs' JSONL files to figures: ``results.json`` holds every number that the page shows."""

import json
import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_act.errors import UserError
from megatron_act.experiment.records import RunFolder, read_lines

EXPORT_KEYS = ("family", "max_logit_difference", "generated")
FINAL_SHARE = 0.1  # of the logged steps: their mean is the final training loss
ONE_SEED = "1 seed: no interval, no winner claimed"


@dataclass(frozen=True)
class Curve:
    """A run's logged steps: equally long lists, one entry per step.

    Attributes:
        iterations: training steps done.
        tokens: tokens trained on.
        losses: training loss in nats per token (None where the step was skipped).
        seconds: wall time since the first step.
        scalars: effective values, ``scalars[name][step][layer]``.
    """

    iterations: list[int]
    tokens: list[int]
    losses: list[float | None]
    seconds: list[float]
    scalars: dict[str, list[list[float]]]


def read_curve(lines: list[dict[str, Any]]) -> Curve:
    """The step lines of a JSONL as columns; of an iteration that a resumed run repeated, the last one."""
    steps = list({line["iteration"]: line for line in lines if line["event"] == "step"}.values())
    names = steps[0]["scalars"] if steps else {}
    columns = {key: [step[key] for step in steps] for key in ("iteration", "tokens", "loss", "seconds")}
    scalars = {name: [step["scalars"][name] for step in steps] for name in names}
    return Curve(columns["iteration"], columns["tokens"], columns["loss"], columns["seconds"], scalars)


def final_loss(curve: Curve) -> float:
    """Mean training loss of the last tenth of the logged steps (at least one), in nats per token."""
    losses = [loss for loss in curve.losses if loss is not None]
    return statistics.fmean(losses[-max(1, math.ceil(FINAL_SHARE * len(losses))) :])


def validation_loss(lines: list[dict[str, Any]]) -> float | None:
    """The last validation loss, in nats per token; None where nothing was evaluated."""
    losses = [line["loss"] for line in lines if line["event"] == "evaluation" and line["split"] == "validation"]
    return losses[-1] if losses else None


def tokens_per_second(curve: Curve) -> float | None:
    """Median speed between logged steps: evaluations and checkpoints in between do not count."""
    points = list(zip(curve.tokens, curve.seconds, strict=True))
    speeds = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(points) if b[1] > a[1]]
    return statistics.median(speeds) if speeds else None


def run_result(entry: dict[str, Any], output: Path) -> dict[str, Any]:
    """Every figure of one run.

    Args:
        entry: the run in ``experiment.json``.
        output: the experiment's folder.

    Raises:
        UserError: the run left no metrics.
    """
    folder = RunFolder(output / entry["folder"])
    lines = read_lines(folder.metrics)
    curve = read_curve(lines)
    start = next((line for line in lines if line["event"] == "start"), None)
    if start is None or not curve.iterations:
        raise UserError(f"{folder.metrics}: expected a run's metrics, got none: leave out --report-only")
    match, tokens = entry["match"], curve.tokens[-1]
    loss = validation_loss(lines)
    return {
        **{key: entry[key] for key in ("name", "activation", "seed", "command", "train_iters")},
        "finished": folder.record.is_file(),
        "ffn_hidden_size": match["ffn_hidden_size"],
        "parameters": match["parameters"],
        "parameters_without_embeddings": match["parameters_without_embeddings"],
        "parameters_built": start["parameters"],
        "flops_per_token": match["flops_per_token"],
        "tokens": tokens,
        "total_flops": tokens * match["flops_per_token"],
        "final_train_loss": final_loss(curve),
        "validation_loss": loss,
        "validation_perplexity": None if loss is None else math.exp(loss),
        "tokens_per_second": tokens_per_second(curve),
        "scalars_initial": initial_scalars(entry, curve),
        "scalars_final": {name: values[-1] for name, values in curve.scalars.items()},
        "versions": start["versions"],
        "curve": vars(curve),
    }


def initial_scalars(entry: dict[str, Any], curve: Curve) -> dict[str, list[float]]:
    """Effective values before the first step, by layer: the registry's, or those of ``--activation-init``."""
    from megatron_act.arguments import parse_init
    from megatron_act.kernels import api as kernels

    if not curve.scalars:
        return {}
    given = parse_init(list(entry["flags"].get("--activation-init") or []))
    layers = len(next(iter(curve.scalars.values()))[0])
    params = kernels.get(entry["activation"]).params
    return {param.name: [given.get(param.name, param.init)] * layers for param in params}


def spread(values: list[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds; the latter None for one seed, both None where a value is absent."""
    present = [value for value in values if value is not None]
    if len(present) != len(values):
        return {"mean": None, "sd": None}
    return {"mean": statistics.fmean(present), "sd": statistics.stdev(present) if len(present) > 1 else None}


SPREAD_KEYS = ("final_train_loss", "validation_loss", "validation_perplexity", "tokens_per_second")


def arm_result(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm over its seeds: the figures that all runs share, and the spread of those that differ."""
    first = runs[0]
    shared = (
        *("name", "activation", "ffn_hidden_size", "parameters", "parameters_without_embeddings", "parameters_built"),
        *("flops_per_token", "tokens", "total_flops"),
    )
    return {
        **{key: first[key] for key in shared},
        "seeds": [run["seed"] for run in runs],
        **{key: spread([run[key] for run in runs]) for key in SPREAD_KEYS},
        "scalars_initial": first["scalars_initial"],
        "scalars_final": {
            name: [statistics.fmean(layer) for layer in zip(*(run["scalars_final"][name] for run in runs), strict=True)]
            for name in first["scalars_final"]
        },
    }


def collect(output: str | Path) -> dict[str, Any]:
    """Every figure of an experiment's folder; see `write_results`.

    Raises:
        UserError: no ``experiment.json``, or a run without metrics.
    """
    output = Path(output)
    try:
        description = json.loads((output / "experiment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{output}: expected an experiment's folder, got no experiment.json: run it first") from None
    runs = [run_result(entry, output) for entry in description["runs"]]
    names = dict.fromkeys(run["name"] for run in runs)
    seeds = len({run["seed"] for run in runs})
    return {
        **{key: description[key] for key in ("name", "baseline", "layout", "machine", "data")},
        "seeds": seeds,
        "note": ONE_SEED if seeds == 1 else f"{seeds} seeds: mean ± standard deviation",
        "match": {entry["name"]: entry["match"] for entry in description["runs"]},
        "arms": [arm_result([run for run in runs if run["name"] == name]) for name in names],
        "runs": runs,
        "export": read_export(output),
    }


def read_export(output: Path) -> dict[str, Any]:
    """Exported arms by ``export.json``: ``{arm: {family, max_logit_difference, generated}}``; may be empty."""
    try:
        arms = json.loads((output / "export.json").read_text(encoding="utf-8"))["arms"]
        return {name: {key: arm[key] for key in EXPORT_KEYS} for name, arm in arms.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{output}/export.json: expected {{'arms': {{NAME: {{{', '.join(EXPORT_KEYS)}}}}}}}, got something else"
        ) from None


def write_results(output: str | Path, results: dict[str, Any]) -> Path:
    """Writes ``results.json`` and returns its path."""
    path = Path(output) / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path
