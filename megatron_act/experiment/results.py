"""From the runs' JSONL files to figures: ``results.json`` holds every number that the page shows.

``summary.json`` is the same without curves, commands and paths: small enough to be kept beside the text that quotes it.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from megatron_act.errors import UserError
from megatron_act.experiment import curves
from megatron_act.experiment.comparisons import SPREAD, compare, spread
from megatron_act.experiment.curves import Curve
from megatron_act.experiment.held_out import HeldOut
from megatron_act.experiment.records import RunFolder, read_lines

EXPORT_KEYS = ("family", "max_logit_difference", "generated")
ONE_SEED = "1 seed: no interval, no winner claimed"

Result = dict[str, Any]


def run_result(entry: Result, output: Path, held_out: HeldOut | None = None) -> Result | None:
    """Every figure of one run; None where it has not logged a step.

    Args:
        entry: the run in ``experiment.json``.
        output: the experiment's folder.
        held_out: what the validation loss is over, for bits per byte.
    """
    folder = RunFolder(output / entry["folder"])
    lines = read_lines(folder.metrics)
    curve = curves.read_curve(lines)
    start = next((line for line in lines if line["event"] == "start"), None)
    if start is None or not curve.iterations:
        return None
    match, tokens = entry["match"], curve.tokens[-1]
    train, loss = curves.final_loss(curve), curves.validation_loss(curve)
    return {
        **{key: entry[key] for key in ("name", "activation", "seed", "rate", "folder", "command", "train_iters")},
        "finished": folder.record.is_file(),
        "diverged": train is None or (loss is None and bool(curve.validation)),
        "ffn_hidden_size": match["ffn_hidden_size"],
        "parameters": match["parameters"],
        "parameters_without_embeddings": match["parameters_without_embeddings"],
        "parameters_built": start["parameters"],
        "flops_per_token": match["flops_per_token"],
        "tokens": tokens,
        "total_flops": tokens * match["flops_per_token"],
        "final_train_loss": train,
        "validation_loss": loss,
        "validation_perplexity": None if loss is None else math.exp(loss),
        "bits_per_byte": None if loss is None or held_out is None else held_out.bits_per_byte(loss),
        "tokens_per_second": curves.tokens_per_second(curve),
        "train_seconds": curve.train_seconds[-1],
        "peak_memory_bytes": curves.peak_memory(lines),
        "telemetry_share": curves.telemetry_share(lines),
        "scalars_initial": initial_scalars(entry, curve),
        "scalars_final": {name: values[-1] for name, values in curve.scalars.items()},
        "fractions_final": {name: values[-1] for name, values in curve.fractions.items()},
        "versions": start["versions"],
        "curve": vars(curve),
    }


def initial_scalars(entry: Result, curve: Curve) -> dict[str, list[float]]:
    """Effective values before the first step, by layer: the registry's, or those of ``--activation-init``."""
    from megatron_act.arguments import parse_init
    from megatron_act.kernels import api as kernels

    if not curve.scalars:
        return {}
    given = parse_init(list(entry["flags"].get("--activation-init") or []))
    layers = len(next(iter(curve.scalars.values()))[0])
    params = kernels.get(entry["activation"]).params
    return {param.name: [given.get(param.name, param.init)] * layers for param in params}


def arm_result(runs: list[Result]) -> Result:
    """One arm at equal tokens over its seeds: the figures that all runs share, and the spread of those that differ."""
    first = runs[0]
    shared = (
        *("name", "activation", "rate", "ffn_hidden_size", "parameters", "parameters_without_embeddings"),
        *("parameters_built", "flops_per_token", "tokens", "total_flops", "scalars_initial"),
    )
    return {
        **{key: first[key] for key in shared},
        "seeds": [run["seed"] for run in runs],
        **{key: spread([run[key] for run in runs]) for key in SPREAD},
        **{key: _by_layer([run[key] for run in runs]) for key in ("scalars_final", "fractions_final")},
    }


def _by_layer(values: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Means over runs, by name and layer."""
    return {
        name: [statistics.fmean(layer) for layer in zip(*(value[name] for value in values), strict=True)]
        for name in values[0]
    }


def collect(output: str | Path) -> Result:
    """Every figure of an experiment's folder; see `write_results`.

    Raises:
        UserError: no ``experiment.json``, or no run at equal tokens that has logged a step.
    """
    output = Path(output)
    description = _description(output)
    held_out = HeldOut(**description["held_out"]) if description["held_out"] else None
    found = [run_result(entry, output, held_out) for entry in description["runs"]]
    runs = [run for run in found if run]
    main = _at(runs, description, description["steps_by_arm"])
    if not any(main.values()):
        raise UserError(f"{output}: expected runs with metrics, got none: leave out --report-only")
    return {
        **{key: description[key] for key in _KEPT},
        "layout": _layouts(output, description),
        "note": _note(main),
        "missing": [entry["folder"] for entry, run in zip(description["runs"], found, strict=True) if run is None],
        "match": {entry["name"]: entry["match"] for entry in description["runs"]},
        "arms": [arm_result(group) for group in main.values() if group],
        "budgets": {
            name: compare({arm: _finished(group) for arm, group in _at(runs, description, steps).items()}, steps)
            for name, steps in description["budgets"].items()
        },
        "sweep": _sweep(runs, description),
        "main": [run["folder"] for group in main.values() for run in group],
        "runs": runs,
        "export": read_export(output),
    }


_KEPT = (
    *("name", "baseline", "reference", "machine", "data", "corpus", "held_out", "seeds", "steps", "waiting"),
    *("learning_rates", "tuning_seeds", "rates"),
)


def _description(output: Path) -> Result:
    try:
        description = json.loads((output / "experiment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{output}: expected an experiment's folder, got no experiment.json: run it first") from None
    names = dict.fromkeys(entry["name"] for entry in description["runs"])
    return {**description, "steps_by_arm": dict.fromkeys(names, description["steps"])}


def _at(runs: list[Result], description: Result, steps: dict[str, int]) -> dict[str, list[Result]]:
    """The runs of one comparison by arm: the chosen learning rate, these steps, the seeds that judge."""
    rates = description["rates"]
    return {
        arm: [
            run
            for run in runs
            if run["name"] == arm
            and run["train_iters"] == steps[arm]
            and run["rate"] == rates.get(arm)
            and run["seed"] in description["seeds"]
        ]
        for arm in description["steps_by_arm"]
    }


def _finished(runs: list[Result]) -> list[Result]:
    return [run for run in runs if run["finished"]]


def _note(main: dict[str, list[Result]]) -> str:
    seeds = max(len(group) for group in main.values())
    return ONE_SEED if seeds == 1 else f"{seeds} seeds: mean ± half of the 95 % interval (Student's t)"


def _sweep(runs: list[Result], description: Result) -> dict[str, dict[str, list[float | None]]]:
    """Validation losses of the tuning runs, by arm and learning rate."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for run in _finished(runs):
        if run["seed"] in description["tuning_seeds"]:
            found.setdefault(run["name"], {}).setdefault(f"{run['rate']:g}", []).append(run["validation_loss"])
    return found


def _layouts(output: Path, description: Result) -> str:
    """Where the runs really ran: tasks of a job array may meet several kinds of machine."""
    found: dict[str, None] = {}
    for entry in description["runs"]:
        record = RunFolder(output / entry["folder"]).record
        if record.is_file() and (layout := json.loads(record.read_text(encoding="utf-8")).get("layout")):
            found[layout] = None
    return "; ".join(found) or description["layout"]


def read_export(output: Path) -> Result:
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


SUMMARY_RUN = (
    *("name", "seed", "rate", "train_iters", "finished", "diverged", "tokens", "total_flops", "train_seconds"),
    *("final_train_loss", "validation_loss", "bits_per_byte", "tokens_per_second", "peak_memory_bytes"),
    *("telemetry_share", "versions"),
)


def write_results(output: str | Path, results: Result) -> Path:
    """Writes ``results.json`` (and ``summary.json``) and returns its path."""
    path = Path(output) / "results.json"
    path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    path.with_name("summary.json").write_text(json.dumps(summary(results), indent=1) + "\n", encoding="utf-8")
    return path


def summary(results: Result) -> Result:
    """The results without curves, commands and paths of this machine."""
    runs = [{key: run[key] for key in SUMMARY_RUN} for run in results["runs"]]
    return {**{key: value for key, value in results.items() if key not in ("data", "export", "main")}, "runs": runs}
