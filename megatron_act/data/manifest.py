"""What a data set was made from and by, as JSON: enough to make it again and to check it."""

import contextlib
import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from megatron_act.data.indexed import token_dtype
from megatron_act.data.plan import Plan

FORMAT = "megatron_act.dataset/2"
PACKAGES = ("megatron-act", "datatrove", "numpy", "pyarrow", "fastokens", "tokenizers", "tiktoken", "sentencepiece")


def build_manifest(plan: Plan, outputs: Sequence[dict], results: Sequence[dict]) -> dict:
    """The manifest of one run.

    Keys: `format`; `outputs` (per pair of files: name of the part; bin and idx with file, bytes, checksum; documents,
    tokens); `documents` (read, kept, dropped by reason); `tokens`; `vocab_size`; `eod_token`; `eod_id`; `dtype`;
    `tokenizer` (file, kind, pattern, sha256, encoder: the library that ran it); `special_tokens_in_text`;
    `text_column`; `filters`; `split`; `sources` (file, bytes, checksum, rows); `command`; `versions`.
    Checksums are `xxh3_128:...`; of a file of the hub `sha256:...`, the hub's own.
    No time, host, number of tasks or of workers of its own: equal input gives an equal manifest.
    """
    tokenizer, split = plan.job.tokenizer, plan.job.split
    kept = sum(item["documents"] for item in outputs)
    return {
        "format": FORMAT,
        "outputs": list(outputs),
        "documents": {"read": sum(result["rows"] for result in results), "kept": kept, "dropped": all_dropped(results)},
        "tokens": sum(item["tokens"] for item in outputs),
        "vocab_size": tokenizer.vocab_size,
        "eod_token": tokenizer.eod_token,
        "eod_id": tokenizer.eod_id,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": {
            "file": tokenizer.file,
            "kind": tokenizer.kind,
            "pattern": tokenizer.pattern,
            "sha256": tokenizer.sha256,
            "encoder": tokenizer.encoder,
        },
        "special_tokens_in_text": "encoded as plain text",
        "text_column": plan.job.columns.text,
        "filters": plan.job.filters.as_json(),
        "split": dict(zip(split.names, split.shares, strict=True)) if plan.job.columns.id else None,
        "sources": _sources(plan, results),
        "command": plan.command,
        "versions": versions(),
    }


def all_dropped(results: Sequence[dict]) -> dict[str, int]:
    """Rows left out by all tasks, by reason, sorted."""
    return dict(sorted(sum((Counter(result["dropped"]) for result in results), Counter[str]()).items()))


def _sources(plan: Plan, results: Sequence[dict]) -> list[dict]:
    """File, bytes, checksum and rows of each source, from what the tasks saw of it."""
    rows: Counter[int] = Counter()
    checksums: dict[int, str] = {}
    for result in results:
        for number, seen in result["sources"].items():
            rows[int(number)] += seen["rows"]
            checksums[int(number)] = seen["checksum"] or checksums.get(int(number), "")
    return [
        {"file": source.path, "bytes": source.size_bytes, "checksum": checksums[number], "rows": rows[number]}
        for number, source in enumerate(plan.sources)
    ]


def versions() -> dict[str, str | None]:
    """Of Python and the packages that touch the data; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return None  # run from a clone without installing, or an optional encoder
    # `version` would parse each description as an email: 10 ms for all
    line = re.search(
        r"^Version: *(.+)$", found.read_text("METADATA") or found.read_text("PKG-INFO") or "", re.MULTILINE
    )
    return line[1] if line else None


def write_manifest(path: Path, manifest: dict) -> None:
    """Write it indented, keys in the documented order."""
    path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> dict:
    """Read a manifest back."""
    return json.loads(path.read_text(encoding="utf-8"))


def manifest_of(prefix: str | Path) -> dict | None:
    """The manifest in the same folder that lists `PREFIX.bin`: its own, or that of its split or shards.

    Files of that name that are no manifests of ours, or are broken, are passed over.
    """
    prefix = Path(prefix)
    found = (_listing(path, prefix.name + ".bin") for path in sorted(prefix.parent.glob("*.manifest.json")))
    return next((manifest for manifest in found if manifest), None)


def _listing(path: Path, name: str) -> dict | None:
    """The manifest at a path if it is ours and lists a file."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        manifest = read_manifest(path)
        if manifest["format"] == FORMAT and name in [output["bin"]["file"] for output in manifest["outputs"]]:
            return manifest
    return None
