"""What a data set was made from and by, as JSON: enough to make it again and to check it."""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from megatron_act.data.filters import Filters
from megatron_act.data.indexed import token_dtype
from megatron_act.data.source import Source
from megatron_act.data.split import Split
from megatron_act.data.tokenizer import TokenizerInfo

FORMAT = "megatron_act.dataset/1"
PACKAGES = ("megatron-act", "numpy", "pyarrow", "fastokens", "tokenizers")


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Sequence[Path], threads: int, progress: bool) -> list[str]:
    """`file_sha256` of each path, `threads` at a time (hashing releases the interpreter lock)."""
    with ThreadPoolExecutor(threads) as pool:
        checksums = pool.map(file_sha256, paths)
        return list(tqdm(checksums, "checksums", len(paths), unit="file", disable=None if progress else True))


def build_manifest(
    outputs: Sequence[dict],
    sources: Sequence[Source],
    checksums: Sequence[str],
    rows: int,
    dropped: Counter,
    tokenizer: TokenizerInfo,
    filters: Filters,
    split: Split | None,
    command: str | None,
) -> dict:
    """The manifest of one run.

    Keys: `format`; `outputs` (per part: name, bin and idx with file, bytes, sha256; documents, tokens); `documents`
    (read, kept, dropped by reason); `tokens`; `vocab_size`; `eod_token`; `eod_id`; `dtype`; `tokenizer` (file, sha256,
    encoder); `special_tokens_in_text`; `filters`; `split`; `sources` (file, bytes, sha256, rows); `command`;
    `versions`.
    No time, host or number of workers of its own: equal input gives an equal manifest.
    """
    reasons = {reason: count for reason, count in sorted(dropped.items()) if count}
    hashed = zip(sources, checksums, strict=True)
    return {
        "format": FORMAT,
        "outputs": list(outputs),
        "documents": {"read": rows, "kept": sum(item["documents"] for item in outputs), "dropped": reasons},
        "tokens": sum(item["tokens"] for item in outputs),
        "vocab_size": tokenizer.vocab_size,
        "eod_token": tokenizer.eod_token,
        "eod_id": tokenizer.eod_id,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {
            "file": str(tokenizer.file),
            "sha256": file_sha256(tokenizer.file),
            "encoder": tokenizer.encoder,
        },
        "special_tokens_in_text": "encoded as plain text",
        "filters": asdict(filters),
        "split": dict(zip(split.names, split.shares, strict=True)) if split else None,
        "sources": [
            {"file": str(source.path), "bytes": source.size_bytes, "sha256": checksum, "rows": source.rows}
            for source, checksum in hashed
        ],
        "command": command,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # run from a clone without installing, or an optional encoder


def write_manifest(path: Path, manifest: dict) -> None:
    """Write it indented, keys in the documented order."""
    path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> dict:
    """Read a manifest back."""
    return json.loads(path.read_text(encoding="utf-8"))
