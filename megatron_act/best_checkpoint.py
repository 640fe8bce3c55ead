"""``--export-best DIR``: the checkpoint of the lowest validation loss, kept as a Hugging Face folder.

A checkpoint counts with the loss of its own weights: an iteration that was both saved and evaluated, in whichever order
(Megatron evaluates before it saves, and after the last save). The flags must make both meet; what is saved besides, by
the clock or after SIGTERM, has no loss and is not looked at. ``SAVE/best.json`` carries the best so far from start to
start; an export that a stop has left out is made by the next one.

Two evaluations read different parts of the validation data unless ``--full-validation`` makes them equal: the best is
the best measured.
"""

import atexit
import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import training as megatron_loop

from megatron_act.background_export import BackgroundExport
from megatron_act.best_export import RECORD
from megatron_act.checkpoint import families
from megatron_act.checkpoint.scalars import trained_activation
from megatron_act.checkpoint.writer import check_output
from megatron_act.errors import UserError

FLAG = "--export-best"
WAIT_S = 600.0
Function = Callable[..., Any]


def conflict(args: Namespace) -> str | None:
    """Why the flag cannot be served: one sentence with what to change, or None."""
    if not args.export_best:
        return None
    every, saved = args.eval_interval or 0, args.save_interval or 0
    evaluated = every and (args.eval_iters or args.full_validation)
    problems = (
        (not args.save, "expected --save DIR with it, got none: add it"),
        (args.ckpt_format != "torch_dist", f"expected --ckpt-format torch_dist, got {args.ckpt_format}: change it"),
        (not evaluated, "expected evaluations, got none: add --eval-interval N and --eval-iters N"),
        (args.multiple_validation_sets, "expected one validation loss, got --multiple-validation-sets: remove it"),
        (
            not saved or (every and saved % every),
            f"expected --save-interval to be a multiple of --eval-interval {every}, got {saved}: a checkpoint that is "
            "not evaluated cannot be the best",
        ),
    )
    found = next((message for present, message in problems if present), None)
    return f"{FLAG}: {found}" if found else _inexpressible(args)


def _inexpressible(args: Namespace) -> str | None:
    """The failures of every export of this run, now."""
    try:
        families.choose(args, trained_activation(args))
        check_output(Path(args.export_best), overwrite=True)
    except UserError as error:
        return f"{FLAG} {args.export_best}: {error}"
    return None


class BestCheckpoint:
    """Finds it; the exports are rank 0's.

    Args:
        args: Megatron's validated arguments.

    Attributes:
        exports: what reads which checkpoint.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.file = Path(args.save) / RECORD
        self.best = _read(self.file)
        self.saved: int | None = None
        self.losses: dict[int, float] = {}  # of the last evaluated iteration
        self.exports = BackgroundExport(Path(args.save), Path(args.export_best))
        if args.rank == 0:
            self._catch_up()
            atexit.register(self._finish)

    def _catch_up(self) -> None:
        """An export that the last run did not finish."""
        exported = _read(Path(self.args.export_best) / RECORD)
        if self.best and self.best != exported and (self.exports.checkpoint(self.best) / "metadata.json").is_file():
            self.exports.offer(self.best)

    def _finish(self) -> None:
        """After the last step there is time to wait; after a notice, a fault or a time limit there is none."""
        last = max([self.saved or 0, *self.losses])
        self.exports.finish(WAIT_S if last >= (self.args.train_iters or math.inf) else 0)

    def after_save(self, iteration: int) -> None:
        """A save has been made, or has begun (``--async-save``)."""
        self.saved = iteration
        self._consider(iteration)

    def after_evaluation(self, iteration: int, loss: float) -> None:
        """The validation loss of an iteration's weights."""
        self.losses = {iteration: self.losses.get(iteration, loss)}  # Megatron evaluates the last one again
        self._consider(iteration)

    def _consider(self, iteration: int) -> None:
        loss = self.losses.get(iteration)
        if self.args.rank != 0 or self.saved != iteration or loss is None:
            return
        if loss < (self.best["validation_loss"] if self.best else math.inf):
            tokens = self.args.consumed_train_samples * self.args.seq_length
            self.best = {"iteration": iteration, "validation_loss": loss, "tokens": tokens}
            self._note(self.best)
            self.exports.offer(self.best)

    def _note(self, best: dict[str, Any]) -> None:
        """For the next start; a disk that is full again after a good save must not end the run."""
        written = self.file.with_name(f"{RECORD}.new")
        try:
            written.write_text(json.dumps(best) + "\n", encoding="utf-8")
            written.replace(self.file)
        except OSError as error:
            print(f"> megatron-act: {self.file} cannot be written ({error.strerror}): training goes on", flush=True)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def install(args: Namespace) -> BestCheckpoint | None:
    """Connects this module to Megatron's evaluations where the flag asks for it."""
    if not args.export_best:
        return None
    best = BestCheckpoint(args)
    losses: list[float] = []
    megatron_loop.evaluate = _noting(megatron_loop.evaluate, losses)
    megatron_loop.evaluate_and_print_results = _telling(megatron_loop.evaluate_and_print_results, losses, best)
    return best


def _noting(original: Function, losses: list[float]) -> Function:
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        losses[:] = [float((result[0] or {}).get("lm loss", math.nan))]
        return result

    return evaluate


def _telling(original: Function, losses: list[float], best: BestCheckpoint) -> Function:
    """``evaluate`` knows the loss, on the last rank; its caller the iteration and the data."""

    def evaluate_and_print(
        prefix: str, step: Any, data: Any, model: Any, iteration: int, *rest: Any, **more: Any
    ) -> None:
        original(prefix, step, data, model, iteration, *rest, **more)
        if losses and "test set" not in prefix:
            loss = torch.tensor([losses.pop()], dtype=torch.float64, device=torch.cuda.current_device())
            torch.distributed.broadcast(loss, src=torch.distributed.get_world_size() - 1)
            best.after_evaluation(iteration, float(loss))

    return evaluate_and_print
