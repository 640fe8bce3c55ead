"""What a reader must know about a run: machine, versions, commit, command."""

import os
import platform
import shlex
import subprocess
from datetime import UTC, datetime

import torch
import triton

from megatron_act.experiment.machine import describe_machine

QUERY = {
    "driver": "driver_version",
    "SM clock": "clocks.sm",
    "maximum SM clock": "clocks.max.sm",
    "memory clock": "clocks.mem",
}


def header(argv: list[str], threads: int) -> dict[str, str]:
    """Name and value, in the order of the page; call it right after the measurements, so that clocks are under load."""
    return {**facts(threads), "command": shlex.join(["python", "tools/benchmark_kernels.py", *argv])}


def facts(threads: int = 1) -> dict[str, str]:
    """Machine, versions, commit, date; ``MEGATRON_ACT_COMMIT`` names the commit where the files are no git checkout."""
    machine = describe_machine()
    return {
        **(_gpu() if torch.cuda.is_available() else _cpu(machine, threads)),
        "torch": torch.__version__, "triton": triton.__version__, "Python": platform.python_version(),
        "commit": os.environ.get("MEGATRON_ACT_COMMIT") or machine.get("commit", "unknown"),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }  # fmt: skip


def _cpu(machine: dict[str, str], threads: int) -> dict[str, str]:
    return {
        "run": "CPU, no GPU: `ours` is the torch reference that a CPU uses, not the kernels",
        "processor": f"{machine['processor']}, {machine['cores']} cores, {machine['memory']}",
        "threads": f"{threads}, as a rank of the quickstart has" + ("; times are the thread's" if threads == 1 else ""),
    }


def _gpu() -> dict[str, str]:
    return {"run": "GPU", "GPU": torch.cuda.get_device_name(), **_driver(), "CUDA": str(torch.version.cuda)}


def _driver() -> dict[str, str]:
    """What nvidia-smi says of the first GPU that torch sees."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader", f"--id={index}"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {"driver": "unknown (no nvidia-smi)"}
    return dict(zip(QUERY, (value.strip() for value in line.split(",")), strict=False))
