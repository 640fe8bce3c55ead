"""What a run will do, decided before it starts and written down: any process can do any task from it, in any order.

Sources are cut into pieces (row groups, or whole files where those are unknown) and the pieces, in input order, into
tasks of about equal bytes. A task is a contiguous stretch, and results are joined in order: the output depends neither
on the number of tasks nor on who does them when.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_act.data.columns import Columns
from megatron_act.data.filters import Filters
from megatron_act.data.source import Source
from megatron_act.data.split import Split
from megatron_act.data.tokenizer import TokenizerInfo

TASK_BYTES = 256 << 20  # of source: what a crash can cost one worker
TASKS_PER_WORKER = 4  # so that workers end at about the same time
WHOLE = Split(("all",), (1.0,))


@dataclass(frozen=True)
class Job:
    """What holds for every document."""

    tokenizer: TokenizerInfo
    columns: Columns
    filters: Filters
    split: Split


@dataclass(frozen=True)
class Stretch:
    """Pieces start to stop of source number `source`."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        prefix: P, where the output goes.
        shards: every task's output is a pair of files of its own, not a part of one pair.
        downloads: folder for files of the hub; None for one that is removed with the work.
        overwrite: an existing output may be replaced.
        command: for the manifest.
    """

    job: Job
    sources: tuple[Source, ...]
    tasks: tuple[tuple[Stretch, ...], ...]
    prefix: str
    shards: bool = False
    downloads: str | None = None
    overwrite: bool = False
    command: str | None = None

    def outputs(self) -> list["Output"]:
        """The pairs of files that come of it."""
        split = self.job.split if self.job.columns.id else None
        return outputs(self.prefix, split, len(self.tasks) if self.shards else None)

    def tasks_of(self, output: "Output") -> range:
        """The tasks whose tokens go into a pair."""
        return range(len(self.tasks)) if output.shard is None else range(output.shard, output.shard + 1)

    def same_work(self, other: "Plan") -> str | None:
        """What keeps the finished tasks of `other` from being used here, or None."""
        for name in ("job", "tasks", "shards"):
            if getattr(self, name) != getattr(other, name):
                return name
        same_files = [one.path for one in self.sources] == [one.path for one in other.sources]
        return None if same_files else "sources"


@dataclass(frozen=True)
class Output:
    """A pair of files: its part of the split, its number among shards or None, its path without suffix."""

    name: str
    shard: int | None
    stem: str


def outputs(prefix: str, split: Split | None, shards: int | None) -> list[Output]:
    """`P`, or `P_NAME` for each part; `_00000`, ... after it for shards."""
    parts = [(name, f"{prefix}_{name}") for name in split.names] if split else [(WHOLE.names[0], prefix)]
    if shards is None:
        return [Output(name, None, stem) for name, stem in parts]
    return [Output(name, shard, f"{stem}_{shard:05d}") for name, stem in parts for shard in range(shards)]


def final_paths(prefix: str, pairs: Sequence[Output]) -> list[Path]:
    """All .bin, then all .idx, then the manifest: in this order they become visible."""
    names = [pair.stem + suffix for suffix in (".bin", ".idx") for pair in pairs]
    return [Path(name) for name in [*names, f"{prefix}.manifest.json"]]


def cut(sources: Sequence[Source], tasks: int) -> tuple[tuple[Stretch, ...], ...]:
    """Divide all pieces, in order, into `tasks` stretches of about equal bytes; the rule depends on nothing else."""
    total = sum(sum(source.pieces) for source in sources) or 1
    found: list[list[Stretch]] = [[] for _ in range(tasks)]
    before = 0
    for number, source in enumerate(sources):
        for piece, size in enumerate(source.pieces):
            place = min(tasks - 1, (2 * before + size) * tasks // (2 * total))  # where the piece's middle falls
            before += size
            stretch = found[place][-1] if found[place] else None
            if stretch and stretch.source == number:
                found[place][-1] = Stretch(number, stretch.start, piece + 1)
            else:
                found[place].append(Stretch(number, piece, piece + 1))
    return tuple(tuple(stretches) for stretches in found)


def default_tasks(sources: Sequence[Source], workers: int) -> int:
    """One for a small run by one worker; else some for each worker, and none of more than about `TASK_BYTES`."""
    size = sum(source.size_bytes for source in sources)
    wanted = max(1 if workers == 1 else TASKS_PER_WORKER * workers, math.ceil(size / TASK_BYTES))
    return max(1, min(wanted, sum(len(source.pieces) for source in sources)))


def dump(plan: Plan) -> str:
    """A plan as JSON."""
    return json.dumps(dataclasses.asdict(plan), indent=1)


def load(path: Path) -> Plan:
    """A plan from a file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    job = data["job"]
    split = Split(tuple(job["split"]["names"]), tuple(job["split"]["shares"]))
    columns = Columns(**{**job["columns"], "numbers": tuple(job["columns"]["numbers"])})
    filters = Filters(**{**job["filters"], "dumps": tuple(job["filters"]["dumps"])})
    parts = {
        "job": Job(TokenizerInfo(**job["tokenizer"]), columns, filters, split),
        "sources": tuple(Source(**{**item, "pieces": tuple(item["pieces"])}) for item in data["sources"]),
        "tasks": tuple(tuple(Stretch(**item) for item in task) for task in data["tasks"]),
    }
    return Plan(**{**data, **parts})


def stretches(plan: Plan, task: int) -> Iterator[tuple[Source, Stretch]]:
    """The sources of a task, with what to read of each."""
    for stretch in plan.tasks[task]:
        yield plan.sources[stretch.source], stretch
