"""When checkpoints are written, and what is said when one cannot be written.

``--save-interval-minutes`` saves by the clock, between or instead of Megatron's ``--save-interval``;
``--keep-last-checkpoints`` removes what is old after each complete save (``keep_checkpoints``), but not what
``--export-best`` (``best_checkpoint``) is reading. A save that fails, as
on a full disk, ends the run: the tracker still names the checkpoint before it, which the next start loads, and training
on without saving would lose more than a stop.
"""

import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import training as megatron_loop
from torch.distributed.checkpoint import CheckpointException

from megatron_act import best_checkpoint
from megatron_act.keep_checkpoints import KEEP, remove, superseded, tracked

MINUTES = "--save-interval-minutes"
NEVER = str(10**9)  # Megatron wants a --save-interval where there is a --save
Function = Callable[..., Any]


def words_of(args: Namespace) -> list[str]:
    """What the command line lacks for saves by the clock alone."""
    return ["--save-interval", NEVER] if args.save_interval_minutes and not args.save_interval else []


def conflict(args: Namespace) -> str | None:
    """Why the flags of saves cannot be served: one sentence with what to change, or None."""
    keep, minutes = args.keep_last_checkpoints, args.save_interval_minutes
    problems = (
        (keep is not None and keep < 1, f"{KEEP}: expected 1 or more, got {keep}: 2 leave one to fall back to"),
        (minutes is not None and not minutes > 0, f"{MINUTES}: expected more than 0, got {minutes}: correct it"),
        (keep and not args.save, f"{KEEP}: expected --save DIR with it, got none: add it"),
        (minutes and not args.save, f"{MINUTES}: expected --save DIR with it, got none: add it"),
        (keep and args.save_retain_interval, f"{KEEP} and --save-retain-interval both remove checkpoints: choose one"),
    )
    return next((message for present, message in problems if present), None) or best_checkpoint.conflict(args)


def install(args: Namespace) -> None:
    """Connects this module to Megatron's loop where there is a ``--save``."""
    if not args.save:
        return
    saves = Saves(args, best_checkpoint.install(args))
    megatron_loop.save_checkpoint_and_time = saves.saving(megatron_loop.save_checkpoint_and_time)
    if args.save_interval_minutes:
        megatron_loop.checkpoint_and_decide_exit = saves.by_clock(megatron_loop.checkpoint_and_decide_exit)


class Saves:
    """The saves of one run.

    Args:
        args: Megatron's validated arguments.
        best: told of each save, and asked what it still needs.
    """

    def __init__(self, args: Namespace, best: best_checkpoint.BestCheckpoint | None = None) -> None:
        self.args, self.best = args, best
        self.folder = Path(args.save)
        self.last = time.monotonic()
        self.removing = threading.Lock()
        if best:
            best.exports.after = self._remove_old

    def saving(self, original: Function) -> Function:
        """Megatron's save that says what a failure means, and then removes what is too old."""

        def save(iteration: int, *args: Any, **kwargs: Any) -> None:
            try:
                original(iteration, *args, **kwargs)
            except (OSError, CheckpointException) as error:
                raise RuntimeError(self._failure(iteration, error)) from error
            self.last = time.monotonic()
            if self.best and not kwargs.get("non_persistent_ckpt"):
                self.best.after_save(iteration)
            if self.args.rank == 0:
                threading.Thread(target=self._remove_old).start()

        return save

    def _remove_old(self) -> None:
        """Called again when an export has ended, which needed one."""
        with self.removing:
            keep, needed = self.args.keep_last_checkpoints, self.best.exports.busy() if self.best else set()
            remove([path for path in superseded(self.folder, keep) if path not in needed] if keep else [])

    def _failure(self, iteration: int, error: BaseException) -> str:
        latest = tracked(self.folder)
        start = "there is no earlier one" if latest is None else f"iteration {latest} stays the latest"
        free = shutil.disk_usage(self.folder).free / 1e9  # Megatron's own message lacks the system's
        return (
            f"saving iteration {iteration} to {self.folder} failed, {free:.1f} GB are free there ({_reason(error)}): "
            f"{start}: make room and start again, it will be loaded"
        )

    def by_clock(self, original: Function) -> Function:
        """Megatron's decision after a step, with a save when the last one is too long ago."""

        def decide(model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any) -> bool:
            if original(model, optimizer, scheduler, iteration, *rest):
                return True
            if iteration < self.args.train_iters and self._due():  # after the last step Megatron saves once more
                flops, context, iterator = rest
                state = (model, optimizer, scheduler, flops, context)
                megatron_loop.save_checkpoint_and_time(iteration, *state, train_data_iterator=iterator)
            return False

        return decide

    def _due(self) -> bool:
        """Whether one rank's clock says so; collective."""
        late = time.monotonic() - self.last >= 60 * self.args.save_interval_minutes
        due = torch.tensor([late], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(due, op=torch.distributed.ReduceOp.MAX)
        return bool(due.item())


def _reason(error: BaseException) -> str:
    """The first failure that rank 0 has gathered; the other ranks know only that there was one."""
    failures = getattr(error, "failures", None)
    if failures is None:
        return str(error)
    return next((f"rank {rank}: {cause[0]}" for rank, cause in sorted(failures.items())), "on another rank")
