"""fastokens and tokenizers give the same ids, on real text and on the hardest there is, for three vocabularies."""

import json
import logging
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_support import (
    EDU_SAMPLE,
    LITERALS,
    TOKENIZERS,
    adversarial_texts,
    needs_edu_sample,
    reference_ids,
    reference_tokenizer,
    sample_texts,
    tokenizer_folder,
)

from megatron_act.data.tokenizer import Encoder, load_encoder, open_tokenizer

EOD = {"bpe": "<|endoftext|>", "gpt2": "<|endoftext|>", "tekken": "</s>"}


@cache
def encoder_of(name: str, library: str) -> Encoder:
    return load_encoder(tokenizer_folder(name) / "tokenizer.json", library)


def rows(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    ids, offsets = encoder.encode(texts)
    assert offsets[0] == 0 and offsets[-1] == len(ids) and len(offsets) == len(texts) + 1
    return [part.tolist() for part in np.split(ids, offsets[1:-1])]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_same_ids_on_the_sample(name: str) -> None:
    expected = reference_ids(name, sample_texts())
    assert rows(encoder_of(name, "fastokens"), sample_texts()) == expected
    assert rows(encoder_of(name, "tokenizers"), sample_texts()[:500]) == expected[:500]


@pytest.mark.parametrize("library", ["fastokens", "tokenizers"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_same_ids_on_adversarial_text(name: str, library: str) -> None:
    texts = adversarial_texts()
    got, expected = rows(encoder_of(name, library), texts), reference_ids(name, texts)
    assert [i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]] == []


@needs_edu_sample
@pytest.mark.parametrize("name", TOKENIZERS)
def test_same_ids_on_mixed_english(name: str) -> None:
    file = pq.ParquetFile(EDU_SAMPLE / "train-00000.parquet")
    texts = file.read_row_group(0, columns=["text"])["text"].to_pylist()
    assert rows(encoder_of(name, "fastokens"), texts) == reference_ids(name, texts)


@pytest.mark.parametrize("library", ["fastokens", "tokenizers"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_literals_stay_text(name: str, library: str) -> None:
    """No special token's id comes out of a text, and the ids decode to exactly the text that went in."""
    tokenizer = reference_tokenizer(name)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert tokenizer.token_to_id(EOD[name]) in special
    for text, ids in zip(LITERALS, rows(encoder_of(name, library), LITERALS), strict=True):
        assert not special & set(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("name", "vocab_size", "eod_id"), [("bpe", 4096, 0), ("gpt2", 50257, 50256), ("tekken", 131072, 2)]
)
def test_vocabulary_and_eod(name: str, vocab_size: int, eod_id: int) -> None:
    info = open_tokenizer(tokenizer_folder(name), eod_token=EOD[name])
    assert (info.vocab_size, info.eod_token, info.eod_id) == (vocab_size, EOD[name], eod_id)
    assert info.encoder == "fastokens"


def test_eod_comes_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder("bpe") / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}}))
    info = open_tokenizer(tmp_path)
    assert (info.eod_token, info.eod_id) == ("!", 1)
    assert open_tokenizer(tmp_path, eod_token="<|endoftext|>").eod_id == 0


@pytest.mark.parametrize("library", ["fastokens", "tokenizers"])
def test_truncation_and_padding_in_the_file_are_ignored(library: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder("bpe") / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["one", sample_texts()[0]]
    assert rows(load_encoder(tmp_path / "tokenizer.json", library), texts) == reference_ids("bpe", texts)


def test_fallback_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A word-level model, which fastokens does not run, goes to tokenizers with one warning that says so."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with caplog.at_level(logging.WARNING):
        info = open_tokenizer(tmp_path / "tokenizer.json", eod_token="</s>")
    assert info.encoder == "tokenizers"
    assert [record.message.split(": ")[0] for record in caplog.records] == [
        "encoding with the slower tokenizers library"
    ]
    assert rows(load_encoder(info.file, info.encoder), ["b a", "c"]) == [[3, 2], [0]]
