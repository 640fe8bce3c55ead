"""The folder of one run, and what says that it is finished.

<output>/runs/<arm>-seed<N>/metrics.jsonl   what megatron_act.telemetry writes
                            log.txt         Megatron's own output
                            cache/          Megatron's sample index, while the run goes on
                            checkpoint/     torch_dist, at the last iteration
                            run.json        written last: the command and the inputs of a finished run
"""

import functools
import hashlib
import json
import math
import shutil
import statistics
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
    def cache(self) -> Path:
        """Megatron's sample index: of this run alone, as two runs must not write the same files at once."""
        return self.path / "cache"

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
    for files in ((index, tokens), (tokenizer,)):
        if all(file.is_file() for file in files):
            return _digest(files, tuple((stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files)))
    return None


@functools.cache  # by size and time too: an index is read once, not once a run
def _digest(files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> str:
    digest = hashlib.sha256(files[0].read_bytes())
    for tokens in files[1:]:
        digest.update(_ends(tokens))
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(SAMPLED_BYTES)
        file.seek(max(0, size - SAMPLED_BYTES))
        return start + file.read() + str(size).encode()


def write_record(folder: RunFolder, run: Run, command: list[str], seconds: float, layout: str = "") -> None:
    """Marks the run as finished; ``layout`` says where it ran, ``seconds`` how long, start-up included."""
    record = {**signature(run), "command": command, "seconds": round(seconds, 1), "layout": layout}
    draft = folder.record.with_suffix(".partial")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draft.replace(folder.record)
    shutil.rmtree(folder.cache, ignore_errors=True)


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


def final_validation(folder: RunFolder) -> float | None:
    """The last validation loss of a run, in nats per token; None without one or where it is not finite."""
    lines = read_lines(folder.metrics)
    losses = [line["loss"] for line in lines if line["event"] == "evaluation" and line["split"] == "validation"]
    return losses[-1] if losses and math.isfinite(losses[-1]) else None


def step_seconds(folder: RunFolder) -> float:
    """Median time of a training step, without evaluations and checkpoints."""
    return statistics.median(line["step_seconds"] for line in read_lines(folder.metrics) if line["event"] == "step")
