"""What a data set's manifest adds to its two files: checksums to compare, and the tokenizer to read it with."""

import contextlib
import json
from pathlib import Path
from typing import Any

from megatron_act.data.checksum import file_sha256
from megatron_act.data.inspect_text import Decoder, NoDecoder, open_decoder
from megatron_act.data.manifest import read_manifest
from megatron_act.data.verify import verify as recheck
from megatron_act.errors import UserError

SUFFIX = ".manifest.json"


def find(prefix: str) -> tuple[Path, dict[str, Any]] | None:
    """The manifest beside a data set that names its `.bin`: path and content.

    It is `P.manifest.json`, or for a part or shard `P_NAME` that of P.

    Raises:
        UserError: a manifest of such a name that cannot be read.
    """
    base = Path(prefix)
    for path in sorted(base.parent.glob("*" + SUFFIX)):
        if base.name.startswith(path.name.removesuffix(SUFFIX)):
            manifest = _read(path)
            with contextlib.suppress(KeyError, TypeError, AttributeError):  # another's file of such a name
                if any(output["bin"]["file"] == base.name + ".bin" for output in manifest["outputs"]):
                    return path, manifest
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_manifest(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"expected a manifest in JSON, got {path} ({error}); restore it or build anew") from error


def verify(prefix: str) -> str:
    """Compare the data set, and whatever else its manifest describes, with it; one line that says that all agrees.

    Raises:
        UserError: no manifest, or the first difference and how many there are.
    """
    found = find(prefix)
    if found is None:
        raise UserError(f"--verify: expected {prefix}{SUFFIX}, or one that names {prefix}.bin, got none; leave it out")
    path = found[0]
    findings = recheck(str(path).removesuffix(SUFFIX))
    if findings.problems:
        many = f" (and {len(findings.problems) - 1} more)" if len(findings.problems) > 1 else ""
        raise UserError(f"{path}: {findings.problems[0]}{many}; these are not the files that it describes")
    gone = f"; no longer there: {', '.join(findings.unchecked)}" if findings.unchecked else ""
    return f"{path}: all as described ({findings.compared} comparisons{gone})"


def decoder(prefix: str, tokenizer: str | None, ids: int) -> Decoder:
    """The decoder of the tokenizer given, else of the manifest's, if its file is there and unchanged, else none.

    Args:
        ids: one more than the largest id of the data.

    Raises:
        UserError: not a tokenizer, or one with fewer tokens than the data has.
    """
    if tokenizer is not None:
        return _fitting(open_decoder(tokenizer), ids, f"{prefix}.bin")
    found = find(prefix)
    recorded = (found[1].get("tokenizer") if found else None) or {}
    file = Path(recorded.get("file", ""))
    if file.is_file() and file_sha256(file) == recorded.get("sha256"):
        return _fitting(open_decoder(file, recorded.get("pattern")), ids, f"{prefix}.bin")
    return NoDecoder()


def _fitting(decoder: Decoder, ids: int, file: str) -> Decoder:
    if ids > decoder.size:
        raise UserError(
            f"expected ids below {decoder.size:,} (the tokenizer's), got {ids - 1:,} in {file}; give the tokenizer "
            "that made the data"
        )
    return decoder
