"""An experiment: one model, several activations, each at the baseline's parameters and FLOPs, over seeds.

`megatron_act.experiment.parse` makes it from a YAML, `megatron_act.experiment.plan` decides which runs it takes.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_act import model_args
from megatron_act.errors import UserError
from megatron_act.experiment.layout import OWNED_FLAGS, Layout, override
from megatron_act.experiment.schedule import Schedule, at_length, at_rate
from megatron_act.match import Match, solve
from megatron_act.model_args import Flags

LOGGED_STEPS = 100  # points of a loss curve where the base gives no --log-interval: telemetry costs a logged step 2 ms
BUDGETS = ("tokens", "flops", "seconds")  # what the arms can be given equally much of


@dataclass(frozen=True)
class Arm:
    """One activation in the comparison, with the flags in which it differs from the base."""

    name: str
    activation: str
    flags: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run: an arm with a seed, a learning rate and a length.

    Attributes:
        words: the command line after ``python -m megatron_act.pretrain_gpt``, without the output's paths.
        match: the arm's width against the baseline's.
        train_iters: steps.
        folder: name of the run's folder, unique in its experiment.
        rate: peak learning rate where the experiment compares several, else None: the flags'.
    """

    arm: Arm
    seed: int
    words: tuple[str, ...]
    match: Match
    train_iters: int
    folder: str
    rate: float | None = None

    @property
    def label(self) -> str:
        """The run's name for people."""
        rate = "" if self.rate is None else f", lr {self.rate:g}"
        return f"{self.arm.name} (seed {self.seed}{rate}, {self.train_iters} steps)"


@dataclass(frozen=True)
class Experiment:
    """What a YAML says, checked.

    Attributes:
        equal: the comparisons, of `BUDGETS`; ``tokens`` first.
        learning_rates: more than one: each arm takes the one that is best on ``tuning_seeds``.
        held_out_tokens: how much of the validation data is used; None: all.
        evaluations: validations per run where the base gives no ``--eval-interval``.
        corpus: the data's name for people.
        slurm: sbatch options by name, plus ``parallel``: runs at a time.
    """

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
    device: str | None = None
    align: int = 1
    schedule: Schedule | None = None
    evaluations: int = 1
    held_out_tokens: int | None = None
    corpus: str | None = None
    equal: tuple[str, ...] = ("tokens",)
    learning_rates: tuple[float, ...] = ()
    tuning_seeds: tuple[int, ...] = ()
    slurm: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of every run at equal tokens."""
        return int(self.base["--train-iters"])

    @property
    def reference(self) -> Arm:
        """The arm whose FLOPs and time the others are given: the baseline's, else the first."""
        return next((arm for arm in self.arms if arm.activation == self.baseline), self.arms[0])

    def layout(self, machine: Layout, jobs: int = 1) -> Layout:
        """The machine's layout with this experiment's wishes, for ``jobs`` runs at a time."""
        return override(machine, self.ranks, self.tensor_parallel, self.device, jobs)

    def match(self, arm: Arm, layout: Layout) -> Match:
        """The arm's model against the baseline's, at this layout's tensor-parallel size."""
        scalars = registered_scalars()
        flags = {**self.base, **arm.flags, "--tensor-model-parallel-size": layout.tensor_parallel}
        if self.tokenizer:
            flags["--vocab-size"] = tokenizer_size(self.tokenizer)
            flags.pop("--padded-vocab-size", None)
        shape = model_args.shape(model_args.with_mlp(flags, self.baseline, self.baseline_ffn_hidden_size), scalars)
        return solve(shape, arm.activation, scalars, tensor_parallel=layout.tensor_parallel, align=self.align)

    def runs(self, layout: Layout, rates: Mapping[str, float] | None = None) -> list[Run]:
        """The runs at equal tokens, arms in their order within each seed.

        Args:
            layout: see `layout`.
            rates: each arm's learning rate by name, where the experiment compares several.

        Raises:
            UserError: an arm or a layout that cannot be built.
        """
        rates = rates or {}
        return [self.run(arm, seed, layout, rates.get(arm.name)) for seed in self.seeds for arm in self.arms]

    def run(self, arm: Arm, seed: int, layout: Layout, rate: float | None = None, steps: int | None = None) -> Run:
        """One run, with a learning rate and a length of its own where they are given."""
        steps = steps or self.steps
        match = self.match(arm, layout)
        flags = model_args.with_mlp({**self.base, **arm.flags}, arm.activation, match.target.ffn_hidden_size)
        flags = {key: value for key, value in flags.items() if key not in (*OWNED_FLAGS, "--seed")}
        flags = self._timed(flags if rate is None else at_rate(flags, rate), steps)
        flags = self._with_inputs(flags)
        flags.setdefault("--log-interval", max(1, steps // LOGGED_STEPS))  # Megatron's 100 would hide a short run
        if layout.device == "cpu":
            flags.setdefault("--num-workers", 0)  # loader processes compete with the ranks, and cost seconds at exit
        words = (*model_args.to_words(flags), *_data_words(self.data), "--seed", str(seed), *layout.flags())
        return Run(arm, seed, words, match, steps, self._folder(arm, seed, rate, steps), rate)

    def _timed(self, flags: Flags, steps: int) -> Flags:
        """Schedule and evaluations of a run of ``steps`` steps."""
        flags = at_length(flags, steps)
        if self.schedule:
            flags |= self.schedule.flags(steps, flags["--lr"])
        # Megatron evaluates after the last step anyway: an interval that divides the steps would do it twice
        flags.setdefault("--eval-interval", steps // self.evaluations + 1)
        return flags

    def _with_inputs(self, flags: Flags) -> Flags:
        flags = dict(flags)
        if self.tokenizer:
            flags.pop("--vocab-size", None)  # the tokenizer's own size wins
            flags |= {"--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": self.tokenizer}
        if "valid" in self.data:  # every held-out token, whatever --eval-iters says (megatron_act.full_validation)
            flags.pop("--eval-iters", None)
            flags["--full-validation"] = True
        return flags

    def _folder(self, arm: Arm, seed: int, rate: float | None, steps: int) -> str:
        parts = [arm.name, *([] if rate is None else [f"lr{rate:g}"]), f"seed{seed}"]
        return "-".join([*parts, *([] if steps == self.steps else [f"{steps}steps"])])


def registered_scalars() -> dict[str, int]:
    """Trainable scalars per layer of every activation in the kernels' registry."""
    from megatron_act.kernels import api  # loads torch

    return {name: len(api.get(name).params) for name in api.names()}


@functools.cache  # each run's match asks
def tokenizer_size(folder: str) -> int:
    """Tokens in the vocabulary of a tokenizer's folder, added ones included, before Megatron's padding."""
    return open_tokenizer(folder).get_vocab_size(with_added_tokens=True)


def open_tokenizer(folder: str) -> Any:
    """The ``tokenizers.Tokenizer`` of a folder with tokenizer.json, or of that file; UserError without one."""
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
    if not file.is_file():
        raise UserError(f"tokenizer: expected a folder with tokenizer.json, got {folder}: run tools/train_tokenizer.py")
    return Tokenizer.from_file(str(file))


def _data_words(data: Mapping[str, tuple[str, ...]]) -> list[str]:
    flags = {"all": "--data-path", "train": "--train-data-path", "valid": "--valid-data-path"}
    return [word for part, prefixes in data.items() for word in (flags[part], *prefixes)]
