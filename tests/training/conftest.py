"""Real training runs: Megatron's loop under torchrun on gloo, on text tokenized from the packaged sample."""

import itertools
import json
from pathlib import Path

import pytest
from training_support import INITIAL, MODEL_FLAGS, Run, Train, torchrun

from megatron_act.data import sample_path
from megatron_act.data.bpe import train_bpe
from megatron_act.data.preprocess import preprocess
from megatron_act.data.source import iter_texts

VOCAB_SIZE = 512


@pytest.fixture(scope="session")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
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

    def run(*flags: str, ranks: int = 1, entry: tuple[str, ...] = ("-m", "megatron_act.pretrain_gpt")) -> Run:
        folder = tmp_path_factory.mktemp("run")
        metrics = folder / "metrics.jsonl"
        words = [*entry, "--cpu", *MODEL_FLAGS, *data_flags, "--metrics-jsonl", str(metrics)]
        saving = ["--save", str(folder / "checkpoint")] if "--save-interval" in flags else []
        done = torchrun(*words, *saving, *flags, ranks=ranks)
        (folder / "log.txt").write_text(done.stdout)
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return Run(folder, done.returncode, done.stdout, [json.loads(line) for line in lines])

    return run


@pytest.fixture(scope="session")
def initial(train: Train) -> Path:
    """A checkpoint of xIELU's initial weights for all layouts: pipeline stages would draw from seeds of their own."""
    run = train("--activation", "xielu", *INITIAL)
    assert run.code == 0, run.log[-2000:]
    return run.checkpoint
