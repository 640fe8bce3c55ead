"""What ``megatron_args`` does, in a rank of ``forked_runs``: a test need not import Megatron for each model."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def prepare(output: str, words: list[str]) -> None:
    """Writes the common state and ends the rank before it trains."""
    from megatron_act.checkpoint import megatron_args

    megatron_args.main(output, words)
    os._exit(0)


def common_states(forked: Any, folder: Path) -> Callable[[Sequence[str]], bytes]:
    """Stands for ``import_hf.common_state``."""

    def common_state(words: Sequence[str]) -> bytes:
        output = folder / "common.pt"
        request = [Path(__file__).stem, {"output": str(output), "words": [*words]}]
        log = folder / "common.log"
        assert forked.run([], 1, log, request) == [0], log.read_text()
        return output.read_bytes()

    return common_state
