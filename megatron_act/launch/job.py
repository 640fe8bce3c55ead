"""A job: the config, what is launched with it, and on how many machines."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_act import model_args
from megatron_act.errors import UserError
from megatron_act.launch.settings import Settings
from megatron_act.model_args import Flags

TRAIN, PREFLIGHT = "megatron_act.pretrain_gpt", "megatron_act.preflight"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every platform renders.

    Attributes:
        flags: MODEL_ARGS of the config.
        extra: words after ``--``; they win over the config and LAUNCH.
        preflight: whether a preflight runs before the training.
        train: whether the training runs: not with ``--preflight-only``.

    Raises:
        UserError: sizes below 1, or a flag that the launcher sets itself.
    """

    name: str
    flags: Flags
    settings: Settings
    nodes: int
    gpus_per_node: int
    extra: tuple[str, ...] = ()
    preflight: bool = True
    train: bool = True

    def __post_init__(self) -> None:
        for flag, size in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if size < 1:
                raise UserError(f"{flag}: expected an integer of at least 1, got {size}")
        for word in (*self.flags, *self.extra):
            if word.split("=")[0] == "--config":
                raise UserError(f"{word}: expected the launcher to set it, got it in the config or after --: remove it")

    @property
    def folder(self) -> str:
        """The run's folder on the nodes."""
        return f"{self.settings.output.rstrip('/')}/{self.name}"

    @property
    def cpu(self) -> bool:
        """Whether it trains without GPUs."""
        return "--cpu" in self.extra or self.flags.get("--cpu") is True

    def config_text(self) -> str:
        """MODEL_ARGS as YAML: what the nodes read, whatever happens to the file meanwhile."""
        return yaml.safe_dump({model_args.ROOT_KEY: self.flags}, sort_keys=False)

    def words(self) -> list[str]:
        """Flags of the entry point besides ``--config``: LAUNCH's paths, then the words after ``--``."""
        ours = {key: value for key, value in self._paths().items() if value not in ("", []) and not self._has(key)}
        return [*model_args.to_words(ours), *self.extra]

    def _paths(self) -> dict[str, Any]:
        settings, folder = self.settings, self.folder
        return {
            "--exit-signal-handler": True,
            "--data-path": settings.data,
            "--train-data-path": settings.train_data,
            "--valid-data-path": settings.valid_data,
            "--tokenizer-model": settings.tokenizer,
            "--save": f"{folder}/checkpoints",
            "--load": f"{folder}/checkpoints",
            "--save-interval": settings.save_interval,
            "--tensorboard-dir": f"{folder}/tensorboard",
            "--metrics-jsonl": f"{folder}/metrics.jsonl",
        }

    def _has(self, flag: str) -> bool:
        return flag in self.flags or any(word.split("=")[0] == flag for word in self.extra)


def job_name(config: Path, settings: Settings) -> str:
    """LAUNCH's name or the config's file name, as Kubernetes takes names.

    Raises:
        UserError: nothing of it can be kept.
    """
    name = re.sub(r"[^a-z0-9]+", "-", (settings.name or config.stem).lower()).strip("-")[:40].strip("-")
    if not name or not name[0].isalpha():
        name = f"run-{name}".strip("-")
    return name
