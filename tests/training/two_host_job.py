"""A job on two hosts: the launcher's script on each, with the entry point that waits in the middle of a step."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from conftest import records
from training_support import environment
from two_hosts import DEVICE, Host

WORKERS = Path(__file__).parent / "workers"
LIMIT_S = 300


class Job:
    """What ``python -m megatron_act.launch --nodes 2`` has written, one rank a host.

    Args:
        folder: of the config, the script and the run.
        hosts: host 0 has the rendezvous.
        words: of the entry point.
        launcher: flags of the launcher.
        settings: values of LAUNCH.
    """

    def __init__(self, folder: Path, hosts: tuple[Host, Host], words: list[str], *launcher: str, **settings: Any):
        self.folder, self.hosts = folder, hosts
        self.pause, self.hang, self.noticed = (folder / name for name in ("pause", "hang", "noticed"))
        env = {"GLOO_SOCKET_IFNAME": DEVICE, "PACED_FOLDER": str(folder)}
        launch = {"output": str(folder / "runs"), "env": env, **settings}
        (folder / "demo.yaml").write_text(yaml.safe_dump({"MODEL_ARGS": {}, "LAUNCH": launch}))
        command = [sys.executable, "-m", "megatron_act.launch", "demo.yaml", "--nodes", "2", "--gpus-per-node", "1"]
        subprocess.run([*command, *launcher, "--", *words], cwd=folder, env=environment(), check=True)
        script = folder / "demo.sh"
        script.write_text(script.read_text().replace("megatron_act.pretrain_gpt", "paced"))

    def start(self, rank: int) -> subprocess.Popen:
        """The script on one host; its output is added to ``node0.txt`` or ``node1.txt``."""
        place = {"NODE_RANK": str(rank), "NODE_ADDR": self.hosts[rank].address, "RDZV_HOST": self.hosts[0].address}
        env = {**environment(), **place}
        env["PYTHONPATH"] += os.pathsep + str(WORKERS)
        with self._log(rank).open("a") as file:
            command = self.hosts[rank].command(["bash", "demo.sh"])
            return subprocess.Popen(command, env=env, cwd=self.folder, stdout=file, stderr=subprocess.STDOUT)

    def log(self, rank: int) -> str:
        return self._log(rank).read_text()

    def _log(self, rank: int) -> Path:
        return self.folder / f"node{rank}.txt"

    def starts(self) -> list[list[int]]:
        """The iterations of each start of the ranks that got as far as the model."""
        found: list[list[int]] = []
        for record in records(self.folder):
            if record["event"] == "start":
                found.append([])
            elif record["event"] == "step":
                found[-1].append(record["iteration"])
        return found

    def pause_in(self, iteration: int) -> None:
        """Rank 1 will wait in the middle of this iteration: to be said before it can get there."""
        self.pause.write_text(str(iteration))

    @contextmanager
    def within(self, iteration: int) -> Iterator[None]:
        """The block runs while both ranks are in that iteration."""
        there = [self.folder / f"rank{rank}_in_{iteration}" for rank in range(2)]
        self.wait(lambda: all(file.is_file() for file in there), f"both ranks in iteration {iteration}")
        yield
        self.pause.unlink()

    def wait(self, reached: Callable[[], bool], what: str) -> None:
        """Until something is so; AssertionError with both logs if it takes too long."""
        end = time.monotonic() + LIMIT_S
        while not reached():
            assert time.monotonic() < end, f"expected {what}, got {self.log(0)[-3000:]}\n\n{self.log(1)[-3000:]}"
            time.sleep(0.05)


def ended(job: Job, *nodes: subprocess.Popen) -> list[int]:
    """The exit codes of the hosts' scripts."""
    job.wait(lambda: all(node.poll() is not None for node in nodes), "the end of the scripts")
    return [node.returncode for node in nodes]


def terminate(node: subprocess.Popen) -> None:
    """SIGTERM to a host's script, as a preemption of this host alone sends it; ``nsenter`` has become the script."""
    node.send_signal(signal.SIGTERM)
