"""The held-out set: whole documents from the front, their bytes, and windows that predict each token once."""

import json
import math
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_act import stored_tokens
from megatron_act.compat import install_typing_override
from megatron_act.errors import UserError
from megatron_act.experiment import held_out
from megatron_act.experiment.parse import parse_experiment

TEXTS = ["one two", "drei vier fünf", "sechs", "eight ☃ nine"]
BASE = {"--num-layers": 1, "--hidden-size": 32, "--num-attention-heads": 2, "--train-iters": 2, "--lr": 0.1}


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose ids are bytes (byte-level symbols sorted by byte), with an end-of-document token, 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = pre_tokenizers.ByteLevel.alphabet()
    codes = list(range(ord("!"), ord("~") + 1)) + list(range(0xA1, 0xAD)) + list(range(0xAE, 0x100))
    others = [byte for byte in range(256) if byte not in codes]
    vocabulary = {chr(byte): byte for byte in codes} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert set(vocabulary) == set(symbols)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def experiment(tmp_path: Path) -> dict:
    byte_tokenizer(tmp_path / "tok")
    documents = [np.array([*text.encode(), 256], np.uint16) for text in TEXTS]
    stored_tokens.write(tmp_path / "train", documents[:1])
    stored_tokens.write(tmp_path / "valid_a", documents[:2])
    stored_tokens.write(tmp_path / "valid_b", documents[2:])
    data = {"train": ["train"], "valid": ["valid_a", "valid_b"]}
    baseline = {"activation": "swiglu", "ffn_hidden_size": 64}
    return {"name": "n", "base": BASE, "baseline": baseline, "arms": ["xielu"], "data": data, "tokenizer": "tok"}


def test_all_of_it_by_default(experiment: dict, tmp_path: Path) -> None:
    parsed = parse_experiment(experiment, tmp_path)
    same, found = held_out.prepare(parsed, tmp_path)
    assert same == parsed
    assert found is not None and found.documents == 4
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.tokens == found.bytes + 4  # one end each
    nats = 1.25
    assert found.bits_per_byte(nats) == pytest.approx(nats * (found.tokens - 1) / found.bytes / math.log(2))


def test_whole_documents_from_the_front_until_there_are_enough(experiment: dict, tmp_path: Path) -> None:
    parsed = parse_experiment({**experiment, "held_out_tokens": 20}, tmp_path)
    output = tmp_path / "out"
    output.mkdir()
    placed, found = held_out.prepare(parsed, output)
    assert placed.data["valid"] == (str(output / "held_out"),) and placed.data["train"] == parsed.data["train"]
    assert held_out.placed(parsed, output) == placed
    kept = stored_tokens.read(output / "held_out")
    expected = [token for text in TEXTS[:2] for token in (*text.encode(), 256)]  # 8 + 16 tokens: 8 are not enough
    assert kept.tokens.tolist() == expected and kept.lengths.tolist() == [8, 16]
    assert found is not None and (found.documents, found.tokens) == (2, 24)
    assert found.bytes == len("one two") + len("drei vier fünf".encode())
    before = (output / "held_out.bin").stat().st_mtime_ns
    assert held_out.prepare(parsed, output)[1] == found
    assert (output / "held_out.bin").stat().st_mtime_ns == before
    (output / "held_out.json").write_text(json.dumps({"tokens": 1}))
    assert held_out.prepare(parsed, output)[1] == found


def test_files_that_are_no_token_files_are_refused(experiment: dict, tmp_path: Path) -> None:
    (tmp_path / "valid_a.idx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"valid_a\.idx"):
        held_out.prepare(parse_experiment(experiment, tmp_path), tmp_path)


def held_out_of(tmp_path: Path, ranks: int, micro: int, batch: int, length: int = 5) -> list:
    install_typing_override()  # before Megatron is imported, where this file's tests run alone
    from megatron_act.full_validation import HeldOut

    args = Namespace(
        valid_data_path=[str(tmp_path / "valid_a"), str(tmp_path / "valid_b")],
        seq_length=length,
        eval_micro_batch_size=micro,
        eval_global_batch_size=batch,
        create_attention_mask_in_dataloader=True,
    )
    return [HeldOut(args, rank, ranks) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "micro", "batch"), [(1, 1, 1), (1, 4, 4), (2, 1, 4), (3, 2, 6)])
def test_every_token_is_predicted_once_whatever_the_layout(
    experiment: dict, tmp_path: Path, ranks: int, micro: int, batch: int
) -> None:
    stream = [token for text in TEXTS for token in (*text.encode(), 256)]
    pairs: dict[int, list[tuple[int, int]]] = {}
    for part in held_out_of(tmp_path, ranks, micro, batch):
        batches = list(part.batches())
        assert len(batches) == part.iterations * batch // (micro * ranks)
        for number, found in enumerate(batches):
            assert found["tokens"].shape == found["labels"].shape == found["loss_mask"].shape == (micro, 5)
            for row in range(micro):
                known = found["loss_mask"][row].bool()
                seen = zip(found["tokens"][row][known].tolist(), found["labels"][row][known].tolist(), strict=True)
                pairs[(number * ranks + part.rank) * micro + row] = list(seen)
    ordered = [pair for window in sorted(pairs) for pair in pairs[window]]
    assert ordered == list(pairwise(stream))


def test_a_window_sees_only_what_came_before(experiment: dict, tmp_path: Path) -> None:
    (part,) = held_out_of(tmp_path, 1, 2, 2)
    first = next(part.batches())
    assert first["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert first["attention_mask"].shape == (2, 1, 5, 5)
    assert first["attention_mask"][1, 0].tolist() == [[column > row for column in range(5)] for row in range(5)]
