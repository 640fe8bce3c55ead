"""Train a small byte-level BPE: for laptop runs, where a 50k vocabulary would make the model all logits."""

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_act.data.staging import check_absent, publish_folder, staging_folder
from megatron_act.data.tokenizer import DEFAULT_EOD
from megatron_act.errors import UserError

BYTES = 256  # every byte is a token, so any text can be encoded


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    output_dir: str | Path,
    *,
    eod_token: str = DEFAULT_EOD,
    overwrite: bool = False,
) -> int:
    """Learn a byte-level BPE (GPT-2's pre-tokenization) and save it as a folder.

    The folder (`tokenizer.json`, `tokenizer_config.json`) is what transformers' AutoTokenizer.from_pretrained,
    Megatron's ``--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR`` and `preprocess` load. The same texts in
    the same order give the same bytes.

    Args:
        texts: the corpus, read once.
        vocab_size: tokens wanted, the 256 bytes and the EOD token (id 0) included.
        output_dir: made, with its parents.
        eod_token: end of document; also bos, eos and pad in the config.
        overwrite: replace an existing folder.

    Returns:
        The vocabulary's size: less than asked for where the corpus has no more repeated pairs.

    Raises:
        UserError: vocab_size below 257, no text, or an output that exists or cannot be written.
    """
    final = Path(output_dir)
    if vocab_size <= BYTES:
        raise UserError(
            f"expected a vocabulary of at least {BYTES + 1} (bytes and EOD), got {vocab_size}; ask for more"
        )
    check_absent([final], overwrite)
    tokenizer = _train(texts, vocab_size, eod_token)
    with staging_folder(final) as staging:
        folder = staging / "tokenizer"
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(_config(eod_token), indent=2) + "\n", encoding="utf-8")
        publish_folder(folder, final)
    return tokenizer.get_vocab_size()


def _train(texts: Iterable[str], vocab_size: int, eod_token: str):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eod_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(texts)
    tokenizer.train_from_iterator(counted, trainer)
    if not counted.seen:
        raise UserError("expected texts to learn the vocabulary from, got none; check the input and its filters")
    return tokenizer


class _Counted:
    """An iterable that remembers how many items it gave."""

    def __init__(self, items: Iterable[str]) -> None:
        self.items, self.seen = items, 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        for item in self.items:
            self.seen += 1
            yield item


def _config(eod_token: str) -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod_token,
        "eos_token": eod_token,
        "pad_token": eod_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 40,  # a model's context is the model's business
    }
