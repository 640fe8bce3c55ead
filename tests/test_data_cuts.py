"""megatron_act/data/cuts.py: pieces encode to the ids of the whole, and texts stay whole where that is not certain."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_support import encoded, read_documents, reference_ids, sample_texts, tokenizer_folder, write_parquet

from megatron_act.data import task
from megatron_act.data.cuts import Cut, cut_of, pieces
from megatron_act.data.preprocess import preprocess
from megatron_act.data.probe import LITERALS, adversarial_texts
from megatron_act.data.tokenizer import load_encoder, open_tokenizer, open_vocabulary

ALL = ("bpe", "gpt2", "deepseek", "tekken", "tekken.json", "llama", "ranks")


def opened(name: str, **options: Any):  # type: ignore[no-untyped-def]
    file = tokenizer_folder(name) / ("gpt2.tiktoken" if name == "ranks" else "")
    eod = {"deepseek": "<\uff5cend\u2581of\u2581sentence\uff5c>", "tekken": "</s>"}.get(name)
    return open_tokenizer(file, eod, pattern="gpt2" if name == "ranks" else None, **options)


def hard_texts() -> list[str]:
    """Hard strings side by side with one space, several or none between them, and running text."""
    rng, scraps = random.Random(5), adversarial_texts([*LITERALS, "a b", "  "], count=300, seed=6)
    joined = [rng.choice([" ", "  ", "\n", ""]).join(rng.sample(scraps, 12)) for _ in range(60)]
    dense = ["".join(rng.choices("aB1.'s/  \n\t\u00e9\u0301\u4e2d", k=100)) for _ in range(100)]
    return [*scraps, *joined, *dense, *sample_texts()[:40]]


@pytest.mark.parametrize("name", ALL)
def test_pieces_have_the_ids_of_the_whole(name: str) -> None:
    """By the fast library and the reference, cut as often as can be; a rule that cuts anywhere fails at once."""
    info = opened(name)
    cut, texts = cut_of(info), hard_texts()
    assert cut == Cut(skip=int(name == "llama"))
    parts = [list(pieces(memoryview(text.encode()), 3, cut)) for text in texts]
    assert sum(map(len, parts)) > 4000
    for encoder in (load_encoder(info), open_vocabulary(Path(info.file), info.pattern).reference()):
        whole, cut_up = encoded(encoder, texts), iter(encoded(encoder, [piece for part in parts for piece in part]))
        assert whole == [[i for _ in part for i in next(cut_up)] for part in parts]


def test_pieces_are_of_the_size_asked_for_where_the_text_allows_it() -> None:
    text = "one two  three\u00e9 four" + "x" * 50 + " end of it"
    parts = list(pieces(memoryview(text.encode()), 12, Cut()))
    assert parts == ["one", " two  three\u00e9 four" + "x" * 50, " end of it"]
    assert list(pieces(memoryview(text.encode()), 12, None)) == [text]
    assert list(pieces(memoryview(b"ab cd ef"), 4, Cut(skip=1))) == ["ab", "cd", "ef"]
    assert list(pieces(memoryview(b""), 12, Cut())) == []


def changed(change: Callable[[dict], object], name: str = "gpt2") -> dict:
    tokenizer = json.loads((tokenizer_folder(name) / "tokenizer.json").read_bytes())
    change(tokenizer)
    return tokenizer


def added(**flags: Any) -> Callable[[dict], object]:
    token = {"id": 50257, "content": "#", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return lambda tokenizer: tokenizer["added_tokens"].append({**token, "special": False, **flags})


SPLIT = {"type": "Split", "pattern": {"Regex": r"\S+ \S+|\s+"}, "behavior": "Isolated", "invert": False}
LLAMA_STEPS = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
CHANGES: dict[str, tuple[Callable[[dict], object], bool]] = {
    "nothing": (lambda tokenizer: None, True),
    "NFC": (lambda tokenizer: tokenizer.update(normalizer={"type": "NFC"}), True),
    "a token of one word": (added(), True),
    "a special token of two words": (added(content="a b", special=True), True),
    "a token of two words": (added(content="a b"), False),
    "a token that ends in a space": (added(content="the "), False),
    "a token that takes the space after it": (added(rstrip=True), False),
    "another pattern": (lambda tokenizer: tokenizer.update(pre_tokenizer=SPLIT), False),
    "another pattern first": (
        lambda tokenizer: tokenizer.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, tokenizer["pre_tokenizer"]]}
        ),
        False,
    ),
    "a space in front of each text": (
        lambda tokenizer: tokenizer["pre_tokenizer"].update(add_prefix_space=True),
        False,
    ),
    "no words": (lambda tokenizer: tokenizer["pre_tokenizer"].update(use_regex=False), False),
    "lower case": (lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}), False),
    "dropout": (lambda tokenizer: tokenizer["model"].update(dropout=0.1), False),
    "Llama's": (lambda tokenizer: tokenizer.update(normalizer=LLAMA_STEPS, pre_tokenizer=None), True),
    "Llama's with a token across": (
        lambda tokenizer: (
            tokenizer.update(normalizer=LLAMA_STEPS, pre_tokenizer=None),
            tokenizer["model"]["vocab"].update({"of\u2581": 50257}),
        ),
        False,
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_only_what_is_certain_is_cut(case: str, tmp_path: Path) -> None:
    change, certain = CHANGES[case]
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(change)), encoding="utf-8")
    info = open_tokenizer(tokenizer_folder("gpt2"))
    info = type(info)(**{**vars(info), "file": str(tmp_path / "tokenizer.json")})
    assert (cut_of(info) is not None) == certain


def test_other_patterns_of_a_rank_file_are_not_cut() -> None:
    info = open_tokenizer(tokenizer_folder("ranks") / "gpt2.tiktoken", pattern=r"\S+ \S+|\s+|\S+", encoder="tiktoken")
    assert cut_of(info) is None


def test_long_documents_are_written_as_short_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token file whether a document is encoded whole or in pieces; its checksum and counts too."""
    texts = ["before", " ".join(sample_texts()[:30]), "after", "x" * 5000, " ".join(sample_texts()[30:60])]
    ids = [f"id{number}" for number in range(5)]
    source = write_parquet(tmp_path / "in.parquet", 2, text=texts, id=ids)
    whole = preprocess([source], tokenizer_folder("bpe"), tmp_path / "whole")
    seen = []
    monkeypatch.setattr(task, "BATCH_BYTES", 1000)
    monkeypatch.setattr(task, "pieces", lambda *args: seen.append(list(pieces(*args))) or iter(seen[-1]))
    cut = preprocess([source], tokenizer_folder("bpe"), tmp_path / "cut")
    assert [len(parts) > 10 for parts in seen] == [True, False, True]
    assert read_documents(tmp_path / "cut") == [[*row, 0] for row in reference_ids("bpe", texts)]
    for manifest in (whole, cut):
        manifest["outputs"][0]["bin"].pop("file"), manifest["outputs"][0]["idx"].pop("file")
    assert whole == cut and np.fromfile(tmp_path / "cut.bin", "<u2").size == whole["tokens"]
