"""Every format of tokenizer gives its own library's ids, on real text and on the hardest there is, by fastokens too."""

import base64
import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import regex
from data_support import (
    MISTRAL,
    TOKENIZERS,
    encoded,
    reference_ids,
    reference_tokenizer,
    sample_texts,
    tokenizer_folder,
)
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron_act.data.encoders import Encoder
from megatron_act.data.probe import LITERALS, PLANES, adversarial_texts, differences
from megatron_act.data.ranked_bpe import PATTERNS
from megatron_act.data.tokenizer import TokenizerInfo, load_encoder, open_tokenizer
from megatron_act.errors import UserError

EOD = {"bpe": "<|endoftext|>", "gpt2": "<|endoftext|>", "deepseek": "<\uff5cend\u2581of\u2581sentence\uff5c>"}


@cache
def opened(name: str, encoder: str = "auto") -> tuple[TokenizerInfo, Encoder]:
    pattern = "gpt2" if name == "ranks" else None
    path = tokenizer_folder(name) / "gpt2.tiktoken" if name == "ranks" else tokenizer_folder(name)
    info = open_tokenizer(path, eod_token=EOD.get(name), encoder=encoder, pattern=pattern)
    return info, load_encoder(info)


def direct_tekken() -> Callable[[str], list[int]]:
    """Mistral's own tokenizer."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tokenizer = Tekkenizer.from_file(MISTRAL / "tekken_240718.json")
    return lambda text: tokenizer.encode(text, bos=False, eos=False)


def direct_llama() -> Callable[[str], list[int]]:
    """SentencePiece itself."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL / "tokenizer.model.v1")).encode


def direct_ranks() -> Callable[[str], list[int]]:
    """GPT-2's ids by Hugging Face's library: nothing of ranks."""
    return lambda text: reference_ids("gpt2", [text])[0]


DIRECT = {"tekken.json": direct_tekken, "llama": direct_llama, "ranks": direct_ranks}
OWN = {"tekken.json": "tiktoken", "llama": "sentencepiece", "ranks": "tiktoken"}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_same_ids_on_the_sample(name: str) -> None:
    expected = reference_ids(name, sample_texts()[:3000])
    info, fast = opened(name)
    assert info.encoder == fast.name == "fastokens"
    assert encoded(fast, sample_texts()[:3000]) == expected
    assert encoded(opened(name, "tokenizers")[1], sample_texts()[:300]) == expected[:300]


@pytest.mark.parametrize("encoder", ["fastokens", "tokenizers"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_same_ids_on_adversarial_text(name: str, encoder: str) -> None:
    texts = adversarial_texts(count=1500, seed=7)
    got, expected = encoded(opened(name, encoder)[1], texts), reference_ids(name, texts)
    assert [text for text, ours, theirs in zip(texts, got, expected, strict=True) if ours != theirs] == []


@pytest.mark.parametrize("name", DIRECT)
def test_other_formats_give_their_own_library_s_ids(name: str) -> None:
    """Also by fastokens, on the sample and on adversarial text."""
    texts = sample_texts()[:400] + adversarial_texts(count=200, seed=11)
    direct = DIRECT[name]()
    expected = [direct(text) for text in texts]
    for encoder in ("fastokens", OWN[name]):
        info, own = opened(name, encoder)
        assert info.encoder == own.name == encoder
        assert [i for i, pair in enumerate(zip(encoded(own, texts), expected, strict=True)) if pair[0] != pair[1]] == []
    assert opened(name)[0].encoder == "fastokens"  # what auto decides


def test_adversarial_text_is_what_it_says() -> None:
    """All planes of Unicode, no surrogate, every literal; the same text for the same arguments."""
    texts = adversarial_texts(count=1500, seed=7)
    assert texts == adversarial_texts(count=1500, seed=7) != adversarial_texts(count=1500, seed=8)
    seen = {ord(letter) for text in texts for letter in text}
    assert all(any(low <= code <= high for code in seen) for low, high in PLANES)
    assert not any(0xD800 <= code < 0xE000 for code in seen)
    assert all(any(literal in text and literal != text for text in texts) for literal in LITERALS)


def test_a_difference_is_noticed() -> None:
    """An encoder that is wrong on runs of 17 spaces only is found out by name."""

    class Wrong:
        name = "wrong"

        def encode(self, texts):  # type: ignore[no-untyped-def]
            return opened("bpe")[1].encode([text.replace(" " * 17, " " * 16) for text in texts])

    found = differences(Wrong(), opened("bpe")[1], adversarial_texts())
    assert found and all(" " * 17 in text for text in found)


@pytest.mark.parametrize("name", [*TOKENIZERS, *DIRECT])
def test_literals_stay_text(name: str) -> None:
    """No special token's id comes out of a text; where ids decode, they decode to the text that went in."""
    info, encoder = opened(name)
    literals = [*LITERALS, info.eod_token, f"a{info.eod_token}b"]
    for text, ids in zip(literals, encoded(encoder, literals), strict=True):
        assert ids and info.eod_id not in ids
        if name in TOKENIZERS:
            special = {i for i, token in reference_tokenizer(name).get_added_tokens_decoder().items() if token.special}
            assert info.eod_id in special and not special & set(ids)
            assert reference_tokenizer(name).decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("name", "kind", "size", "eod_token", "eod_id"),
    [
        ("bpe", "tokenizer.json", 4096, "<|endoftext|>", 0),
        ("gpt2", "tokenizer.json", 50257, "<|endoftext|>", 50256),
        ("deepseek", "tokenizer.json", 129280, EOD["deepseek"], 1),
        ("tekken.json", "tekken", 131072, "</s>", 2),
        ("llama", "sentencepiece", 32000, "</s>", 2),
        ("ranks", "tiktoken", 50257, "<|endoftext|>", 50256),
    ],
)
def test_vocabulary_and_eod(name: str, kind: str, size: int, eod_token: str, eod_id: int) -> None:
    info = opened(name)[0]
    assert (info.kind, info.vocab_size, info.eod_token, info.eod_id) == (kind, size, eod_token, eod_id)


def test_eod_comes_from_the_config(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder("bpe") / "tokenizer.json"))
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    info = open_tokenizer(tmp_path)
    assert (info.eod_token, info.eod_id) == ("<stop>", 4096)
    assert open_tokenizer(tmp_path, eod_token="<|endoftext|>").eod_id == 0


@pytest.mark.parametrize("encoder", ["fastokens", "tokenizers"])
def test_truncation_and_padding_in_the_file_are_ignored(encoder: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder("bpe") / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["one", sample_texts()[0]]
    assert encoded(load_encoder(open_tokenizer(tmp_path, encoder=encoder)), texts) == reference_ids("bpe", texts)


CUTS = {
    "gpt2": ["It", "'s", " 12345", " THEY", "'", "LL", " Ab", "!", "\n\n ", " b", "/", "\n"],
    "cl100k_base": ["It", "'s", " ", "123", "45", " THEY", "'LL", " Ab", "!\n\n", " ", " b", "/\n"],
    "o200k_base": ["It's", " ", "123", "45", " THEY'LL", " Ab", "!\n\n", " ", " b", "/\n"],
    "llama3": ["It", "'s", " ", "123", "45", " THEY", "'LL", " Ab", "!\n\n", " ", " b", "/\n"],
    "qwen": ["It", "'s", " ", "1", "2", "3", "4", "5", " THEY", "'LL", " Ab", "!\n\n", " ", " b", "/\n"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_named_patterns_cut_as_the_encodings_do(pattern: str) -> None:
    """fastokens agrees with tiktoken on each (else the encoder would be another), and no token crosses a cut."""
    info = open_tokenizer(tokenizer_folder("ranks") / "gpt2.tiktoken", pattern=pattern)
    assert (info.encoder, info.eod_id) == ("fastokens", PATTERNS[pattern].eod_id)
    text = "It's 12345 THEY'LL Ab!\n\n  b/\n"
    assert regex.findall(PATTERNS[pattern].regex, text) == CUTS[pattern]
    together, apart = encoded(load_encoder(info), [text])[0], encoded(load_encoder(info), CUTS[pattern])
    assert together == [i for piece in apart for i in piece]


def _gpt2_ranks() -> dict[bytes, int]:
    lines = (tokenizer_folder("ranks") / "gpt2.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def test_a_pattern_of_ones_own() -> None:
    """Words are runs of anything but spaces; the EOD takes the first id after the ranks, or a given one."""
    file = tokenizer_folder("ranks") / "gpt2.tiktoken"
    info = open_tokenizer(file, pattern=r"\S+|\s+")
    assert (info.eod_id, info.vocab_size, info.pattern) == (50256, 50257, r"\S+|\s+")
    ranks = _gpt2_ranks()
    assert encoded(load_encoder(info), ["the the"]) == [[ranks[b"the"], ranks[b" "], ranks[b"the"]]]
    assert open_tokenizer(file, pattern="gpt2", eod_id=60000).vocab_size == 60001
    with pytest.raises(UserError, match=r"expected an end of document beyond the \d+ ranks of .*, got 7, .*--eod-id"):
        open_tokenizer(file, pattern="gpt2", eod_id=7)


def _words(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _word_level() -> Tokenizer:
    tokenizer = _words({"[UNK]": 0, "</s>": 1, "a": 2})
    tokenizer.add_special_tokens(["[UNK]", "</s>"])
    return tokenizer


def _unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0), ("b", -2.0), (" ", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def _not_special() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder("bpe") / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("</s>", special=False, normalized=False)])
    return tokenizer


def _another_leaks() -> Tokenizer:
    tokenizer = _words({"[UNK]": 0, "<pad>": 1, "a": 2})
    tokenizer.add_special_tokens(["[UNK]", "<pad>", "</s>"])
    return tokenizer


def _unknown_is_eod() -> Tokenizer:
    return Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))


LEAKING = {
    _word_level: r"the end of document '</s>' \(id 1\) from the text '</s>'",
    _unigram: r"the end of document '</s>' \(id 1\) from the text '</s>'",
    _not_special: r"the end of document '</s>' \(id 4096\) from the text '</s>'",
    _another_leaks: r"a special token \(id 1\) from the text '<pad>'",
    _unknown_is_eod: r"the end of document '</s>' \(id 0\) from the text '",
}


@pytest.mark.parametrize("make", LEAKING)
def test_a_tokenizer_that_finds_special_tokens_in_text_is_refused(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    """Whatever the file says of it: the model's vocabulary holds the literal, or nothing hides it."""
    make().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="to stay text, got " + LEAKING[make]):
        open_tokenizer(tmp_path, eod_token="</s>")


def test_an_ordinary_token_is_no_end_of_document() -> None:
    """Of any format: it comes out of text."""
    for name in ("bpe", "llama", "tekken.json"):
        with pytest.raises(UserError, match=r"to stay text, got the end of document 'the' \(id \d+\)"):
            open_tokenizer(tokenizer_folder(name), eod_token="the")


def test_what_unknown_characters_give_is_no_literal_s_doing(tmp_path: Path) -> None:
    tokenizer = _words({"[UNK]": 0, "a": 1})
    tokenizer.add_special_tokens(["[UNK]", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    info = open_tokenizer(tmp_path, eod_token="</s>", encoder="tokenizers")
    assert (info.eod_id, encoded(load_encoder(info), ["a </s> [UNK]"])) == (2, [[1, 0, 0]])


REFUSED: dict[str, tuple[dict, str]] = {
    "ranks": ({}, "expected --pattern with the rank file"),
    "bpe": ({"encoder": "tiktoken"}, "expected --encoder auto, fastokens or tokenizers"),
    "llama": ({"eod_token": "<nothing>"}, "expected the end-of-document token '<nothing>'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    options, message = REFUSED[name]
    path = tokenizer_folder(name) / "gpt2.tiktoken" if name == "ranks" else tokenizer_folder(name)
    with pytest.raises(UserError, match=message):
        open_tokenizer(path, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"aGk= 0\nYQ== 2\n", "expected ranks from 0 without a gap"),
        (b"aGk= 0\nwhat is this\n", "expected a token and a rank in each line"),
        (b'{"config": {"default_num_special_tokens": 1000}}', "expected a tekken.json"),
        (b"\x00\x01\x02 binary", "expected a tokenizer.json, tekken.json, SentencePiece model or rank file"),
    ],
)
def test_broken_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_tokenizer(tmp_path / "tokenizer", pattern="gpt2")


def test_fallback_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A word-level model, which fastokens does not run, goes to tokenizers with one warning that says so."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with caplog.at_level(logging.WARNING):
        info = open_tokenizer(tmp_path / "tokenizer.json", eod_token="</s>")
    assert info.encoder == "tokenizers"
    assert [record.message.split(": ")[0] for record in caplog.records] == [
        "encoding with the slower tokenizers library"
    ]
    assert encoded(load_encoder(info), ["b a", "c"]) == [[3, 2], [0]]
    with pytest.raises(UserError, match="expected a tokenizer that fastokens can run"):
        open_tokenizer(tmp_path / "tokenizer.json", eod_token="</s>", encoder="fastokens")


def test_a_sentencepiece_model_that_rewrites_text_stays_with_its_library(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A unigram model with NFKC, trained here: not converted, and the ids are SentencePiece's."""
    import sentencepiece

    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample_texts()[:200]), model_writer=file, vocab_size=400, minloglevel=2
        )
    with caplog.at_level(logging.WARNING):
        info = open_tokenizer(tmp_path)
    assert info.encoder == "sentencepiece" and "only BPE models" in caplog.text
    texts = ["\ufb01ne   print", *sample_texts()[:20]]
    direct = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert encoded(load_encoder(info), texts) == direct.encode(texts)
