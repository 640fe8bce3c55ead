"""An experiment's YAML: one model, several activations, each at the baseline's parameters and FLOPs.

    name: tiny
    base_config: tiny-swiglu.yaml     # MODEL_ARGS; or `base: {--num-layers: 4, ...}`; with both, base wins
    baseline: {activation: swiglu, ffn_hidden_size: 512}    # default: what the base says
    arms: [swiglu, relu2, {name: xielu-slow, activation: xielu, flags: {--lr: 1.0e-3}}]
    data: {train: [edu_train], valid: [edu_valid]}          # .bin/.idx prefixes; or one list for Megatron's --split
    tokenizer: tokenizer              # a folder that AutoTokenizer opens
    seeds: [1, 2, 3]                  # default: the base's --seed alone
    layout: {ranks: 2, tensor_parallel: 2}                  # default: what the machine allows
    align: 1                          # what must divide each rank's MLP width

Paths are relative to the YAML's folder. Every arm's ``ffn_hidden_size`` is solved by ``megatron_act.match``.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_act import model_args
from megatron_act.errors import UserError
from megatron_act.experiment.layout import OWNED_FLAGS, Layout, override
from megatron_act.match import Match, solve
from megatron_act.model_args import ACTIVATION_FLAGS, Flags

TOP_KEYS = ("name", "base", "base_config", "baseline", "arms", "data", "tokenizer", "seeds", "layout", "align")
ARM_KEYS = ("name", "activation", "flags")
MEGATRON_SEED = 1234  # Megatron's default of --seed
LOGGED_STEPS = 200  # points of a loss curve where the base gives no --log-interval
_RUN_FLAGS = ("--save", "--load", "--save-interval", "--metrics-jsonl")  # the runner's


@dataclass(frozen=True)
class Arm:
    """One activation in the comparison, with the flags in which it differs from the base."""

    name: str
    activation: str
    flags: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run: an arm with a seed.

    Attributes:
        words: the command line after ``python -m megatron_act.pretrain_gpt``, without the output's paths.
        match: the arm's width against the baseline's.
    """

    arm: Arm
    seed: int
    words: tuple[str, ...]
    match: Match
    train_iters: int

    @property
    def folder(self) -> str:
        """Name of the run's folder: unique in its experiment."""
        return f"{self.arm.name}-seed{self.seed}"

    @property
    def label(self) -> str:
        """The run's name for people."""
        return f"{self.arm.name} (seed {self.seed})"


@dataclass(frozen=True)
class Experiment:
    """What a YAML says, checked; `runs` turns it into command lines."""

    name: str
    base: Flags
    baseline: str
    baseline_ffn_hidden_size: int
    arms: tuple[Arm, ...]
    data: Mapping[str, tuple[str, ...]]
    tokenizer: str | None
    seeds: tuple[int, ...]
    ranks: int | None = None
    tensor_parallel: int | None = None
    align: int = 1

    def layout(self, machine: Layout) -> Layout:
        """The machine's layout with this experiment's wishes."""
        if self.ranks is None and self.tensor_parallel is None:
            return machine
        return override(machine, self.ranks, self.tensor_parallel)

    def match(self, arm: Arm, layout: Layout) -> Match:
        """The arm's model against the baseline's, at this layout's tensor-parallel size."""
        scalars = registered_scalars()
        flags = {**self.base, **arm.flags, "--tensor-model-parallel-size": layout.tensor_parallel}
        if self.tokenizer:
            flags["--vocab-size"] = tokenizer_size(self.tokenizer)
            flags.pop("--padded-vocab-size", None)
        shape = model_args.shape(model_args.with_mlp(flags, self.baseline, self.baseline_ffn_hidden_size), scalars)
        return solve(shape, arm.activation, scalars, tensor_parallel=layout.tensor_parallel, align=self.align)

    def runs(self, layout: Layout) -> list[Run]:
        """Every run, arms in their order within each seed.

        Raises:
            UserError: an arm or a layout that cannot be built.
        """
        return [self._run(arm, seed, layout) for seed in self.seeds for arm in self.arms]

    def _run(self, arm: Arm, seed: int, layout: Layout) -> Run:
        match = self.match(arm, layout)
        flags = model_args.with_mlp({**self.base, **arm.flags}, arm.activation, match.target.ffn_hidden_size)
        flags = {key: value for key, value in flags.items() if key not in (*OWNED_FLAGS, "--seed")}
        inputs = _data_words(self.data)
        if self.tokenizer:
            flags.pop("--vocab-size", None)  # the tokenizer's own size wins
            flags["--tokenizer-type"], flags["--tokenizer-model"] = "HuggingFaceTokenizer", self.tokenizer
        iterations = _train_iters(flags)
        flags.setdefault("--log-interval", max(1, iterations // LOGGED_STEPS))  # Megatron's 100 would hide a short run
        if layout.device == "cpu":
            flags.setdefault("--num-workers", 0)  # loader processes compete with the ranks, and cost seconds at exit
        flags.setdefault("--eval-interval", iterations + 1)  # Megatron has no default: once, after the last step
        words = (*model_args.to_words(flags), *inputs, "--seed", str(seed), *layout.flags())
        return Run(arm, seed, words, match, iterations)


def registered_scalars() -> dict[str, int]:
    """Trainable scalars per layer of every activation in the kernels' registry."""
    from megatron_act.kernels import api  # loads torch

    return {name: len(api.get(name).params) for name in api.names()}


def tokenizer_size(folder: str) -> int:
    """Tokens in the vocabulary of a tokenizer's folder, added ones included, before Megatron's padding."""
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
    if not file.is_file():
        raise UserError(f"tokenizer: expected a folder with tokenizer.json, got {folder}: run tools/train_tokenizer.py")
    return Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True)


def _data_words(data: Mapping[str, tuple[str, ...]]) -> list[str]:
    flags = {"all": "--data-path", "train": "--train-data-path", "valid": "--valid-data-path"}
    return [word for part, prefixes in data.items() for word in (flags[part], *prefixes)]


def _train_iters(flags: Flags) -> int:
    return _integer("--train-iters", flags.get("--train-iters"))


def load_experiment(path: str | Path) -> Experiment:
    """Reads and checks an experiment's YAML.

    Raises:
        UserError: no such file, or a key that is unknown, absent or of the wrong kind: names it, expected and got.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected a readable YAML file, got {error.strerror}: give an experiment") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected YAML, got {' '.join(str(error).split())}: mend the file") from None
    try:
        return parse_experiment(content, Path(path).resolve().parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_experiment(content: Any, folder: Path) -> Experiment:
    """Checks a YAML's content; relative paths start at ``folder``. Raises UserError as `load_experiment` does."""
    content = _mapping("the file", content, TOP_KEYS)
    base = _base(content, folder)
    activation, width = _baseline(content.get("baseline"), base)
    arms = tuple(_arm(item) for item in _list("arms", content.get("arms")))
    if len({arm.name for arm in arms}) != len(arms):
        raise UserError(f"arms: expected distinct names, got {', '.join(arm.name for arm in arms)}: add name:")
    _train_iters(base)
    tokenizer = content.get("tokenizer")
    wishes = _mapping("layout", content.get("layout") or {}, ("ranks", "tensor_parallel"))
    seeds = content.get("seeds", [base.get("--seed", MEGATRON_SEED)])
    return Experiment(
        name=_text("name", content.get("name")),
        base={flag: value for flag, value in base.items() if flag not in (*ACTIVATION_FLAGS, "--ffn-hidden-size")},
        baseline=activation,
        baseline_ffn_hidden_size=width,
        arms=arms,
        data=_data(content.get("data"), base, folder),
        tokenizer=None if tokenizer is None else str(folder / _text("tokenizer", tokenizer)),
        seeds=tuple(_integer("seeds", seed) for seed in _list("seeds", seeds)),
        ranks=_integer("layout.ranks", wishes["ranks"]) if "ranks" in wishes else None,
        tensor_parallel=_integer("layout.tensor_parallel", wishes["tensor_parallel"])
        if "tensor_parallel" in wishes
        else None,
        align=_integer("align", content.get("align", 1)),
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
        near = difflib.get_close_matches(arm.activation, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"arms: expected activations among {', '.join(known)}, got {arm.activation!r}{hint}")
    if not all(char.isalnum() or char in "._-" for char in arm.name) or arm.name.startswith("."):
        raise UserError(f"arms.name: expected letters, digits, '.', '_' and '-', got {arm.name!r}: it names a folder")
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


def _flags(key: str, content: Any) -> Flags:
    if not isinstance(content, dict) or not all(str(flag).startswith("--") for flag in content):
        raise UserError(f"{key}: expected '--flag: value' pairs, got {content!r}: write e.g. --lr: 1.0e-3")
    return content


def _mapping(key: str, content: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{key}: expected a mapping with {', '.join(known)}, got {content!r}")
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{key}: expected keys {', '.join(known)}, got {name!r}{hint}")
    return content


def _list(key: str, content: Any) -> list[Any]:
    if not isinstance(content, list) or not content:
        raise UserError(f"{key}: expected a list with at least one entry, got {content!r}")
    return content


def _text(key: str, content: Any) -> str:
    if not isinstance(content, str) or not content:
        raise UserError(f"{key}: expected text, got {content!r}")
    return content


def _integer(key: str, content: Any) -> int:
    if not isinstance(content, int) or isinstance(content, bool) or content < 0:
        raise UserError(f"{key}: expected a whole number, got {content!r}")
    return content
