"""Ranks that stay: reads cases as JSON lines, answers each with a JSON line, until the input ends.

Megatron is imported once; the ranks are forked from there and take one case after the other, each in parallel state of
its own. Ranks that a case's world does not need wait. If a rank raises, ends or does not answer in time, the answer
holds the traceback and all ranks are replaced by new ones, which costs no import.

    {"case": {...}, "folder": "...", "timeout_s": 60}  ->  {"ranks": [{"losses": [...], ...}, ...]} or {"error": "..."}
"""

import faulthandler
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from megatron_act import cpu_backend  # noqa: E402

cpu_backend.install()

from drawn_cases import Case  # noqa: E402
from drawn_run import run  # noqa: E402

GRACE_S = 60.0  # for the other ranks' tracebacks, once one has failed
Answer = dict[str, Any]


class Ranks:
    """The forked processes and the pipes to them."""

    def __init__(self, count: int) -> None:
        fork = multiprocessing.get_context("fork")
        pairs = [fork.Pipe() for _ in range(count)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [fork.Process(target=serve, args=(rank, pairs), daemon=True) for rank in range(count)]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def ask(self, case: dict[str, Any], folder: str, timeout_s: float) -> Answer:
        """One case on as many ranks as its world has."""
        world = Case(**case).world
        for pipe in self.pipes[:world]:
            pipe.send((case, folder, timeout_s))
        answers = self._answers(world, timeout_s)
        errors = [f"rank {rank}: {answer['error']}" for rank, answer in sorted(answers.items()) if "error" in answer]
        silent = [rank for rank in range(world) if rank not in answers]
        if errors or silent:
            return {"error": "\n".join(errors + [f"ranks {silent}: no answer in time"] * bool(silent))}
        return {"ranks": [answers[rank] for rank in range(world)]}

    def _answers(self, world: int, timeout_s: float) -> dict[int, Answer]:
        """What arrives until all have answered, or for a moment after one has failed, or in time."""
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < world:
            waiting = {self.pipes[rank]: rank for rank in range(world) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                answers[waiting[pipe]] = answer = _receive(pipe)
                if "error" in answer:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _receive(pipe: Any) -> Answer:
    try:
        return pipe.recv()
    except EOFError:
        return {"error": "the process ended"}


def serve(rank: int, pairs: list[tuple[Connection, Connection]]) -> None:
    """A rank's life: it ends with its server."""
    pipe = pairs[rank][1]
    for ours, theirs in pairs:  # inherited ends would keep the others from noticing
        ours.close()
        if theirs is not pipe:
            theirs.close()
    while True:
        try:
            case, folder, timeout_s = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(0.9 * timeout_s)  # where it hangs, into the log
        try:
            pipe.send(run(Case(**case), rank, Path(folder)))
        except BaseException:
            pipe.send({"error": traceback.format_exc()})
        faulthandler.cancel_dump_traceback_later()


def main(count: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Megatron prints goes to the log
    gc.freeze()  # what is imported stays: the ranks collect after each case, in a hundredth of the time
    ranks = Ranks(count)
    print(json.dumps({"ready": count}), file=answers, flush=True)
    for line in sys.stdin:
        answer = ranks.ask(**json.loads(line))
        if "error" in answer:
            ranks.end()
            ranks = Ranks(count)
        print(json.dumps(answer), file=answers, flush=True)
    ranks.end()


if __name__ == "__main__":
    main(int(sys.argv[1]))
