"""Training runs without imports: reads runs as JSON lines, answers each with its ranks' exit codes, until they end.

The entry point and Megatron are imported once; each run's ranks are forked from there, with torchrun's environment, and
run the entry point's ``main`` like processes that torchrun has started. When one fails, the others get time to end by
themselves, but where rank 0 has refused the input, for all of them, they are killed at once.

    {"words": ["--cpu", ...], "ranks": 2, "log": "...", "prepare": ["module", {...}]}  ->  {"codes": [0, 0]}

The codes are in the order in which the ranks have ended: the first bad one is that of the rank that failed first.
``prepare`` names a module of this folder whose ``prepare(**arguments)`` each rank calls before it starts. With the word
``engine`` on the command line Transformer Engine's Python is there too (``te_cpu``).
"""

import importlib
import json
import multiprocessing
import os
import queue
import signal
import sys
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(folder) for folder in (HERE, *HERE.parents[:3])]

from held_ports import held_ports  # noqa: E402

from megatron_act.errors import BAD_INPUT  # noqa: E402

GRACE_S = 60.0  # for the other ranks, once one has failed: gloo tells them, but a busy machine may let them wait
FIRST_RANK_S = 1000.0  # rank 0 alone says what input all refuse, however late it comes to it


def import_all() -> None:
    """In this process only: Megatron's checkpoint writer starts processes that import this module again."""
    if "engine" in sys.argv[1:]:
        from te_cpu import loader

        loader.install()
    from megatron_act import cpu_backend

    cpu_backend.install()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_act import pretrain_gpt, training_run  # noqa: F401

    pretrain_gpt.FIRST_RANK_S = FIRST_RANK_S
    filesystem_async._results_queue = queue.Queue()  # a save writes in its own process: no other one need be started


def rank_main(run: dict[str, Any], rank: int, port: int, grouped: Any) -> None:
    """One rank's life; its exit code is the entry point's."""
    grouped.wait()
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
    """Exit codes in the order in which the ranks end, minus the signal's number for those that a signal ended."""
    fork = multiprocessing.get_context("fork")
    grouped = fork.Event()
    with held_ports() as port:
        ranks = [fork.Process(target=rank_main, args=(run, rank, port, grouped)) for rank in range(run["ranks"])]
        for process in ranks:
            process.start()
            os.setpgid(process.pid, ranks[0].pid)  # one group: what kills it kills them all
        grouped.set()
        return codes_of(ranks, run["timeout_s"])


def codes_of(ranks: list[Any], timeout_s: float) -> list[int]:
    codes: list[int] = []
    running = ranks
    while running:
        if not wait([process.sentinel for process in running], timeout=patience_s(ranks[0].exitcode, codes, timeout_s)):
            os.killpg(ranks[0].pid, signal.SIGKILL)
            for process in running:
                process.join()
        ended = [process for process in running if process.exitcode is not None]
        codes += [process.exitcode for process in ended]
        running = [process for process in running if process not in ended]
    return codes


def patience_s(code_of_first: int | None, codes: list[int], timeout_s: float) -> float:
    """How long a rank that runs may go on without another one's end."""
    if code_of_first == BAD_INPUT:
        return 0.0
    return GRACE_S if any(codes) else timeout_s


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_all()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"codes": run_ranks(json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
