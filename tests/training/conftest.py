"""Real training runs: Megatron's loop under torchrun on gloo, on text tokenized from the packaged sample."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_runs import ForkedRuns, forked_runs
from training_support import INITIAL, MODEL_FLAGS, Run, Train, torchrun

VOCAB_SIZE = 512


@pytest.fixture(scope="session")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    # pyarrow and tokenizers, which the tests marked gpu do without: the machine they run on may lack them
    from megatron_act.data import sample_path
    from megatron_act.data.bpe import train_bpe
    from megatron_act.data.preprocess import preprocess
    from megatron_act.data.source import iter_texts

    folder = tmp_path_factory.mktemp("data")
    train_bpe(itertools.islice(iter_texts([sample_path()]), 1000), VOCAB_SIZE, folder / "tokenizer")
    preprocess([sample_path()], folder / "tokenizer", folder / "text", workers=1)
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")]
    return [*tokenizer, "--data-path", str(folder / "text"), "--split", "95,5,0", "--data-cache-path", str(folder)]


@pytest.fixture(scope="session")
def train(data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``train("--activation", "xielu", ranks=2)``: the entry point with a tiny model on real text.

    Saving takes seconds: only runs with ``--save-interval`` among their flags do.
    """

    def run(*flags: str, ranks: int = 1) -> Run:
        folder = tmp_path_factory.mktemp("run")
        done = torchrun("-m", "megatron_act.pretrain_gpt", *command_line(folder, data_flags, flags), ranks=ranks)
        (folder / "log.txt").write_text(done.stdout)
        return Run(folder, done.returncode, done.stdout, records(folder))

    return run


def command_line(folder: Path, data_flags: list[str], flags: tuple[str, ...]) -> list[str]:
    metrics = ["--metrics-jsonl", str(folder / "metrics.jsonl")]
    saving = ["--save", str(folder / "checkpoint")] if "--save-interval" in flags else []
    return ["--cpu", *MODEL_FLAGS, *data_flags, *metrics, *saving, *flags]


def records(folder: Path) -> list[dict]:
    metrics = folder / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def training(forked: ForkedRuns, data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Training runs by a server of forked ranks."""

    def run(*flags: str, ranks: int = 1, folder: Path | None = None, prepare: Any = None) -> Run:
        folder = folder or tmp_path_factory.mktemp("run")
        log = folder / "log.txt"
        log.unlink(missing_ok=True)
        codes = forked.run(command_line(folder, data_flags, flags), ranks, log, prepare)
        return Run(folder, next((code for code in codes if code), 0), log.read_text(), records(folder))

    return run


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    with forked_runs(tmp_path_factory.mktemp("forked") / "log.txt") as runs:
        yield runs


@pytest.fixture(scope="session")
def forked_train(forked: ForkedRuns, data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """The same training as ``train``, bit for bit, in a fraction of its time: for tests of many runs.

    In a ``folder`` of an earlier run it is that run's command again. ``code`` is that of the rank that failed first.
    """

    return training(forked, data_flags, tmp_path_factory)


@pytest.fixture(scope="module")
def engine_train(data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """``forked_train`` with Transformer Engine's layers: its own Python, torch in place of its kernels."""
    with forked_runs(tmp_path_factory.mktemp("engine") / "log.txt", engine=True) as runs:
        yield training(runs, data_flags, tmp_path_factory)


@pytest.fixture(scope="session")
def initial(forked_train: Train) -> Path:
    """A checkpoint of xIELU's initial weights for all layouts: pipeline stages would draw from seeds of their own."""
    run = forked_train("--activation", "xielu", *INITIAL)
    assert run.code == 0, run.log[-2000:]
    return run.checkpoint
