"""FineWeb-Edu parquet to Megatron `.bin/.idx` and a manifest: the whole of tools/preprocess_fineweb_edu.py.

    files -> row groups -> (filter, encode, append EOD, split) in worker processes -> token files, in input order
          -> .bin + .idx aside -> checked, flushed, renamed: .bin, .idx, manifest last

The row group is the unit, and units are joined in input order, so the output does not depend on the number of workers.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from tqdm import tqdm

from megatron_act.data.encode import Encoded, Job, Unit, UnitEncoder
from megatron_act.data.filters import Filters
from megatron_act.data.indexed import IndexedWriter, token_dtype
from megatron_act.data.manifest import build_manifest, files_sha256, write_manifest
from megatron_act.data.source import Columns, Source, expand_inputs, open_sources
from megatron_act.data.split import Split
from megatron_act.data.staging import check_absent, publish, staging_folder
from megatron_act.data.tokenizer import open_tokenizer
from megatron_act.data.workers import ordered_map
from megatron_act.errors import UserError

WHOLE = Split(("all",), (1.0,))


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output_prefix: str | Path,
    *,
    split: Split | None = None,
    filters: Filters | None = None,
    workers: int = 1,
    text_column: str = "text",
    eod_token: str | None = None,
    encoder: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> dict:
    """Tokenize parquet files into `P.bin`, `P.idx` and `P.manifest.json`, or per part into `P_NAME.bin`, `P_NAME.idx`.

    Args:
        inputs: files, folders or globs of parquet with a string column of text.
        tokenizer: a Hugging Face `tokenizer.json`, or a folder that holds one.
        output_prefix: P, as in Megatron's ``--data-path P``.
        split: parts by document id (see `Split`); needs a string column `id`. Default: one output.
        filters: thresholds; null and empty texts are always dropped.
        workers: processes; the output does not depend on it.
        text_column: name of the column of text.
        eod_token: token appended to every document (default: see `open_tokenizer`).
        encoder: "auto", "fastokens" or "tokenizers".
        overwrite: replace an existing output.
        progress: show a bar on standard error when that is a terminal.
        command: recorded in the manifest.

    Returns:
        The manifest (see `build_manifest`), as written.

    Raises:
        UserError: bad input or an output that cannot be written; nothing is left behind.
    """
    prefix, filters = Path(output_prefix), filters or Filters()
    columns = Columns(text_column, "id" if split else None, filters.columns())
    finals = _final_paths(prefix, split)
    check_absent(finals, overwrite)
    sources = open_sources(expand_inputs(inputs), columns)
    info = open_tokenizer(tokenizer, eod_token, encoder)
    with staging_folder(prefix) as staging:
        job = Job(info, columns, filters, split or WHOLE, staging)
        checksums = files_sha256([source.path for source in sources], workers, progress)
        staged = [staging / final.name for final in finals]
        outputs, rows, dropped = _write_outputs(job, sources, staged, workers, progress)
        manifest = build_manifest(outputs, sources, checksums, rows, dropped, info, filters, split, command)
        write_manifest(staged[-1], manifest)
        check_absent(finals, overwrite)  # another run may have finished meanwhile
        publish(staged, finals)
    return manifest


def _final_paths(prefix: Path, split: Split | None) -> list[Path]:
    """All .bin, then all .idx, then the manifest: in this order they become visible."""
    if prefix.is_dir() or not prefix.name:
        raise UserError(f"expected --output-prefix FOLDER/NAME, got the folder {prefix}; add a name for the files")
    stems = [f"{prefix.name}_{name}" for name in split.names] if split else [prefix.name]
    names = [stem + suffix for suffix in (".bin", ".idx") for stem in stems]
    return [prefix.with_name(name) for name in [*names, prefix.name + ".manifest.json"]]


def _write_outputs(
    job: Job, sources: Sequence[Source], staged: Sequence[Path], workers: int, progress: bool
) -> tuple[list[dict], int, Counter]:
    """Encode every row group and join the results; per part the manifest entry, then rows read and rows dropped."""
    parts = job.split.names
    dtype = token_dtype(job.tokenizer.vocab_size)
    rows, dropped = 0, Counter[str]()
    with ExitStack() as stack:
        writers = [
            stack.enter_context(closing(IndexedWriter(path.with_suffix(""), dtype))) for path in staged[: len(parts)]
        ]
        for encoded in _encoded(job, sources, workers, progress):
            rows += encoded.rows
            dropped += encoded.dropped
            _join(writers, encoded)
        return [_entry(name, writer, dropped) for name, writer in zip(parts, writers, strict=True)], rows, dropped


def _encoded(job: Job, sources: Iterable[Source], workers: int, progress: bool) -> Iterator[Encoded]:
    groups = [(source.path, group) for source in sources for group in range(source.row_groups)]
    units = [Unit(number, path, group) for number, (path, group) in enumerate(groups)]
    total = sum(source.rows for source in sources)
    with tqdm(total=total, desc="tokenizing", unit="doc", disable=None if progress else True) as bar:
        for encoded in ordered_map(UnitEncoder(job), units, workers):
            yield encoded
            bar.update(encoded.rows)


def _join(writers: Sequence[IndexedWriter], encoded: Encoded) -> None:
    for writer, shard, lengths in zip(writers, encoded.shards, encoded.lengths, strict=True):
        writer.append(shard, lengths)
        shard.unlink()


def _entry(name: str, writer: IndexedWriter, dropped: Counter) -> dict:
    if not writer.documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()) if count) or "none"
        raise UserError(f"expected documents in part '{name}', got 0 (dropped: {reasons}); loosen filters or split")
    return {"name": name, "documents": writer.documents, "tokens": writer.tokens, **writer.finish()}
