"""An experiment's YAML: one model, several activations, each at the baseline's parameters and FLOPs.

    name: tiny
    base_config: tiny-swiglu.yaml     # MODEL_ARGS; or `base: {--num-layers: 4, ...}`; with both, base wins
    baseline: {activation: swiglu, ffn_hidden_size: 512}    # default: what the base says
    arms: [swiglu, relu2, {name: xielu-hot, activation: xielu, flags: {--lr: 4.0e-3}}]
    seeds: [1, 2, 3]                  # default: the base's --seed alone
    equal: [tokens, flops, seconds]   # the comparisons; default: tokens alone
    learning_rates: [1.0e-3, 2.0e-3]  # each arm takes the one that is best on tuning_seeds; default: the base's --lr
    tuning_seeds: [101]               # seeds of those runs, none of `seeds`
    schedule: {kind: wsd, warmup: 0.1, decay: 0.2, final: 0.0}    # or kind: cosine; default: the base's flags
    data: {train: [edu_train], valid: [edu_valid]}          # .bin/.idx prefixes; or one list for Megatron's --split
    corpus: "my corpus, not FineWeb-Edu"                   # the data's name for people; default: the files' names
    tokenizer: tokenizer              # a folder that AutoTokenizer opens
    held_out_tokens: 1000000          # of the validation data, the first so many (whole documents); default: all
    evaluations: 5                    # validations per run, the last after the last step; default: that one
    layout: {ranks: 2, tensor_parallel: 2, device: cuda}    # default: what the machine allows
    align: 1                          # what must divide each rank's MLP width
    slurm: {partition: gpu, time: "04:00:00", parallel: 8}  # sbatch options; parallel: runs at a time

Paths are relative to the YAML's folder. Every arm's ``ffn_hidden_size`` is solved by ``megatron_act.match``.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_act import model_args
from megatron_act.errors import UserError
from megatron_act.experiment.arms import BUDGETS, Arm, Experiment, registered_scalars
from megatron_act.experiment.schedule import Schedule, parse_schedule
from megatron_act.model_args import ACTIVATION_FLAGS, Flags

TOP_KEYS = (
    *("name", "base", "base_config", "baseline", "arms", "seeds", "equal", "learning_rates", "tuning_seeds"),
    *("schedule", "data", "corpus", "tokenizer", "held_out_tokens", "evaluations", "layout", "align", "slurm"),
)
ARM_KEYS = ("name", "activation", "flags")
SCHEDULE_KEYS = ("kind", "warmup", "decay", "final")
LAYOUT_KEYS = ("ranks", "tensor_parallel", "device")
MEGATRON_SEED = 1234  # Megatron's default of --seed
_RUN_FLAGS = ("--save", "--load", "--save-interval", "--metrics-jsonl")  # the runner's
_SHARED_FLAGS = ("--seed", "--train-iters")  # what the arms of a comparison must share


def load_experiment(path: str | Path) -> Experiment:
    """Reads and checks an experiment's YAML.

    Raises:
        UserError: no such file, or a key that is unknown, absent or of the wrong kind: names it, expected and got.
    """
    content = read_yaml(path)
    try:
        return parse_experiment(content, Path(path).resolve().parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_yaml(path: str | Path) -> Any:
    """A YAML file's content; UserError where it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected a readable YAML file, got {error.strerror}: give an experiment") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected YAML, got {' '.join(str(error).split())}: mend the file") from None


def parse_experiment(content: Any, folder: Path) -> Experiment:
    """Checks a YAML's content; relative paths start at ``folder``. Raises UserError as `load_experiment` does."""
    content = _mapping("the file", content, TOP_KEYS)
    base = _base(content, folder)
    activation, width = _baseline(content.get("baseline"), base)
    _integer("--train-iters", base.get("--train-iters"), least=1)
    tokenizer = content.get("tokenizer")
    corpus = content.get("corpus")
    return Experiment(
        name=_text("name", content.get("name")),
        base={flag: value for flag, value in base.items() if flag not in (*ACTIVATION_FLAGS, "--ffn-hidden-size")},
        baseline=activation,
        baseline_ffn_hidden_size=width,
        arms=_arms(content.get("arms")),
        data=_data(content.get("data"), base, folder),
        tokenizer=None if tokenizer is None else str(folder / _text("tokenizer", tokenizer)),
        align=_integer("align", content.get("align", 1), least=1),
        schedule=_schedule(content.get("schedule"), base),
        evaluations=_integer("evaluations", content.get("evaluations", 1), least=1),
        held_out_tokens=_optional("held_out_tokens", content),
        corpus=None if corpus is None else _text("corpus", corpus),
        equal=_equal(content.get("equal", ["tokens"])),
        slurm=_slurm(content.get("slurm") or {}),
        **_layout(content.get("layout") or {}),
        **_seeds_and_rates(content, base),
    )


def _base(content: Mapping[str, Any], folder: Path) -> Flags:
    flags: Flags = {}
    if content.get("base_config"):
        flags.update(model_args.read(folder / _text("base_config", content["base_config"])))
    flags.update(_flags("base", content.get("base") or {}))
    if not flags:
        raise UserError("base: expected '--flag: value' pairs or base_config: FILE, got neither")
    for flag in _RUN_FLAGS:
        if flag in flags:
            raise UserError(f"base: expected no {flag}, got {flags[flag]!r}: the output folder decides it: remove it")
    return flags


def _baseline(content: Any, base: Flags) -> tuple[str, int]:
    given = _mapping("baseline", content or {}, ("activation", "ffn_hidden_size"))
    activation = given.get("activation") or model_args.activation(base)
    width = given.get("ffn_hidden_size") or base.get("--ffn-hidden-size")
    if width and "ffn_hidden_size" not in given and activation != model_args.activation(base):
        raise UserError(
            f"baseline: expected ffn_hidden_size with activation {activation}, which is not the base's, got none"
        )
    return _text("baseline.activation", activation), _integer("baseline.ffn_hidden_size", width)


def _arms(content: Any) -> tuple[Arm, ...]:
    arms = tuple(_arm(item) for item in _list("arms", content))
    if len({arm.name for arm in arms}) != len(arms):
        raise UserError(f"arms: expected distinct names, got {', '.join(arm.name for arm in arms)}: add name:")
    return arms


def _arm(item: Any) -> Arm:
    if isinstance(item, str):
        arm = Arm(item, item)
    else:
        keys = _mapping("arms", item, ARM_KEYS)
        activation = _text("arms.activation", keys.get("activation"))
        name = _text("arms.name", keys.get("name", activation))
        arm = Arm(name, activation, _flags("arms.flags", keys.get("flags") or {}))
    known = ("swiglu", *registered_scalars())
    if arm.activation not in known:
        raise UserError(f"arms: expected activations among {', '.join(known)}, got {_hinted(arm.activation, known)}")
    if not all(char.isalnum() or char in "._-" for char in arm.name) or arm.name.startswith("."):
        raise UserError(f"arms.name: expected letters, digits, '.', '_' and '-', got {arm.name!r}: it names a folder")
    for flag in (*_RUN_FLAGS, *_SHARED_FLAGS):
        if flag in arm.flags:
            raise UserError(f"arms.flags: expected no {flag}, got {arm.flags[flag]!r}: all arms share it: remove it")
    return arm


def _data(content: Any, base: Flags, folder: Path) -> dict[str, tuple[str, ...]]:
    if content is None:
        if base.get("--mock-data"):
            return {}
        raise UserError("data: expected {train: [PREFIX], valid: [PREFIX]} or [PREFIX], got nothing: add it")
    if isinstance(content, list):
        content = {"all": content}
    parts = _mapping("data", content, ("train", "valid", "all"))
    paths = {part: tuple(str(folder / _text("data", word)) for word in _list("data", parts[part])) for part in parts}
    for prefix in (prefix for group in paths.values() for prefix in group):
        if not Path(prefix + ".idx").is_file():
            raise UserError(f"data: expected {prefix}.idx, got no such file: run tools/preprocess_fineweb_edu.py")
    return paths


def _schedule(content: Any, base: Flags) -> Schedule | None:
    if content is None:
        return None
    if "--lr" not in base:
        raise UserError("schedule: expected --lr in base, its peak, got none: add it")
    return parse_schedule(_mapping("schedule", content, SCHEDULE_KEYS))


def _equal(content: Any) -> tuple[str, ...]:
    wanted = _list("equal", content)
    for name in wanted:
        if name not in BUDGETS:
            raise UserError(f"equal: expected {', '.join(BUDGETS)}, got {_hinted(name, BUDGETS)}")
    return tuple(name for name in BUDGETS if name in ("tokens", *wanted))


def _layout(content: Any) -> dict[str, Any]:
    wishes = _mapping("layout", content, LAYOUT_KEYS)
    device = wishes.get("device")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"layout.device: expected cpu or cuda, got {device!r}")
    sizes = {name: _optional(name, wishes, "layout.") for name in ("ranks", "tensor_parallel")}
    return {**sizes, "device": device}


def _seeds_and_rates(content: Mapping[str, Any], base: Flags) -> dict[str, Any]:
    seeds = _integers("seeds", content.get("seeds", [base.get("--seed", MEGATRON_SEED)]))
    rates, tuning = content.get("learning_rates"), content.get("tuning_seeds")
    if rates is None and tuning is None:
        return {"seeds": seeds}
    found = {"seeds": seeds, "learning_rates": _rates(rates), "tuning_seeds": _integers("tuning_seeds", tuning)}
    if common := sorted(set(seeds) & set(found["tuning_seeds"])):
        why = "a rate must not be judged by the runs that chose it"
        raise UserError(f"tuning_seeds: expected none of seeds, got {common[0]}: {why}")
    return found


def _rates(content: Any) -> tuple[float, ...]:
    for rate in _list("learning_rates", content):
        if isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0:
            raise UserError(f"learning_rates: expected numbers above 0, got {rate!r}: YAML wants 1.0e-3, not 1e-3")
    return tuple(float(rate) for rate in sorted(set(content)))


def _slurm(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(value, str | int) for value in content.values()):
        raise UserError(f"slurm: expected sbatch options as name: value, got {content!r}")
    return {str(name).removeprefix("--"): value for name, value in content.items()}


def _flags(key: str, content: Any) -> Flags:
    if not isinstance(content, dict) or not all(str(flag).startswith("--") for flag in content):
        raise UserError(f"{key}: expected '--flag: value' pairs, got {content!r}: write e.g. --lr: 1.0e-3")
    return content


def _mapping(key: str, content: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{key}: expected a mapping with {', '.join(known)}, got {content!r}")
    for name in content:
        if name not in known:
            raise UserError(f"{key}: expected keys {', '.join(known)}, got {_hinted(str(name), known)}")
    return content


def _hinted(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"{name!r}; did you mean {near[0]}?" if near else f"{name!r}"


def _list(key: str, content: Any) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise UserError(f"{key}: expected a list with at least one entry, got {content!r}")
    return content


def _text(key: str, content: Any) -> str:
    if not isinstance(content, str) or not content:
        raise UserError(f"{key}: expected text, got {content!r}")
    return content


def _integers(key: str, content: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_integer(key, item) for item in _list(key, content)))


def _optional(key: str, content: Mapping[str, Any], prefix: str = "") -> int | None:
    return _integer(prefix + key, content[key], least=1) if key in content else None


def _integer(key: str, content: Any, least: int = 0) -> int:
    if not isinstance(content, int) or isinstance(content, bool) or content < least:
        expected = "a whole number" if least == 0 else f"a whole number of at least {least}"
        raise UserError(f"{key}: expected {expected}, got {content!r}")
    return content
