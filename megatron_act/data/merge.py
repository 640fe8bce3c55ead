"""Data sets of Megatron's one after the other as one: what IndexedDatasetBuilder.add_index does, in bounded memory."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_act.data.checksum import file_checksum
from megatron_act.data.indexed import Part, bin_path, idx_path, read_index, write_pair
from megatron_act.data.manifest import FORMAT, manifest_of, versions, write_manifest
from megatron_act.data.plan import WHOLE, final_paths, outputs
from megatron_act.data.staging import check_absent, publish
from megatron_act.data.work import Work, finish, locked, work_folder
from megatron_act.errors import UserError

SHARED = ("vocab_size", "eod_token", "eod_id", "tokenizer")  # told of the whole where all parts agree


def merge(
    prefixes: Sequence[str | Path], output_prefix: str | Path, *, overwrite: bool = False, command: str | None = None
) -> dict:
    """Write `P.bin`, `P.idx` and `P.manifest.json` from existing pairs, in the order given.

    The output is held meanwhile, by the folder `P.work`, which a tokenization would hold too.

    Args:
        prefixes: each a path without `.bin` and `.idx`; made by this tool or any other.
        output_prefix: P.
        overwrite: replace an existing output.
        command: recorded in the manifest.

    Returns:
        The manifest: `outputs`, `documents` {"kept"}, `tokens`, `dtype`, `merged_from` (prefix; bin and idx with bytes
        and checksum); `vocab_size`, `eod_token`, `eod_id`, `tokenizer` where the parts' own manifests agree, else null.

    Raises:
        UserError: no such pair, different dtypes, a `.bin` of another length than its index says, or an output that
            exists, cannot be written, is another run's at this moment or that of an unfinished one.
    """
    prefix = Path(output_prefix)
    finals = final_paths(str(prefix), outputs(str(prefix), None, None))
    opened = [read_index(item) for item in prefixes]
    kinds = {dtype.name for _, dtype in opened}
    if len(kinds) != 1:
        raise UserError(f"expected data sets of one dtype, got {', '.join(sorted(kinds)) or 'none'}; build them alike")
    parts, dtype = [part for part, _ in opened], opened[0][1]
    tokens = sum(_tokens(part, dtype.itemsize) for part in parts)
    _check_no_run(prefix)
    with locked(prefix) as work:
        check_absent(finals, overwrite)
        staging = work.folder / "out"
        shutil.rmtree(staging, ignore_errors=True)  # of a merge that was killed
        staging.mkdir()
        files = write_pair(staging / prefix.name, parts, dtype)
        documents = sum(part.marks.count - 1 for part in parts)
        manifest = {
            "format": FORMAT,
            "outputs": [{"name": WHOLE.names[0], "documents": documents, "tokens": tokens, **files}],
            "documents": {"kept": documents},
            "tokens": tokens,
            "dtype": dtype.name,
            **_shared(prefixes),
            "merged_from": [_identity(item) for item in prefixes],
            "command": command,
            "versions": versions(),
        }
        staged = [staging / final.name for final in finals]
        write_manifest(staged[-1], manifest)
        publish(staged, finals)
        finish(work)
    return manifest


def _check_no_run(prefix: Path) -> None:
    """A tokenization with this output keeps its work where a merge does, which removes it."""
    if (plan := Work(work_folder(prefix)).plan_file).is_file():
        raise UserError(
            f"expected no tokenization with the output {prefix}, got the plan of one in {plan}; let it finish "
            "(--resume) or name another output"
        )


def _tokens(part: Part, itemsize: int) -> int:
    """Tokens of a part, by its index and by its file."""
    tokens = sum(int(lengths.sum(dtype="int64")) for lengths in part.lengths.chunks())
    size = part.tokens.stat().st_size
    if size != tokens * itemsize:
        raise UserError(f"expected {tokens * itemsize} bytes in {part.tokens} by its index, got {size}; build it again")
    return tokens


def _shared(prefixes: Sequence[str | Path]) -> dict:
    manifests = [manifest_of(prefix) or {} for prefix in prefixes]
    first = manifests[0]
    same = all(manifest.get(name) == first.get(name) for manifest in manifests for name in SHARED)
    return {name: first.get(name) if same else None for name in SHARED}


def _identity(prefix: str | Path) -> dict:
    files = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    described = {kind: {"bytes": path.stat().st_size, "checksum": file_checksum(path)} for kind, path in files.items()}
    return {"prefix": str(prefix), **described}
