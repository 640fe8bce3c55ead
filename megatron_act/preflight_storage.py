"""The checkpoint folder: writable from every node, shared by all of them, large enough."""

import contextlib
import os
import shutil
import time
import uuid
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist

from megatron_act.errors import UserError
from megatron_act.keep_checkpoints import KEEP, tracked

CHECKPOINT_BYTES = 2 + 4 + 4 + 4  # per parameter: bf16 weight, its fp32 copy, Adam's two moments
SEEN_SECONDS = 60.0  # network file systems show another node's new file late, SkyPilot's cached buckets after 11 s


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def writable(folder: Path) -> str:
    """Writes a file of its own into the folder (or where it would be made) and removes it.

    Raises:
        UserError: the file cannot be written.
    """
    where = existing(folder)
    probe = where / f".preflight-{uuid.uuid4().hex}"
    try:
        with probe.open("wb") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        return f"{where} can be written"
    except OSError as error:
        raise UserError(f"expected to write in {where}, got {error.strerror}: change its rights or --save") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def shared(folder: Path, group: "dist.ProcessGroup | None") -> str:
    """Whether every rank sees a file that rank 0 makes; a collective.

    Raises:
        UserError: this rank's node has a folder of its own.
    """
    token = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0, group=group)
    probe = existing(folder) / f".preflight-shared-{token[0]}"
    with contextlib.suppress(OSError):  # `writable` says so
        if dist.get_rank() == 0:
            probe.touch()
    dist.barrier(group)
    seen = _appears(probe)
    dist.barrier(group)
    with contextlib.suppress(OSError):
        if dist.get_rank() == 0:
            probe.unlink(missing_ok=True)
    if not seen:
        raise UserError(f"expected {folder} on a file system that all nodes share, got one of this node: change --save")
    return f"all {dist.get_world_size()} ranks see rank 0's file"


def _appears(probe: Path) -> bool:
    end = time.monotonic() + SEEN_SECONDS
    while not (there := probe.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    return there


def room(args: Namespace, parameters: int, free: int | None = None) -> str:
    """Room for all checkpoints of the run that will lie in ``--save`` at the same time, and for the best export.

    Args:
        args: Megatron's validated arguments.
        parameters: of the whole model.
        free: bytes; default: what the file system of ``--save`` has.

    Raises:
        UserError: too little.
    """
    where, size = existing(Path(args.save)), CHECKPOINT_BYTES * parameters
    free = shutil.disk_usage(where).free if free is None else free
    (count, why), export = to_come(args), exported_bytes(args, parameters)
    needed = count * size
    if export and os.stat(where).st_dev == os.stat(existing(Path(args.export_best))).st_dev:
        needed, why = needed + export, f"{why}, {export / 1e9:.3g} GB of --export-best"
    elif export and (apart := shutil.disk_usage(best := existing(Path(args.export_best))).free) < export:
        raise UserError(
            f"--export-best: expected {export / 1e9:,.1f} GB free in {best}, got {apart / 1e9:,.1f} GB: free some or "
            "choose another folder"
        )
    if free < needed:
        raise UserError(
            f"expected {needed / 1e9:,.1f} GB free in {where} for {count:,} more ({why}), got "
            f"{free / 1e9:,.1f} GB: free some, choose another --save, or keep fewer ({KEEP})"
        )
    return f"{size / 1e9:.3g} GB a checkpoint; room for {free // size:,}, needed for {count:,} more ({why})"


def exported_bytes(args: Namespace, parameters: int) -> int:
    """What ``--export-best`` adds: the model in its dtype, and beside it for a moment the one that is better."""
    if not args.export_best:
        return 0
    copies = 1 if Path(args.export_best).exists() else 2
    return copies * parameters * (2 if args.bf16 or args.fp16 else 4)


def to_come(args: Namespace) -> tuple[int, str]:
    """How many checkpoints will be added to those that are there, at the most at a time, and of what that is counted.

    The fewest of: all that the run will save; with ``--keep-last-checkpoints K``, K and the one that is being written;
    with Megatron's ``--save-retain-interval``, what it keeps and two. Where nothing says, two.
    """
    saves, there = _saves(args), len(list(Path(args.save).glob("iter_*")))
    kept, retained = args.keep_last_checkpoints, args.save_retain_interval
    counts = [(saves, "all that this run will save")] if saves else []
    if kept:
        counts.append((max(1, kept + 1 - there), f"{KEEP} {kept} and one being written, {there} there"))
    if retained and args.train_iters:
        kept_on = f"every {retained} steps by --save-retain-interval, and two"
        counts.append((args.train_iters // retained + 2, kept_on))
    return min(counts, default=(2, "at least: by the clock, and none is removed"))


def _saves(args: Namespace) -> int | None:
    """Saves from the folder's latest checkpoint to the last step, one at least; None where their number is unknown."""
    if not args.train_iters or not args.save_interval or args.save_interval_minutes:
        return None
    done = (tracked(Path(args.save)) or 0) // args.save_interval
    return max(1, -(-args.train_iters // args.save_interval) - done)
