"""What this machine allows: device, ranks, tensor parallelism, threads, and the Megatron flags that follow."""

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from megatron_act.compat import LOCAL_LAYER_FLAGS
from megatron_act.errors import UserError

# Flags that follow from the layout: in an experiment's model they would contradict it.
OWNED_FLAGS = (
    *("--cpu", "--bf16", "--fp16", "--transformer-impl", "--distributed-backend"),
    *("--tensor-model-parallel-size", "--use-cpu-initialization"),
)


@dataclass(frozen=True)
class Layout:
    """Where and how one arm runs.

    Attributes:
        device: ``cpu`` (fp32, gloo) or ``cuda`` (bf16, NCCL).
        ranks: processes per run.
        tensor_parallel: ranks that share one replica of the model.
        threads_per_rank: OMP_NUM_THREADS of each process.
        transformer_engine: whether it imports; without it the layers are Megatron's local ones.
        machine: the device's name, for people.
    """

    device: str
    ranks: int
    tensor_parallel: int
    threads_per_rank: int
    transformer_engine: bool
    machine: str

    def __post_init__(self) -> None:
        if min(self.ranks, self.tensor_parallel) < 1 or self.ranks % self.tensor_parallel:
            raise UserError(
                f"layout: expected ranks as a multiple of tensor_parallel, got {self.ranks} and {self.tensor_parallel}"
            )

    def flags(self) -> list[str]:
        """Megatron's flags for this layout."""
        parallel = ["--tensor-model-parallel-size", str(self.tensor_parallel)]
        if self.device == "cpu":
            return ["--cpu", *parallel]
        if not self.transformer_engine:
            return ["--bf16", *parallel, *LOCAL_LAYER_FLAGS]
        # the output layer is Megatron's own linear layer, whose fused accumulation is apex's
        fusion = [] if find_spec("fused_weight_gradient_mlp_cuda") else ["--no-gradient-accumulation-fusion"]
        return ["--bf16", *parallel, "--transformer-impl", "transformer_engine", *fusion]

    def __str__(self) -> str:
        kind = "fp32, gloo" if self.device == "cpu" else "bf16, NCCL"
        layers = "Transformer Engine" if self.device == "cuda" and self.transformer_engine else "local"
        threads = f"{self.threads_per_rank} thread{'s' if self.threads_per_rank > 1 else ''} each"
        return (
            f"{self.machine}: {self.ranks} rank{'s' if self.ranks > 1 else ''} x {threads}, "
            f"tensor parallel {self.tensor_parallel}, {kind}, {layers} layers"
        )


def detect(ranks: int | None = None, tensor_parallel: int | None = None) -> Layout:
    """The layout for this machine: all that it needs, no more than two ranks.

    No GPU: two ranks on the CPU. One GPU: one rank. Two or more: two ranks. Tensor parallel over all of them.

    Args:
        ranks: processes per run, instead of the machine's default.
        tensor_parallel: instead of all ranks.

    Raises:
        UserError: more ranks than GPUs, or ranks that tensor_parallel does not divide.
    """
    import torch  # seconds to import: not for --help

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and ranks and ranks > gpus:
        raise UserError(f"layout: expected at most {gpus} ranks (one per GPU), got {ranks}: lower it")
    ranks = ranks or (min(gpus, 2) if gpus else 2)
    name = torch.cuda.get_device_name(0) if gpus else cpu_name()
    return Layout(
        device="cuda" if gpus else "cpu",
        ranks=ranks,
        tensor_parallel=tensor_parallel or ranks,
        threads_per_rank=max(1, usable_cores() // ranks),
        transformer_engine=bool(gpus) and _has_transformer_engine(),
        machine=f"{name} x {min(gpus, ranks)}" if gpus else f"{name}, {_cores(usable_cores())}",
    )


def override(
    layout: Layout, ranks: int | None, tensor_parallel: int | None, device: str | None = None, jobs: int = 1
) -> Layout:
    """The same machine with what an experiment's file asks for (None keeps the machine's), for ``jobs`` runs at a time.

    ``device`` may be another than this machine's: a login node plans what its GPU nodes run.
    """
    ranks = ranks or layout.ranks
    same = ranks == layout.ranks and jobs == 1
    threads = layout.threads_per_rank if same else max(1, usable_cores() // (ranks * jobs))
    there = layout.device == (device or layout.device)
    return replace(
        layout,
        ranks=ranks,
        tensor_parallel=tensor_parallel or ranks,
        threads_per_rank=threads,
        device=device or layout.device,
        transformer_engine=layout.transformer_engine
        if there
        else device == "cuda" and find_spec("transformer_engine") is not None,
        machine=layout.machine if there else f"a machine with {device}",
    )


def check_jobs(layout: Layout, jobs: int) -> None:
    """Refuses more runs at a time than the machine has GPUs for: two runs on one GPU would time each other."""
    import torch

    gpus = torch.cuda.device_count() if layout.device == "cuda" else 0
    if gpus and jobs * layout.ranks > gpus:
        raise UserError(f"--jobs: expected at most {gpus // layout.ranks} ({gpus} GPUs), got {jobs}: lower it")


def _has_transformer_engine() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError):  # a build for another CUDA raises the latter two
        return False
    return True


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and in a container the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max" for no quota
        return cores


def _cores(number: int) -> str:
    return f"{number} core{'s' if number > 1 else ''}"


def cpu_name() -> str:
    """The processor's name as the kernel gives it, else "CPU"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"
