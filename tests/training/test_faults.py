"""What ends a run, and what is lost by it: each fault, then the same command again, and the losses of no fault.

Every run is of two data-parallel ranks with two micro-batches each, six steps, and a checkpoint after every second one.
The table of what was tried is in ``faults.md``; a test makes it again.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import command_line, records
from training_support import Run, Train, environment

pytestmark = pytest.mark.distributed

STEPS, RANKS = 6, 2
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]  # the random state counts too
COMMAND = ["--activation", "xielu", "--micro-batch-size", "2", *DROPOUT, "--train-iters", str(STEPS)]
EVERY_SECOND = ["--save-interval", "2"]
WORKERS = Path(__file__).parent / "workers"
TABLE = Path(__file__).with_name("faults.md")


@dataclass
class Case:
    """A run with a fault and the same command again.

    Attributes:
        latest: what the tracker named in between, and ``files`` what each checkpoint's folder held.
        resumed: None where the fault's own run went to its end.
    """

    faulty: Run
    latest: str
    files: dict[str, list[str]]
    resumed: Run | None

    @property
    def steps(self) -> list[dict]:
        return (self.resumed or self.faulty).steps

    @property
    def start(self) -> int:
        """The step whose checkpoint the second start has loaded."""
        events = [record.get("iteration", record["event"]) for record in (self.resumed or self.faulty).records]
        return events[events.index("start", 1) + 1] - 1

    @property
    def lost(self) -> int:
        """Steps that were made twice."""
        iterations = [step["iteration"] for step in self.steps]
        return len(iterations) - len(set(iterations))


class Faults:
    """Makes cases: ``fault`` is what ``workers/fault.py`` prepares."""

    def __init__(self, train: Train, folders: pytest.TempPathFactory) -> None:
        self.train, self.folders = train, folders

    def command(self, folder: Path) -> list[str]:
        return [*COMMAND, *EVERY_SECOND, "--load", str(folder / "checkpoint")]

    def of(self, *flags: str, **fault: object) -> Case:
        folder = self.folders.mktemp(str(fault["kind"]))
        faulty = self.train(*self.command(folder), *flags, ranks=RANKS, folder=folder, prepare=["fault", fault])
        return self.resume(faulty)

    def resume(self, faulty: Run) -> Case:
        latest = (faulty.checkpoint / "latest_checkpointed_iteration.txt").read_text()
        files = {path.name: sorted(file.name for file in path.iterdir()) for path in faulty.checkpoint.glob("iter_*")}
        resumed = self.train(*self.command(faulty.folder), ranks=RANKS, folder=faulty.folder)
        assert resumed.code == 0, resumed.log[-3000:]
        return Case(faulty, latest, files, resumed)


@pytest.fixture(scope="module")
def faults(forked_train: Train, tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(forked_train, tmp_path_factory)


@pytest.fixture(scope="module")
def whole(forked_train: Train) -> Run:
    run = forked_train(*COMMAND, *EVERY_SECOND, ranks=RANKS)
    assert run.code == 0, run.log[-3000:]
    return run


@pytest.fixture(scope="module")
def terminated(faults: Faults) -> Case:
    return faults.of(kind="signal", iteration=3, rank=1, number=signal.SIGTERM)


@pytest.fixture(scope="module")
def out_of_time(faults: Faults) -> Case:
    return faults.of("--exit-duration-in-mins", "1000", kind="late", iteration=3, rank=1, minutes=2000)


@pytest.fixture(scope="module")
def nan(faults: Faults) -> Case:
    return faults.of(kind="nan", iteration=3, rank=1, micro_batch=1, row=0)


@pytest.fixture(scope="module")
def hung(faults: Faults) -> Case:
    return faults.of("--hang-timeout-seconds", "100", kind="hang", iteration=4, rank=1, seconds=100)


@pytest.fixture(scope="module")
def full(faults: Faults) -> Case:
    return faults.of(kind="disk", iteration=4, rank=1)


@pytest.fixture(scope="module")
def truncated(faults: Faults, whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The run's record and checkpoints as after its fourth step, the latest of which has lost its last byte."""
    folder = tmp_path_factory.mktemp("truncated")
    for iteration in ("2", "4"):
        name = f"iter_000000{iteration}"
        shutil.copytree(whole.checkpoint / name, folder / "checkpoint" / name)
        (folder / "checkpoint" / "latest_checkpointed_iteration.txt").write_text(iteration)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in whole.records[:5]))
    file = folder / "checkpoint" / "iter_0000004" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    return faults.resume(Run(folder, 0, "", []))


@pytest.fixture(scope="module")
def restarted(faults: Faults, data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """By torchrun: rank 1 is killed in step 4; after the restart torchrun itself is asked to end in step 5."""
    folder = tmp_path_factory.mktemp("restarted")
    kill = {"kind": "signal", "iteration": 4, "rank": 1, "number": signal.SIGKILL}
    preempt = {"kind": "signal", "iteration": 5, "rank": 0, "number": signal.SIGTERM, "to_parent": True}
    words = command_line(folder, data_flags, tuple(faults.command(folder)))
    code = launched([str(WORKERS / "fault.py"), json.dumps([kill, preempt]), *words], folder / "launched.txt")
    return faults.resume(Run(folder, code, (folder / "launched.txt").read_text(), records(folder)))


def launched(words: list[str], log: Path) -> int:
    """Runs a script under torchrun as the launcher does; returns the exit code."""
    command = [sys.executable, "-m", "megatron_act.interruption_torchrun", "--standalone", "--max-restarts", "1"]
    command += ["--nproc-per-node", str(RANKS), *words]
    with log.open("w") as output:
        return subprocess.run(
            command, env=environment(), stdout=output, stderr=subprocess.STDOUT, timeout=500, check=False
        ).returncode


ROWS = {
    "terminated": "SIGTERM to one rank: all save and end with exit code 0",
    "restarted": "a rank killed (SIGKILL): torchrun --max-restarts 1 resumes; then SIGTERM to torchrun: exit code 0",
    "hung": "a rank that hangs: ended by its watchdog, stacks written",
    "nan": "a NaN loss: stopped before the optimizer step, documents named",
    "full": "no room for a file of a checkpoint: stopped, the one before stays the latest",
    "truncated": "the latest checkpoint is one byte short: the one before is loaded",
    "out_of_time": "--exit-duration-in-mins: saved, exit code 0",
}


@pytest.mark.parametrize("name", ROWS)
def test_every_step_is_the_undisturbed_runs(name: str, whole: Run, request: pytest.FixtureRequest) -> None:
    expected = {step["iteration"]: step for step in whole.steps}
    case: Case = request.getfixturevalue(name)
    assert {step["iteration"] for step in case.steps} == set(range(1, STEPS + 1))
    for step in case.steps:
        for key in ("loss", "grad_norm", "scalars"):
            assert step[key] == expected[step["iteration"]][key], (step["iteration"], key)


def test_a_terminated_run_has_saved_the_step_that_it_was_in(terminated: Case) -> None:
    assert (terminated.faulty.code, terminated.latest, terminated.lost) == (0, "3", 0)
    assert "exiting program after receiving SIGTERM" in terminated.faulty.log


def test_torchrun_restarts_a_killed_rank_and_ends_well_when_asked_to(restarted: Case) -> None:
    assert restarted.faulty.code == 0, restarted.faulty.log[-3000:]
    events = [record.get("iteration", record["event"]) for record in restarted.faulty.records]
    assert events[:5] == ["start", 1, 2, 3, "start"]
    assert events[5:8] == [3, 4, 5]  # from the checkpoint of step 2
    assert int(restarted.latest) == events[-1] < STEPS + 1
    assert restarted.lost == 1


def test_a_nan_stops_before_its_step_and_names_its_documents(nan: Case) -> None:
    """Rank 1's second micro-batch of step 3 begins after 2 x 8 + 2 x 2 + 2 samples."""
    assert nan.faulty.code != 0
    assert (nan.latest, nan.lost, sorted(nan.files)) == ("2", 0, ["iter_0000002"])
    line = next(line for line in nan.faulty.log.splitlines() if "expected a finite loss" in line)
    assert "iteration 3: expected a finite loss, got nan on rank 1 (data-parallel rank 1 of 2)" in line
    assert "micro-batch 2 of 2, 16 samples consumed before: sample 22 = documents " in line
    assert "text_document" in line or "/text:" in line
    assert "--iterations-to-skip 3 leaves the batch out" in line


def test_a_hung_rank_says_where_it_stands_and_ends(hung: Case) -> None:
    assert hung.faulty.code == 1
    assert (hung.latest, hung.lost) == ("2", 1)
    line = next(line for line in hung.faulty.log.splitlines() if "megatron-act: rank 1 on" in line)
    assert "no progress for 100 s after iteration 3; stands in get_lost (fault.py:" in line
    stacks = (hung.faulty.checkpoint / "stacks" / "rank_00001.txt").read_text()
    assert "get_lost" in stacks and "forward_backward" in stacks


def test_a_full_disk_leaves_the_checkpoint_before_as_the_latest(full: Case) -> None:
    assert full.faulty.code != 0
    assert (full.latest, full.lost) == ("2", 2)
    assert "metadata.json" not in full.files["iter_0000004"]
    assert "saving iteration 4 to" in full.faulty.log
    assert re.search(
        r"failed, \d+\.\d GB are free there \(rank 1: .*OSError.*\): iteration 2 stays the latest", full.faulty.log
    )


def test_a_truncated_checkpoint_is_not_loaded(truncated: Case) -> None:
    assert truncated.lost == 2 and truncated.resumed is not None
    said = [line for line in truncated.resumed.log.splitlines() if "cannot be read" in line]
    assert len(said) in (1, RANKS)
    assert "iter_0000004 cannot be read (__1_0.distcp has " in said[0]
    assert said[0].endswith("falling back to iteration 2, the one before")


def test_a_run_that_is_out_of_time_has_saved(out_of_time: Case) -> None:
    assert (out_of_time.faulty.code, out_of_time.latest, out_of_time.lost) == (0, "3", 0)


def test_the_table_is_what_was_tried(request: pytest.FixtureRequest) -> None:
    lines = [
        "| fault tried in a run of 6 steps that saves after 2 and 4 | exit code | resumed from | steps lost |",
        "|---|---|---|---|",
    ]
    for name, fault in ROWS.items():
        case: Case = request.getfixturevalue(name)
        code = "0" if case.faulty.code == 0 else "not 0"
        lines.append(f"| {fault} | {code} | {case.start} | {case.lost} |")
    table = "\n".join(lines) + "\n"
    written = TABLE.read_text().partition("\n\n")[0] + "\n"  # the rest is of two hosts
    assert written == table, f"write this to {TABLE}:\n{table}"


def test_saves_by_the_clock_alone_of_which_the_last_two_stay(forked_train: Train, tmp_path: Path) -> None:
    flags = ["--save", str(tmp_path / "checkpoint"), "--save-interval-minutes", "1e-9", "--keep-last-checkpoints", "2"]
    run = forked_train("--activation", "xielu", "--train-iters", "4", *flags, folder=tmp_path)
    assert run.code == 0, run.log[-3000:]
    assert sorted(path.name for path in run.checkpoint.glob("iter_*")) == ["iter_0000003", "iter_0000004"]
    assert [word for word in run.log.split() if word.endswith("iter_0000002")]
