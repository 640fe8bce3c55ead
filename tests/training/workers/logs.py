"""What a rank of a run may meet that its log must tell: skipped steps, a crash, another package."""

import sys
from typing import Any


def prepare(kind: str, **more: Any) -> None:
    """Arms one.

    Args:
        kind: ``skip`` (``steps``: counted from 1, not applied, with a NaN loss), ``crash`` (``rank``, ``step``), or
            ``path`` (``folder`` of packages).
    """
    {"skip": _skip, "crash": _crash, "path": _path}[kind](**more)


def _train_step(change: Any) -> None:
    from megatron.training import training as megatron_loop

    original = megatron_loop.train_step

    def train_step(*args: Any, iteration: int, **kwargs: Any) -> Any:
        return change(iteration + 1, original(*args, iteration=iteration, **kwargs))

    megatron_loop.train_step = train_step


def _skip(steps: list[int]) -> None:
    def change(step: int, result: Any) -> Any:
        if step not in steps:
            return result
        losses, _, *rest = result
        return {name: loss * float("nan") for name, loss in losses.items()}, 1, *rest

    _train_step(change)


def _crash(rank: int, step: int) -> None:
    import os

    def change(now: int, result: Any) -> Any:
        if now == step and int(os.environ["RANK"]) == rank:
            raise ValueError("something gave way")
        return result

    _train_step(change)


def _path(folder: str) -> None:
    sys.path.insert(0, folder)
