"""The model card of an export: Hugging Face's ``README.md`` with a YAML header and the training's figures."""

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_act
from megatron_act.checkpoint.info_checkpoint import scalars_by_layer
from megatron_act.checkpoint.reader import MegatronCheckpoint
from megatron_act.errors import UserError

# what of the run's arguments a reader of the card asks for first
SETTINGS = (
    "seq_length",
    "global_batch_size",
    "optimizer",
    "lr",
    "min_lr",
    "lr_decay_style",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "clip_grad",
    "seed",
)


@dataclass(frozen=True)
class Model:
    """What the card says of the exported model; ``ships_code``: it needs the modelling file in its folder."""

    name: str
    architecture: str
    activation: str
    dtype: str
    parameters: int
    ships_code: bool = False


def card_text(
    checkpoint: MegatronCheckpoint,
    model: Model,
    metrics: str | Path | None = None,
    command: Sequence[str] | None = None,
) -> str:
    """The card.

    Args:
        checkpoint: what was exported.
        model: what it became.
        metrics: the file of the run's ``--metrics-jsonl``; default: where the run wrote it, if that is still there.
        command: the words that made the export; default: this process's.

    Raises:
        UserError: a metrics file that is given and holds no step of the checkpoint's iteration.
    """
    figures = training_figures(checkpoint, metrics)
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    parts = [_header(model), _opening(model), f"## Training\n\n| | |\n|---|---|\n{table}"]
    if scalars := scalars_by_layer(checkpoint, model.activation):
        parts.append(f"## Scalars of {model.activation} by layer\n\n{_scalar_table(scalars)}")
    words = shlex.join(command or [Path(sys.argv[0]).name, *sys.argv[1:]])
    parts.append(f"## Made by\n\nmegatron-act {megatron_act.__version__}:\n\n```\n{words}\n```")
    return "\n\n".join(parts) + "\n"


def _header(model: Model) -> str:
    tags = "\n".join(f"- {tag}" for tag in ("megatron-act", model.activation))
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{tags}\n---"


def _opening(model: Model) -> str:
    trust = ", trust_remote_code=True" if model.ships_code else ""
    return f"""# {model.name}

`{model.architecture}`, activation {model.activation}, {model.parameters:,} parameters in {model.dtype}, exported from a
Megatron checkpoint.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="{model.dtype}"{trust})
```"""


def training_figures(checkpoint: MegatronCheckpoint, metrics: str | Path | None = None) -> dict[str, str]:
    """Iteration, tokens, losses and settings, in the order in which the card shows them."""
    args, iteration = checkpoint.args, checkpoint.iteration
    figures = {"iteration": f"{iteration:,}", "tokens": _tokens(args)}
    records = _records(args, metrics)
    for name, record in {
        "training loss": _step(records, iteration),
        "validation loss": _validation(records, iteration),
    }.items():
        if record:
            figures[name] = f"{record['loss']:.4f} (iteration {record['iteration']:,})"
    if metrics is not None and "training loss" not in figures:
        raise UserError(f"--metrics-jsonl {metrics}: expected a step of iteration {iteration}, got none: another run's")
    settings = {name: getattr(args, name, None) for name in SETTINGS}
    return figures | {name: f"{value}" for name, value in settings.items() if value is not None}


def _tokens(args: Namespace) -> str:
    samples, length = getattr(args, "consumed_train_samples", None), getattr(args, "seq_length", None)
    return f"{samples * length:,}" if samples and length else "unknown"


def _records(args: Namespace, metrics: str | Path | None) -> list[dict[str, Any]]:
    path = metrics or getattr(args, "metrics_jsonl", None)
    if path is None or (metrics is None and not Path(path).is_file()):
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--metrics-jsonl {path}: expected one JSON object a line, got: {error}") from None


def _step(records: Sequence[Mapping[str, Any]], iteration: int) -> Mapping[str, Any] | None:
    found = [each for each in records if each.get("event") == "step" and each["iteration"] == iteration]
    return found[-1] if found else None


def _validation(records: Sequence[Mapping[str, Any]], iteration: int) -> Mapping[str, Any] | None:
    """The last one up to the checkpoint."""
    found = [each for each in records if each.get("event") == "evaluation" and each.get("split") == "validation"]
    before = [each for each in found if each["iteration"] <= iteration]
    return before[-1] if before else None


def _scalar_table(layers: Sequence[Mapping[str, Sequence[float]]]) -> str:
    names = list(dict.fromkeys(name for layer in layers for name in layer))
    rows = [
        f"| {i} | " + " | ".join(_range(layer.get(name, ())) for name in names) + " |" for i, layer in enumerate(layers)
    ]
    return "\n".join([f"| layer | {' | '.join(names)} |", "|---|" + "---|" * len(names), *rows])


def _range(values: Sequence[float]) -> str:
    return " to ".join(f"{value:.6f}" for value in sorted({min(values), max(values)})) if values else ""
