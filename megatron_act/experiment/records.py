"""The folder of one run, and what says that it is finished.

<output>/runs/<arm>-seed<N>/metrics.jsonl   what megatron_act.telemetry writes
                            log.txt         Megatron's own output
                            checkpoint/     torch_dist, at the last iteration
                            run.json        written last: the command and the inputs of a finished run
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_act import __version__
from megatron_act.experiment.arms import Run

SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def metrics(self) -> Path:
        """The JSONL of telemetry."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """Megatron's output."""
        return self.path / "log.txt"

    @property
    def checkpoint(self) -> Path:
        """What Megatron's ``--load`` takes."""
        return self.path / "checkpoint"

    @property
    def record(self) -> Path:
        """The finished run's description."""
        return self.path / "run.json"

    def clear(self) -> None:
        """Removes whatever an unfinished run left: a restart from nothing repeats the same data in the same order."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)


def run_folder(output: str | Path, run: Run) -> RunFolder:
    """The folder of ``run`` in the experiment's output."""
    return RunFolder(Path(output) / "runs" / run.folder)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL; an unfinished last line is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def signature(run: Run) -> dict[str, Any]:
    """What decides a run's result: its words, the bytes behind the paths in them, and this package's version."""
    inputs = {word: digest for word in run.words if (digest := fingerprint(word))}
    return {"words": list(run.words), "inputs": inputs, "megatron_act": __version__}


def fingerprint(word: str) -> str | None:
    """A digest of the data set or tokenizer that ``word`` names, None when it names none.

    A ``.bin`` may be a terabyte: its size, first and last MiB stand for it, beside the whole ``.idx``.
    """
    index, tokens, tokenizer = Path(word + ".idx"), Path(word + ".bin"), Path(word) / "tokenizer.json"
    digest = hashlib.sha256()
    if index.is_file() and tokens.is_file():
        digest.update(index.read_bytes())
        digest.update(_ends(tokens))
    elif tokenizer.is_file():
        digest.update(tokenizer.read_bytes())
    else:
        return None
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(SAMPLED_BYTES)
        file.seek(max(0, size - SAMPLED_BYTES))
        return start + file.read() + str(size).encode()


def write_record(folder: RunFolder, run: Run, command: list[str], seconds: float) -> None:
    """Marks the run as finished."""
    record = {**signature(run), "command": command, "seconds": round(seconds, 1)}
    draft = folder.record.with_suffix(".partial")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draft.replace(folder.record)


def is_finished(folder: RunFolder, run: Run) -> bool:
    """Whether this very run (same words, same inputs) ended and left its metrics and its checkpoint."""
    try:
        record = json.loads(folder.record.read_text(encoding="utf-8"))
        saved = (folder.checkpoint / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip()
        steps = [line for line in read_lines(folder.metrics) if line["event"] == "step"]
    except (OSError, ValueError, KeyError):
        return False
    same = all(record.get(key) == value for key, value in signature(run).items())
    return same and saved == str(run.train_iters) and bool(steps)
