"""Two hosts joined by a cable: pulled, killed, preempted, unreachable. One job goes through all of it.

The job and its losses are ``test_faults``'s; each host is a network namespace with a torchrun agent and one rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import command_line
from test_faults import COMMAND, EVERY_SECOND, RANKS, STEPS, TABLE
from training_support import Run, Train
from two_host_job import Job, ended, terminate
from two_hosts import Host, two_hosts

pytestmark = pytest.mark.distributed

QUICK = ["--ckpt-format", "torch"]  # written in the same process: seconds less
PATIENT = ["--hang-timeout-seconds", "120", "--distributed-timeout-minutes", "10"]  # until the test asks for less
ROWS = {
    "pulled": "one host's cable pulled in step 4, back in when both ranks have ended by their watchdog",
    "killed": "all processes of host 1 killed in step 6, its script started again",
    "preempted": "SIGTERM to the script of host 1: ranks on both save",
}


@dataclass
class Story:
    """The job after it went through the faults, and the same command again after the last one.

    Attributes:
        starts: iterations of each start of the ranks, those of the last run included.
        codes: of host 0's and host 1's scripts.
    """

    job: Job
    starts: list[list[int]]
    codes: list[int]
    last: Run

    def resumed_from(self, fault: str) -> int:
        return self.starts[1 + list(ROWS).index(fault)][0] - 1

    def lost(self, fault: str) -> int:
        """Steps made twice."""
        number = list(ROWS).index(fault)
        return len(set(self.starts[number]) & set(self.starts[number + 1]))


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as both:
            yield both
    except OSError as error:
        pytest.skip(f"no network namespaces: {error}")


@pytest.fixture(scope="module")
def whole(forked_train: Train) -> Run:
    run = forked_train(*COMMAND, *EVERY_SECOND, ranks=RANKS)
    assert run.code == 0, run.log[-3000:]
    return run


@pytest.fixture(scope="module")
def story(
    hosts: tuple[Host, Host], forked_train: Train, data_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Story:
    folder = tmp_path_factory.mktemp("hosts")
    flags = [*COMMAND, *EVERY_SECOND, *QUICK, "--load", str(folder / "checkpoint")]
    words = command_line(folder, data_flags, (*flags, *PATIENT))
    job = Job(folder, hosts, words)
    job.pause_in(4)
    first, second = job.start(0), job.start(1)
    with job.within(4):
        hosts[1].plug(False)
        job.hang.touch()
    stacks = folder / "checkpoint" / "stacks"
    job.wait(lambda: len(list(stacks.glob("rank_*.txt"))) == RANKS, "stacks of both ranks")
    job.hang.unlink()
    job.pause_in(6)
    hosts[1].plug(True)
    with job.within(6):
        hosts[1].kill()
    second.wait()
    job.pause_in(5)
    second = job.start(1)
    with job.within(5):
        terminate(second)
        job.wait(job.noticed.is_file, "SIGTERM in rank 1")
    codes = ended(job, first, second)
    last = forked_train(*flags, ranks=RANKS, folder=folder)
    assert last.code == 0, last.log[-3000:]
    return Story(job, job.starts(), codes, last)


def test_every_step_is_the_undisturbed_runs(whole: Run, story: Story) -> None:
    expected = {step["iteration"]: step for step in whole.steps}
    assert {step["iteration"] for step in story.last.steps} == set(range(1, STEPS + 1))
    for step in story.last.steps:
        for key in ("loss", "grad_norm", "scalars"):
            assert step[key] == expected[step["iteration"]][key], (step["iteration"], key)


def test_the_hosts_find_each_other_again(story: Story) -> None:
    assert story.starts == [[1, 2, 3], [3, 4, 5], [5], [6]]
    assert story.codes == [0, 0]


def test_the_preflight_was_of_both_hosts(story: Story) -> None:
    """And not of the one that came later: it would have waited for the other."""
    logs = story.job.log(0), story.job.log(1)
    (report,) = [text for text in logs if "checks passed" in text]
    assert "checks passed, 0 failed" in report and "all-reduce, data parallel" in report
    assert "groups of 2: exact" in report
    assert logs[1].count("the others train already, no preflight") == 1


def test_both_sides_of_a_pulled_cable_say_where_they_stand(story: Story) -> None:
    for rank in range(RANKS):
        assert f"rank {rank} on " in story.job.log(rank) and "no progress for 6 s after iteration 3" in story.job.log(
            rank
        )


def test_the_table_is_what_was_tried(story: Story) -> None:
    lines = [
        "| fault tried on two hosts, one job through all of them | end | resumed from | steps lost |",
        "|---|---|---|---|",
    ]
    for name, fault in ROWS.items():
        end = "exit code 0" if name == "preempted" else "none, torchrun restarts"
        lines.append(f"| {fault} | {end} | {story.resumed_from(name)} | {story.lost(name)} |")
    table = "\n".join(lines) + "\n"
    assert TABLE.read_text().partition("\n\n")[2] == table, f"write this at the end of {TABLE}:\n{table}"


def test_a_kernel_without_such_a_cable_is_an_oserror(hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what needs one is skipped. The longest name of a device has 15 characters."""
    monkeypatch.setattr("two_hosts.DEVICE", "c" * 16)
    with pytest.raises(OSError, match="netlink: 16"), two_hosts():
        pass


def test_hosts_that_do_not_reach_each_other_say_so(
    hosts: tuple[Host, Host], data_flags: list[str], tmp_path: Path
) -> None:
    words = command_line(tmp_path, data_flags, tuple(COMMAND))
    job = Job(tmp_path, hosts, words, "--preflight-only", rendezvous_seconds=4)
    hosts[1].plug(False)
    try:
        assert ended(job, job.start(0), job.start(1)) == [2, 2]
    finally:
        hosts[1].plug(True)
    place = "error: rendezvous at 10.77.0.1:29401: expected"
    assert f"{place} 2 nodes within 4 s, got fewer: look at the other nodes' logs" in job.log(0)
    assert f"{place} an answer, got none within 4 s (Network is unreachable): look whether node 0 runs" in job.log(1)
    assert "Traceback" not in job.log(0) + job.log(1)
    assert len(job.log(1).splitlines()) == 3
