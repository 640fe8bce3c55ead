"""The launcher for real, on the CPU: one node of two ranks, two nodes that find each other, a preflight that fails."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from held_ports import held_ports
from launch_support import ROOT, write_config

pytestmark = pytest.mark.distributed
FLAGS = {"--ckpt-format": "torch"}  # written in the same process: seconds less
# Runs as a rank starts: nobody writes the file of "--save, shared" here, and the real time would be waited for.
SOON = """
import sys
if "megatron_act.preflight" in sys.orig_argv:
    from megatron_act.compat import install_typing_override
    install_typing_override()
    from megatron_act import preflight_storage
    preflight_storage.SEEN_SECONDS = 0.3
"""
LAUNCH = [sys.executable, "-m", "megatron_act.launch"]


def environment(folder: Path, **env: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "TRITON_INTERPRET": "0", **env}


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``python -m megatron_act.launch`` in ``folder``, which gets the config, the script and the run."""
    command = [*LAUNCH, str(write_config(folder, {"output": str(folder / "runs")}, **FLAGS)), *words]
    return subprocess.run(
        command,
        env=environment(folder),
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def node(folder: Path, rank: int, log: Path, place: dict[str, str]) -> subprocess.Popen:
    """The written script as one of the nodes."""
    env = environment(folder, NODE_RANK=str(rank), **place)
    with log.open("w") as file:  # a pipe that nobody reads would stop torchrun once it is full
        return subprocess.Popen(["bash", "demo.sh"], env=env, cwd=folder, stdout=file, stderr=subprocess.STDOUT)


def losses(folder: Path) -> list[float]:
    lines = (folder / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["event"] == "step"]


def test_two_nodes_find_each_other_and_train_as_one_machine_does(tmp_path: Path) -> None:
    """Tensor parallel over two torchrun agents, after a preflight, and over two ranks of one: the same losses."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    done = launch(alone, "--gpus-per-node", "2", "--no-preflight", "--", "--cpu")
    assert done.returncode == 0, done.stdout[-3000:]
    written = launch(together, "--nodes", "2", "--gpus-per-node", "1", "--", "--cpu")
    assert "run it on each of 2 machines" in written.stdout
    logs = [together / f"node{rank}.txt" for rank in (1, 0)]  # node 1 comes first and waits for the host
    with held_ports(2) as port:
        place = {"RDZV_HOST": "localhost", "NODE_ADDR": "localhost", "RDZV_PORT": str(port)}
        nodes = [node(together, rank, log, place) for rank, log in zip((1, 0), logs, strict=True)]
        assert [process.wait(timeout=400) for process in nodes] == [0, 0], logs[0].read_text()[-3000:]
    (report,) = [text for text in map(Path.read_text, logs) if "checks passed" in text]  # rank 0's, wherever it is
    assert "checks passed, 0 failed" in report and "all-reduce, tensor parallel" in report
    assert len(losses(alone)) == 2
    assert losses(together) == losses(alone)
    for folder in (alone, together):
        assert (folder / "runs/demo/checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"
    assert {path.name for path in (together / "runs/demo/logs").iterdir()} == {"node-0", "node-1"}


def test_a_failed_preflight_names_everything_and_trains_nothing(tmp_path: Path) -> None:
    """Heads, width, batch, apex and checkpoint folder wrong at once: a line for each, with the fix, and code 2."""
    (tmp_path / "file").touch()
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "sitecustomize.py").write_text(SOON)
    wrong = ["--num-attention-heads", "3", "--kv-channels", "8", "--global-batch-size", "7", "--ffn-hidden-size", "97"]
    done = launch(tmp_path, "--gpus-per-node", "2", "--", "--cpu", *wrong, "--save", str(tmp_path / "file" / "x"))
    assert done.returncode == 2, done.stdout[-3000:]
    lines = re.findall(r"^\[default0\]:failed: (.*)$", done.stdout, re.MULTILINE)
    found = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}
    assert set(found) == {
        "apex",
        "--num-attention-heads by tensor parallel",
        "--ffn-hidden-size by tensor parallel",
        "--global-batch-size by micro batch x data parallel",
        "--save",
        "--save, shared",
        "flags",
    }
    assert found["--ffn-hidden-size by tensor parallel"] == (
        "expected a multiple of 2, got 97: change --ffn-hidden-size or tensor parallel"
    )
    assert found["apex"].startswith("expected NVIDIA's (github.com/NVIDIA/apex) or none, got another project at")
    assert found["--save"].startswith(f"expected to write in {tmp_path / 'file'}, got Not a directory")
    assert re.search(r"preflight: \d\d checks passed, 7 failed", done.stdout)
    assert "iteration" not in done.stdout.replace("train-iter", "")
    assert not (tmp_path / "runs/demo/checkpoints").exists()
