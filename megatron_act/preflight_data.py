"""Token files and tokenizer: whole, and made for each other."""

import contextlib
import functools
import io
from argparse import Namespace
from pathlib import Path

import numpy as np
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from megatron_act import gpt_data
from megatron_act.data.checksum import file_sha256
from megatron_act.data.indexed import bin_path, read_index
from megatron_act.data.manifest import manifest_of
from megatron_act.errors import UserError
from megatron_act.preflight_finding import Finding, caught, failed


def checks(args: Namespace) -> list[Finding]:
    """The tokenizer against the model's rows and the data, and each local file of tokens.

    Args:
        args: Megatron's parsed arguments.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            vocab_size = build_tokenizer(Namespace(**vars(args))).vocab_size  # it writes into its arguments
    except Exception as error:
        remedy = "give its file or folder (--tokenizer-type, --tokenizer-model)"
        return [failed("tokenizer", "one that loads", f"{type(error).__name__}: {error}", remedy)]
    return [_vocabulary(args, vocab_size), *_token_files(args, vocab_size)]


def _vocabulary(args: Namespace, vocab_size: int) -> Finding:
    padded = args.padded_vocab_size
    if padded and padded < vocab_size:
        remedy = "raise --padded-vocab-size or use the config's tokenizer"
        return failed("tokenizer", f"at most {padded} tokens (--padded-vocab-size)", str(vocab_size), remedy)
    return Finding("tokenizer", f"{vocab_size} tokens{f' in {padded} rows' if padded else ''}")


def _token_files(args: Namespace, vocab_size: int) -> list[Finding]:
    prefixes = gpt_data.data_prefixes(args)
    if args.mock_data or not prefixes:
        remedy = "give --data-path, --train-data-path and --valid-data-path, or --mock-data"
        return [Finding("data", "mock data") if args.mock_data else failed("data", "token files", "none", remedy)]
    findings = [caught("token ids", functools.partial(_ids, args, vocab_size))]
    for prefix in prefixes:
        findings.append(caught(f"data {prefix}", functools.partial(whole, prefix)))
        findings.append(caught(f"tokenizer of {prefix}", functools.partial(made_by, prefix, args, vocab_size)))
    return findings


def _ids(args: Namespace, vocab_size: int) -> str:
    gpt_data.check_data(args, vocab_size)
    return f"below {vocab_size} in the first {gpt_data.SAMPLED_TOKENS:,} tokens"


def whole(prefix: str) -> str:
    """Checks that ``.idx`` is as long as its header says and ``.bin`` as its lengths say.

    Raises:
        UserError: a missing or cut file.
    """
    part, dtype = read_index(prefix)
    tokens = sum(int(lengths.sum(dtype=np.int64)) for lengths in part.lengths.chunks())
    expected, got = tokens * dtype.itemsize, bin_path(prefix).stat().st_size
    if expected != got:
        raise UserError(
            f"expected {expected:,} bytes in {bin_path(prefix)}, which its .idx implies, got {got:,}: copy it again"
        )
    return f"{tokens:,} tokens of {dtype.name}, {part.lengths.count:,} sequences"


def made_by(prefix: str, args: Namespace, vocab_size: int) -> str:
    """Compares the manifest's tokenizer with the run's; where none is recorded there is only the vocabulary to go by.

    Raises:
        UserError: another tokenizer made the data.
    """
    manifest = manifest_of(prefix)
    if manifest is None:
        return "no manifest: the vocabulary alone is compared"
    wanted, made = manifest["vocab_size"], manifest["tokenizer"]
    if wanted is not None and wanted > vocab_size:
        raise UserError(
            f"expected a tokenizer of {wanted} tokens, which made {prefix}, got one of {vocab_size}: give that one "
            "(--tokenizer-model)"
        )
    if made is None:  # of merged parts that differ in it or do not say
        return "no tokenizer recorded: the vocabulary alone is compared"
    file = _tokenizer_file(args.tokenizer_model, Path(made["file"]).name)
    if file is None:
        return f"vocabulary of {wanted}"
    if (got := file_sha256(file)) != made["sha256"]:
        raise UserError(
            f"expected the tokenizer that made {prefix} (sha256 {made['sha256'][:12]}), got {file} ({got[:12]}): give "
            "that one (--tokenizer-model)"
        )
    return f"the same file, sha256 {got[:12]}"


def _tokenizer_file(model: str | None, name: str) -> Path | None:
    path = Path(model).expanduser() if model else None
    candidates = [path, path / name] if path else []
    return next((candidate for candidate in candidates if candidate.is_file()), None)
