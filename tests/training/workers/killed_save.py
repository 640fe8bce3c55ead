"""Kills all ranks of a run at a given point of a checkpoint's save, with SIGKILL."""

import builtins
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing


def prepare(point: str, iteration: int) -> None:
    """Arms one point of the save of one iteration.

    Args:
        point: ``shards``: rank 0's file is written, half of each other rank's, nothing else; ``complete``: the whole
            checkpoint is, the tracker is as before; ``tracker``: the tracker has been opened for writing.
        iteration: the iteration whose checkpoint is being written.
    """
    {"shards": _in_shards, "complete": _when_complete, "tracker": _in_tracker}[point](f"iter_{iteration:07d}")


def _kill() -> None:
    os.killpg(0, signal.SIGKILL)


def _in_shards(folder: str) -> None:
    original = FileSystemWriterAsync.write_preloaded_data

    def write(*args: Any, write_bucket: Any, **kwargs: Any) -> Any:
        result = original(*args, write_bucket=write_bucket, **kwargs)
        file = Path(write_bucket[0])
        if file.parent.name != folder:
            return result
        if torch.distributed.get_rank():
            os.truncate(file, file.stat().st_size // 2)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            _kill()
        time.sleep(60)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


def _when_complete(folder: str) -> None:
    original = serialization.save_config

    def save_config(config: Any, checkpoint_dir: str) -> None:
        original(config, checkpoint_dir)
        if Path(checkpoint_dir).name == folder:
            _kill()

    serialization.save_config = save_config


def _in_tracker(folder: str) -> None:
    def open_(path: str, mode: str = "r") -> Any:
        if mode == "w" and (Path(path).parent / folder).is_dir():
            Path(path).write_text("")  # all that opening it does
            _kill()
        return builtins.open(path, mode)

    client = checkpointing.maybe_msc
    checkpointing.maybe_msc = SimpleNamespace(open=open_, os=client.os, Path=client.Path, torch=client.torch)
