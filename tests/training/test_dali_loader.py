"""``--dataloader dali`` in real runs: every rank reads what it reads with Megatron's loader, resumed or not.

Without DALI a plain iteration over the same batches stands for it: what is tested then is which samples are asked for.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_support import Run, Train, continuing

from megatron_act.data.dali import is_installed

pytestmark = pytest.mark.distributed

STEPS, HALF = 4, 2
COMMAND = ["--activation", "xielu", "--micro-batch-size", "2", "--train-iters", str(STEPS)]
COMMAND += ["--eval-interval", str(HALF), "--eval-iters", "1"]
DALI = ["--dataloader", "dali"]
SAVE = ["--save-interval", str(HALF)]
LAYOUTS = {
    "tp2": ["--tensor-model-parallel-size", "2"],
    "dp2 cyclic": ["--dataloader-type", "cyclic"],
    "virtual pipeline": ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"],
}
Batch = dict[str, torch.Tensor | None]
Read = Callable[..., tuple[Run, list[list[Batch]]]]
needs_dali = pytest.mark.skipif(not is_installed(), reason="no NVIDIA DALI")


@pytest.fixture(scope="module")
def read(forked_train: Train, tmp_path_factory: pytest.TempPathFactory) -> Read:
    """A run of two ranks, and what each of them read."""

    def run(*flags: str) -> tuple[Run, list[list[Batch]]]:
        folder = tmp_path_factory.mktemp("batches")
        arguments = {"folder": str(folder), "without_dali": not is_installed()}
        done = forked_train(*COMMAND, *flags, ranks=2, prepare=["dali_batches", arguments])
        assert done.code == 0, done.log[-3000:]
        return done, [torch.load(folder / f"{rank}.pt") for rank in range(2)]

    return run


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for got, want in zip(ours, theirs, strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert (got[name] is None) == (value is None)
            if value is not None:
                assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_rank_reads_megatrons_samples(read: Read, layout: str) -> None:
    theirs, their_batches = read(*LAYOUTS[layout])
    ours, our_batches = read(*LAYOUTS[layout], *DALI)
    for rank in range(2):
        assert_equal(our_batches[rank], their_batches[rank])
    assert len(ours.losses) == STEPS and ours.losses == theirs.losses
    assert [record.get("loss") for record in ours.records] == [record.get("loss") for record in theirs.records]
    assert_which_ranks_read(layout, *our_batches)


def assert_which_ranks_read(layout: str, first: list[Batch], second: list[Batch]) -> None:
    if layout == "tp2":
        assert second == [{}] * len(first)  # rank 0 of a tensor-parallel group reads for all
    else:
        same = torch.equal(first[0]["tokens"], second[0]["tokens"])
        assert same == (layout == "virtual pipeline")


def test_a_resumed_run_goes_on_with_the_next_sample(read: Read, tmp_path: Path) -> None:
    whole, batches = read(*DALI, *SAVE)
    resumed, following = read(*DALI, *continuing(whole, HALF, tmp_path / "half"))
    assert [step["iteration"] for step in resumed.steps] == [HALF + 1, STEPS]
    assert resumed.losses == whole.losses[HALF:]
    for rank in range(2):
        assert_equal(following[rank], batches[rank][-len(following[rank]) :])


@needs_dali
def test_a_worker_process_reads_for_the_entry_point(train: Train) -> None:
    """Under torchrun, as a user starts it: the worker imports the entry point again."""
    theirs = train(*COMMAND)
    ours = train(*COMMAND, *DALI, "--num-workers", "2")
    assert ours.code == 0, ours.log[-3000:]
    assert len(ours.losses) == STEPS and ours.losses == theirs.losses
    assert "reads Megatron's samples, in a process of its own" in ours.log
