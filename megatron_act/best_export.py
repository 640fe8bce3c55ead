"""The best checkpoint as a Hugging Face folder, in a process of its own: ``python -m megatron_act.best_export``.

The folder is an export like any other (``checkpoint.export``) with ``best.json`` in it and a section in its card. It
replaces the one before when it is whole. The process is niced, sees no GPU, and ends with the rank that started it.
"""

import argparse
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_act.checkpoint.export import export
from megatron_act.checkpoint.resume import whole_folder
from megatron_act.checkpoint.writer import write_json
from megatron_act.errors import UserError, run_cli

RECORD = "best.json"
NICE = 19
_SET_DEATH_SIGNAL = 1  # prctl(2): PR_SET_PDEATHSIG
_AGAIN_S = 1.0


def main(argv: list[str]) -> None:
    """Exports ``--load`` to ``--output`` with ``--record``, the content of its ``best.json``."""
    parser = argparse.ArgumentParser(prog="python -m megatron_act.best_export", allow_abbrev=False)
    parser.add_argument("--load", type=Path, required=True, metavar="ITER", help="an iter_XXXXXXX folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--record", type=json.loads, required=True, metavar="JSON")
    args = parser.parse_args(argv)
    try:
        publish(args.load, args.output, args.record)
    except UserError:  # of the metrics file, say, which is being written while it is read
        time.sleep(_AGAIN_S)
        publish(args.load, args.output, args.record)


def publish(checkpoint: Path, output: Path, record: dict[str, Any]) -> None:
    """Replaces the model folder ``output`` by an export of ``checkpoint``, in one step at the end.

    Args:
        checkpoint: an ``iter_XXXXXXX`` folder.
        record: ``iteration``, ``validation_loss`` and what else ``best_checkpoint`` notes.

    Raises:
        UserError: as ``export`` does.
    """
    beside = output.parent / f".{output.name}.export"
    shutil.rmtree(beside / output.name, ignore_errors=True)
    export(checkpoint, beside / output.name, progress=False)  # an interrupted one goes on from its finished files
    with whole_folder(output) as folder:
        for file in (beside / output.name).iterdir():
            file.rename(folder / file.name)
        write_json(folder / RECORD, record)
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            card.write(section(record))
    shutil.rmtree(beside)


def section(record: dict[str, Any]) -> str:
    """What the card says of the choice."""
    return f"""
## Best checkpoint

Of all iterations of its run that were saved and evaluated, {record["iteration"]:,} has the lowest validation loss:
{record["validation_loss"]:.6f} nats per token, of the weights in this folder (`{RECORD}`).
"""


def follow(parent: int) -> None:
    """Ends this process when its parent ends, however that happens; and lets all others go first."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)
    os.nice(NICE)


if __name__ == "__main__":
    follow(int(os.environ["MEGATRON_ACT_PARENT"]))
    sys.exit(run_cli(lambda: main(sys.argv[1:])))
