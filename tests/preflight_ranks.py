"""Two ranks of a job for tests of the preflight: all-reduces with a sound and a faulty link, folders shared and not."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_act import preflight_groups, preflight_storage
from megatron_act.errors import UserError


def two_ranks(rank: int, folder: str) -> None:
    """One of them; writes ``FOLDER/RANK.json``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    preflight_storage.SEEN_SECONDS = 0.3
    own = Path(folder) / f"rank{rank}"
    own.mkdir()
    found = {"shared": said(Path(folder)), "own": said(own), "sound": measured()}
    if rank == 1:
        break_the_link()
    found["faulty"] = measured()
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured() -> list[float]:
    result = preflight_groups.measure(dist.group.WORLD, torch.device("cpu"))
    return [result.size, result.wrong, result.gbps]


def break_the_link() -> None:
    """One element of every sum in fp32 arrives wrong."""
    reduce = dist.all_reduce

    def wrong(tensor: torch.Tensor, **options: object) -> None:
        reduce(tensor, **options)  # type: ignore[arg-type]
        if tensor.dtype == torch.float32:
            tensor[7] += 1

    dist.all_reduce = wrong  # type: ignore[assignment]


def said(folder: Path) -> str:
    try:
        return preflight_storage.shared(folder, None)
    except UserError as error:
        return str(error)
