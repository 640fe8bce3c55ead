"""Check a data set against its manifest, and its parts against each other: files, counts, tokens, sources."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_act.data.checksum import file_checksum, file_sha256
from megatron_act.data.hub import is_hub
from megatron_act.data.indexed import Part, index_checksum, read_index
from megatron_act.data.manifest import FORMAT, read_manifest
from megatron_act.errors import UserError

BLOCK_TOKENS = 4 << 20


@dataclass
class Findings:
    """What was found: `problems`, what could not be looked at, and how many things were compared."""

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    compared: int = 0

    def same(self, what: str, expected: object, got: object) -> bool:
        """Compare, and note a difference."""
        self.compared += 1
        if expected != got:
            self.problems.append(f"{what}: expected {expected}, got {got}")
        return expected == got


def verify(prefix: str | Path) -> Findings:
    """Recheck everything that `P.manifest.json` says.

    Sources and the tokenizer are compared where they still are; files of the hub are not fetched again.

    Raises:
        UserError: no manifest at P, or one that is not ours or lacks something.
    """
    path = Path(f"{prefix}.manifest.json")
    try:
        manifest = read_manifest(path)
        known = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"expected a manifest at {path}, got {error!r}; give the --output-prefix of a run") from error
    if known != FORMAT:
        raise UserError(f"expected the format {FORMAT} in {path}, got {known}; use the version that wrote it")
    try:
        return _check(path.parent, manifest)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"expected a whole manifest at {path}, got {error!r} in reading it; restore it") from error


def _check(folder: Path, manifest: dict) -> Findings:
    findings = Findings()
    for output in manifest["outputs"]:
        _check_output(findings, folder, output, manifest)
    _check_totals(findings, manifest)
    _check_origins(findings, manifest)
    return findings


def _check_output(findings: Findings, folder: Path, output: dict, manifest: dict) -> None:
    for kind in ("bin", "idx"):
        if not _check_file(findings, folder / output[kind]["file"], output[kind]):
            return
    try:
        part, dtype = read_index(folder / output["bin"]["file"].removesuffix(".bin"))
    except UserError as error:
        findings.problems.append(str(error))
        return
    name = output["idx"]["file"]
    findings.same(f"{name}, dtype", manifest["dtype"], dtype.name)
    findings.same(f"{name}, documents", output["documents"], part.marks.count - 1)
    findings.same(
        f"{name}, checksum of what its lengths imply", output["idx"]["checksum"], index_checksum([part], dtype)
    )
    tokens = sum(int(lengths.sum(dtype=np.int64)) for lengths in part.lengths.chunks())
    findings.same(f"{name}, tokens", output["tokens"], tokens)
    if findings.same(f"{output['bin']['file']}, bytes", tokens * dtype.itemsize, part.tokens.stat().st_size):
        _check_tokens(findings, part, dtype, manifest)


def _check_file(findings: Findings, path: Path, entry: dict) -> bool:
    """Presence, size and checksum."""
    if not path.is_file():
        findings.problems.append(f"{path}: expected a file, got none")
        return False
    same_size = findings.same(f"{path}, bytes", entry["bytes"], path.stat().st_size)
    return same_size and findings.same(f"{path}, checksum", entry["checksum"], file_checksum(path))


def _check_tokens(findings: Findings, part: Part, dtype: np.dtype, manifest: dict) -> None:
    """Every id is in the vocabulary, every document ends with EOD."""
    if manifest["vocab_size"] is None:
        return
    tokens = np.memmap(part.tokens, dtype, "r")
    blocks = range(0, len(tokens), BLOCK_TOKENS)
    outside = sum(int((tokens[at : at + BLOCK_TOKENS] >= manifest["vocab_size"]).sum()) for at in blocks)
    findings.same(f"{part.tokens.name}, ids outside the vocabulary", 0, outside)
    open_ended = sum(int((tokens[last] != manifest["eod_id"]).sum()) for last in _last_tokens(part))
    findings.same(f"{part.tokens.name}, sequences that do not end with EOD", 0, open_ended)


def _last_tokens(part: Part) -> Iterator[np.ndarray]:
    """Places of the sequences' last tokens."""
    end = 0
    for lengths in part.lengths.chunks():
        ends = end + np.cumsum(lengths, dtype=np.int64)
        end = int(ends[-1])
        yield ends - 1


def _check_totals(findings: Findings, manifest: dict) -> None:
    documents, outputs = manifest["documents"], manifest["outputs"]
    findings.same("documents kept, over all outputs", documents["kept"], sum(item["documents"] for item in outputs))
    findings.same("tokens, over all outputs", manifest["tokens"], sum(item["tokens"] for item in outputs))
    if "read" in documents:
        dropped = sum(documents["dropped"].values())
        findings.same("rows kept and dropped", documents["read"], documents["kept"] + dropped)
        findings.same("rows of all sources", documents["read"], sum(item["rows"] for item in manifest["sources"]))


def _check_origins(findings: Findings, manifest: dict) -> None:
    tokenizer = manifest.get("tokenizer")
    if tokenizer and Path(tokenizer["file"]).is_file():
        findings.same(f"{tokenizer['file']}, sha256", tokenizer["sha256"], file_sha256(Path(tokenizer["file"])))
    elif tokenizer:
        findings.unchecked.append(tokenizer["file"])
    for source in manifest.get("sources", ()):
        if is_hub(source["file"]) or not Path(source["file"]).is_file():
            findings.unchecked.append(source["file"])
        else:
            _check_file(findings, Path(source["file"]), source)
