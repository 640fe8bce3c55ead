"""Real training runs: Megatron's loop under torchrun on gloo, on text tokenized from the packaged sample."""

import itertools
import json

import pytest
from training_support import MODEL_FLAGS, Run, Train, torchrun

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
    """``train("--activation", "xielu", ranks=2)``: the entry point with a tiny model on real text."""

    def run(*flags: str, ranks: int = 1, entry: tuple[str, ...] = ("-m", "megatron_act.pretrain_gpt")) -> Run:
        folder = tmp_path_factory.mktemp("run")
        metrics = folder / "metrics.jsonl"
        words = [*entry, "--cpu", *MODEL_FLAGS, *data_flags, "--metrics-jsonl", str(metrics)]
        done = torchrun(*words, "--save", str(folder / "checkpoint"), "--save-interval", "100000", *flags, ranks=ranks)
        (folder / "log.txt").write_text(done.stdout)
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return Run(folder, done.returncode, done.stdout, [json.loads(line) for line in lines])

    return run
