"""What the tests of the launcher share: a small config, and stand-ins for torchrun, Slurm and apptainer."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PLATFORMS = ("local", "slurm", "kubernetes", "jobset", "skypilot")
NODES, GPUS = 4, 8
MODEL = {
    "--num-layers": 2,
    "--hidden-size": 32,
    "--ffn-hidden-size": 96,
    "--num-attention-heads": 4,
    "--seq-length": 32,
    "--max-position-embeddings": 32,
    "--normalization": "RMSNorm",
    "--position-embedding-type": "rope",
    "--disable-bias-linear": True,
    "--micro-batch-size": 2,
    "--global-batch-size": 8,
    "--train-iters": 2,
    "--lr": 1e-3,
    "--eval-iters": 0,
    "--log-interval": 1,
    "--mock-data": True,
    "--tokenizer-type": "NullTokenizer",
    "--vocab-size": 127,
    "--tensor-model-parallel-size": 2,
    "--num-workers": 0,
    "--activation": "xielu",
}

# In place of Python with torchrun: notes its words and what the config holds; with FAKE_RANK it starts one rank, which
# notes each SIGTERM and ends after the first, as soon as there is a file "end". Being killed itself, as torchrun would
# be, is a failure.
_TORCHRUN = """#!{python}
import json, os, subprocess, sys
words = sys.argv[1:]
names = ("PYTHONPATH", "NCCL_IB_HCA", "CUDA_DEVICE_MAX_CONNECTIONS")
config = open(words[words.index("--config") + 1]).read()
record = {{"words": words, "config": config, "env": {{name: os.environ.get(name) for name in names}}}}
with open({folder!r} + "/torchrun.jsonl", "a") as file:
    file.write(json.dumps(record) + "\\n")
if "FAKE_RANK" in os.environ:
    sys.exit(subprocess.call([sys.executable, os.environ["FAKE_RANK"]]))
sys.exit(int(os.environ.get("FAKE_CODE", "0")))
"""
_RANK = """
import pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
def save(*_):
    with (folder / "saved").open("a") as file:
        print("saved", file=file)
signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
give_up = time.monotonic() + 3600
while not ((folder / "saved").exists() and (folder / "end").exists()):
    if time.monotonic() > give_up:
        sys.exit(3)
    time.sleep(0.02)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the entry point does
"""
_COMMANDS = {
    "scontrol": 'echo "$*" >>{folder}/scontrol.txt; if [[ "$1" == show ]]; then printf "first\\nsecond\\n"; fi',
    "srun": 'echo "$*" >>{folder}/srun.txt; while [[ "$1" == --* ]]; do shift; done\n'
    'export SLURM_NODEID=1 SLURMD_NODENAME=second; exec "$@"',
    "apptainer": 'while [[ "$1" != bash ]]; do shift; done; exec "$@"',
}


@dataclass
class Fakes:
    """A folder of stand-ins."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "python"

    def runs(self) -> list[dict]:
        """What each torchrun was given."""
        file = self.folder / "torchrun.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def said(self, command: str) -> list[str]:
        """The words that a command was given, a line a call."""
        file = self.folder / f"{command}.txt"
        return file.read_text().splitlines() if file.exists() else []

    def environment(self, platform: str, **extra: str) -> dict[str, str]:
        """What a platform sets on node 1 of 4; the first node is `first`, this one `second`."""
        places = {
            "local": {"NODE_RANK": "1", "RDZV_HOST": "first", "NODE_ADDR": "second"},
            "slurm": {"SLURM_JOB_ID": "40007", "SLURM_JOB_NODELIST": "first,second"},
            "kubernetes": {"PET_NODE_RANK": "1", "POD_IP": "second"},
            "jobset": {"JOB_COMPLETION_INDEX": "1", "POD_IP": "second"},
            "skypilot": {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "first\nsecond"},
        }
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **places[platform], "PATH": path, **extra}


def fakes(folder: Path) -> Fakes:
    """Writes the stand-ins."""
    _executable(folder / "python", _TORCHRUN.format(python=sys.executable, folder=str(folder)))
    (folder / "rank.py").write_text(_RANK.format(folder=str(folder)))
    for name, body in _COMMANDS.items():
        _executable(folder / name, "#!/usr/bin/env bash\n" + body.format(folder=folder) + "\n")
    return Fakes(folder)


def _executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def write_config(folder: Path, launch: dict, **flags: object) -> Path:
    """A config with the small model, more flags, and a LAUNCH section."""
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump({"MODEL_ARGS": {**MODEL, **flags}, "LAUNCH": launch}))
    return path


def script_of(platform: str, rendered: str) -> str:
    """The script that bash runs, of what a platform takes."""
    if platform in ("local", "slurm"):
        return rendered
    documents = list(yaml.safe_load_all(rendered))
    return documents[0]["run"] if platform == "skypilot" else documents[0]["data"]["node.sh"]
