"""Megatron's logits of checkpoints, by a rank of ``forked_runs``: its imports are there already."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def prepare(saves: list[str], tokens: str, output: str) -> None:
    """Writes logits (length, padded vocabulary) by save folder, or why Megatron does not load it, and ends the rank."""
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_act.checkpoint import megatron_logits
    from megatron_act.checkpoint.reader import find_iteration

    megatron_logits.start()
    ids, found = torch.load(tokens), {}
    for save in saves:
        try:
            model = megatron_logits.load_model(str(find_iteration(save)))
            found[save] = megatron_logits.logits_of(model, ids[None])[0]
        except (
            Exception,
            CheckpointException,
        ) as error:  # whatever Megatron says of a checkpoint that does not fit its arguments
            found[save] = repr(error)
    torch.save(found, output)
    os._exit(0)


def megatrons_logits(forked: Any, folder: Path, saves: list[Path], tokens: Tensor) -> dict[Path, Tensor | str]:
    """What `prepare` writes, by save folder, for token ids (length,)."""
    torch.save(tokens, folder / "tokens.pt")
    names = {str(save): save for save in saves}
    request = {"saves": [*names], "tokens": str(folder / "tokens.pt"), "output": str(folder / "logits.pt")}
    log = folder / "logits.log"
    assert forked.run([], 1, log, [Path(__file__).stem, request]) == [0], log.read_text()[-3000:]
    return {names[name]: logits for name, logits in torch.load(folder / "logits.pt").items()}
