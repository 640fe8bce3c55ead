"""What a reader must know about where a result came from."""

import os
import platform
import subprocess
from pathlib import Path

from megatron_act.experiment.layout import cpu_name, usable_cores


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, GPUs, system, Python, and this checkout's commit where it is one."""
    description = {
        "processor": cpu_name(),
        "cores": str(usable_cores()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "GPUs": _gpus(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": platform.python_version(),
        "commit": _commit(),
    }
    return {key: value for key, value in description.items() if value}


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""  # an installed package
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head} with local changes" if changed else head


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
