"""The LAUNCH section: where a run's files are and what a cluster must be told, each with a default.

It stands beside MODEL_ARGS in a config, or in a file of its own (``--cluster FILE``), whose values win.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_act.errors import UserError
from megatron_act.model_args import read_text

ROOT_KEY = "LAUNCH"
PROJECT = Path(__file__).resolve().parents[2]
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Values of LAUNCH; a path is one on the nodes.

    Attributes:
        name: of the job and, under ``output``, of its folder; default: the config's file name.
        output: folder that all nodes share; the run gets ``output/name`` with checkpoints, logs and metrics.
        python: interpreter on the nodes; default: this one where the nodes are this machine, else python3.
        workdir: a checkout of this project on the nodes; SkyPilot uploads it from here.
        data: ``--data-path``; or ``train_data`` and ``valid_data``, which Megatron keeps apart.
        save_interval: steps between checkpoints where no flag says it.
        env: environment variables on top of `environment.VARIABLES`, which they override.
        max_restarts: how often torchrun starts all ranks again after a failure.
        grace_seconds: between the notice of a preemption or of the time limit and the kill.
        port: of the rendezvous; the next one serves the preflight.
        rendezvous_seconds: how long nodes wait for each other, at the start (they boot and pull images at different
            times) and after one has failed (its replacement).
        min_bus_gbps: all-reduce bandwidth in GB/s below which the preflight fails; 0: it only reports.
        image: container image, REGISTRY/NAME:TAG or a file; for Slurm with ``runtime`` pyxis or apptainer.
        mounts: folders that the container sees, PATH or PATH:PATH (Slurm).
        cpus_per_gpu: CPU cores that the job asks for, per GPU.
        claims: PersistentVolumeClaim to mount path (Kubernetes).
        resources: further limits of a pod, e.g. {rdma/ib: 1} (Kubernetes).
        accelerator: GPU model (SkyPilot).
        infra: cloud or region, e.g. aws/us-east-1 (SkyPilot).
        buckets: mount path to bucket, e.g. {/shared: s3://name} (SkyPilot).
        spot: cheaper machines that may be taken away (SkyPilot).
        setup: shell commands that prepare a machine (SkyPilot).

    Raises:
        UserError: a value of the wrong type or outside its range.
    """

    name: str = ""
    output: str = "runs"
    python: str = ""
    workdir: str = str(PROJECT)
    data: list[str] = field(default_factory=list)
    train_data: list[str] = field(default_factory=list)
    valid_data: list[str] = field(default_factory=list)
    tokenizer: str = ""
    save_interval: int = 1000
    env: dict[str, Any] = field(default_factory=dict)
    max_restarts: int = 3
    grace_seconds: int = 300
    port: int = 29400
    rendezvous_seconds: int = 900
    min_bus_gbps: int = 0
    image: str = ""
    runtime: str = ""
    mounts: list[str] = field(default_factory=list)
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time: str = "24:00:00"
    cpus_per_gpu: int = 12
    namespace: str = "default"
    claims: dict[str, str] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)
    accelerator: str = "H100"
    infra: str = ""
    buckets: dict[str, str] = field(default_factory=dict)
    spot: bool = False
    setup: str = ""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_type(item.name, getattr(self, item.name), default_of(item))
        lowest = {"save_interval": 1, "max_restarts": 0, "grace_seconds": 10, "port": 1024, "cpus_per_gpu": 1}
        lowest["rendezvous_seconds"] = 1
        for name, minimum in lowest.items():
            if getattr(self, name) < minimum:
                raise _error(name, f"an integer of at least {minimum}", getattr(self, name))
        if self.port > 65534:
            raise _error("port", "at most 65534", self.port)
        if self.runtime not in ("", "pyxis", "apptainer"):
            raise _error("runtime", "pyxis or apptainer", self.runtime)
        if bool(self.runtime) != bool(self.image) and self.runtime:
            raise _error("image", f"an image for runtime {self.runtime}", "none")
        for name in self.env:
            if not _VARIABLE.fullmatch(str(name)):
                raise _error("env", "names of environment variables", name)
        if self.data and (self.train_data or self.valid_data):
            raise _error("data", "either data, or train_data and valid_data", "both")


def default_of(item: "dataclasses.Field[Any]") -> Any:
    """A field's default value."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def read(*paths: Path | None) -> Settings:
    """Joins the LAUNCH sections of files; later ones win. A file without the section adds nothing.

    Raises:
        UserError: not YAML, an unknown key (names the nearest), a wrong value.
    """
    values: dict[str, Any] = {}
    for path in filter(None, paths):
        values |= _section(path)
    return Settings(**values)


def _section(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from None
    section = (content.get(ROOT_KEY) or {}) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{path}: expected a mapping {ROOT_KEY}, got {section!r}: see launch/cluster.yaml")
    known = {item.name: default_of(item) for item in dataclasses.fields(Settings)}
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": known are {', '.join(known)}"
            raise UserError(f"{path}: expected a key of {ROOT_KEY}, got {key!r}{hint}")
    return {key: _as_list(value, known[key]) for key, value in section.items()}


def _as_list(value: Any, default: Any) -> Any:
    """One path may stand for a list of one."""
    return value.split() if isinstance(default, list) and isinstance(value, str) else value


def _check_type(name: str, value: Any, default: Any) -> None:
    kind = type(default)
    if type(value) is not kind:
        raise _error(name, f"a value of type {kind.__name__}", value)
    if kind is list and not all(isinstance(item, str) for item in value):
        raise _error(name, "strings", value)
    if kind is str and "\n" in value and name != "setup":
        raise _error(name, "one line", value)


def _error(name: str, expected: str, got: Any) -> UserError:
    return UserError(f"{ROOT_KEY}.{name}: expected {expected}, got {got!r}: correct it (launch/cluster.yaml has all)")
