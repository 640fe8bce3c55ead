"""For tests that run on a CPU and, marked gpu, the same on a GPU: marks, and tasks in a process of their own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import environment, torchrun

WORKER = Path(__file__).parent / "workers" / "model_tasks.py"
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NO_ENGINE = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine is installed"
)


def needs_gpu(*values: Any) -> Any:
    """A parameter set that only a machine with an NVIDIA GPU runs."""
    return pytest.param(*values, marks=[pytest.mark.gpu, NO_GPU])


def run_tasks(device: str, wanted: dict[str, dict[str, Any]], ranks: int = 1, **env: str) -> dict[str, Any]:
    """Results of ``workers/model_tasks.py``: task to result.

    Args:
        device: ``cpu`` or ``cuda``.
        wanted: task to arguments.
        ranks: tensor-parallel ranks.
        env: environment variables of the process.
    """
    words = [str(WORKER), device, json.dumps(wanted)]
    if ranks > 1:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            done = torchrun(*words, ranks=ranks)
    else:
        done = subprocess.run(
            [sys.executable, *words],
            env={**environment(), **env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))[7:])
    for task, result in report.items():
        assert "error" not in result, f"{task}: {result['error']}"
    return report
