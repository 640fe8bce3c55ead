"""Runs tests/built_configs.py, which must be a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def build(jobs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What Megatron-Core builds for each job (form: tests/built_configs.py)."""
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "built_configs.py")]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
