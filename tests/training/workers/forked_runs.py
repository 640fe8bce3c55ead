"""Training runs without imports: reads runs as JSON lines, answers each with its ranks' exit codes, until they end.

The entry point and Megatron are imported once; each run's ranks are forked from there, with torchrun's environment, and
run the entry point's ``main`` like processes that torchrun has started. When one fails, the others are ended.

    {"words": ["--cpu", ...], "ranks": 2, "log": "...", "prepare": ["module", {...}]}  ->  {"codes": [0, 0]}

``prepare`` names a module of this folder whose ``prepare(**arguments)`` each rank calls before it starts. With the word
``engine`` on the command line Transformer Engine's Python is there too (``te_cpu``).
"""

import importlib
import json
import multiprocessing
import os
import queue
import signal
import socket
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GRACE_S = 3.0  # for the other ranks, once one has failed: gloo tells them


def import_all() -> None:
    """In this process only: Megatron's checkpoint writer starts processes that import this module again."""
    sys.path[:0] = [str(folder) for folder in (HERE, *HERE.parents[:3])]
    if "engine" in sys.argv[1:]:
        from te_cpu import loader

        loader.install()
    from megatron_act import cpu_backend

    cpu_backend.install()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_act import pretrain_gpt, training_run  # noqa: F401

    filesystem_async._results_queue = queue.Queue()  # a save writes in its own process: no other one need be started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_main(run: dict[str, Any], rank: int, port: int) -> None:
    """One rank's life; its exit code is the entry point's."""
    output = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    world = str(run["ranks"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if run.get("prepare"):
        module, arguments = run["prepare"]
        importlib.import_module(module).prepare(**arguments)
    from megatron_act import pretrain_gpt

    sys.argv = ["pretrain_gpt", *run["words"]]
    sys.exit(pretrain_gpt._entry())


def run_ranks(run: dict[str, Any]) -> list[int]:
    """Exit codes by rank, minus the signal's number for those that a signal ended."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks = [fork.Process(target=rank_main, args=(run, rank, port)) for rank in range(run["ranks"])]
    for process in ranks:
        process.start()
        os.setpgid(process.pid, ranks[0].pid)  # one group: what kills it kills them all
    while running := [process for process in ranks if process.exitcode is None]:
        failed = any(process.exitcode for process in ranks)
        if not wait([process.sentinel for process in running], timeout=GRACE_S if failed else run["timeout_s"]):
            os.killpg(ranks[0].pid, signal.SIGKILL)
        for process in running:
            process.join(timeout=0)
    return [process.exitcode for process in ranks]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_all()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"codes": run_ranks(json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
