"""Where documents come from: parquet or JSON lines, here or on the hub, checked before any work, read in batches."""

import glob
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from megatron_act.data import hub, jsonl, parquet
from megatron_act.data.columns import Columns
from megatron_act.data.filters import Filters, keep_mask
from megatron_act.errors import UserError

SUFFIXES = (".parquet", *jsonl.SUFFIXES)


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        path: on this machine, or `hf://datasets/OWNER/NAME@COMMIT/PATH`.
        size_bytes: of the file.
        stamp: changes when the file does: time of modification in ns, or the hub's checksum.
        rows: None where only reading tells (JSON lines, files on the hub).
        pieces: bytes of each part that can be read apart (row groups); one part where that is unknown.
        sha256: the hub's checksum; None for a file on this machine.
    """

    path: str
    size_bytes: int
    stamp: str
    rows: int | None
    pieces: tuple[int, ...]
    sha256: str | None = None


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """Files, folders (every parquet and JSON-lines file below, sorted) and glob patterns (sorted) as files, each once.

    Raises:
        UserError: an input matches nothing.
    """
    unique: dict[Path, Path] = {}
    for item in inputs:
        for file in _expand(str(item)):
            unique.setdefault(file.resolve(), file)
    return list(unique.values())


def _expand(item: str) -> list[Path]:
    path = Path(item)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    else:
        found = sorted(Path(name) for name in glob.glob(item, recursive=True) if Path(name).is_file())
    if not found:
        what = "no such file, and as a pattern it matches nothing"
        if path.is_dir():
            what = "the folder holds no *.parquet and no *.jsonl, .jsonl.gz or .jsonl.zst"
        raise UserError(f"expected a parquet or JSON-lines file, a folder or a glob, got {item} ({what}); see --input")
    return found


def open_sources(inputs: Sequence[str | Path], columns: Columns) -> list[Source]:
    """Find every file, in the order of the inputs, each once, and check what can be checked without reading it all.

    Raises:
        UserError: an input matches nothing; a file here is of another kind, cut short, lacks a column or has one of a
            wrong type; no file has rows; the hub does not answer.
    """
    sources: dict[str, Source] = {}
    for item in inputs:
        if hub.is_hub(str(item)):
            found = [_on_hub(file) for file in hub.list_files(str(item), SUFFIXES)]
        else:
            found = [_local(path, columns) for path in expand_inputs([item])]
        for source in found:
            sources.setdefault(source.path if hub.is_hub(source.path) else str(Path(source.path).resolve()), source)
    if all(source.rows == 0 for source in sources.values()):
        names = ", ".join([source.path for source in sources.values()][:3])
        raise UserError(f"expected at least one row, got 0 rows in {names}; give a file that holds documents")
    return list(sources.values())


def _on_hub(file: hub.HubFile) -> Source:
    return Source(file.url, file.size_bytes, file.sha256 or "", None, (file.size_bytes,), file.sha256)


def _local(path: Path, columns: Columns) -> Source:
    state = path.stat()
    rows, pieces = inspect(path, columns)
    return Source(str(path), state.st_size, str(state.st_mtime_ns), rows, pieces)


def inspect(path: Path, columns: Columns) -> tuple[int | None, tuple[int, ...]]:
    """Rows if the format tells them, and bytes of each piece (see `parquet.inspect`, `jsonl.inspect`)."""
    return jsonl.inspect(path, columns) if path.name.endswith(jsonl.SUFFIXES) else parquet.inspect(path, columns)


def fetch(source: Source, downloads: Path) -> Path:
    """The source as a file of this machine: brought into `downloads` if it is on the hub."""
    if not hub.is_hub(source.path):
        return Path(source.path)
    return hub.download(hub.HubFile(source.path, source.size_bytes, source.sha256), downloads)


def read(path: Path, start: int, stop: int, columns: Columns) -> Iterator[pa.RecordBatch]:
    """Batches of pieces start to stop (see `parquet.read`, `jsonl.read`)."""
    if path.name.endswith(jsonl.SUFFIXES):
        return jsonl.read(path, columns)
    return parquet.read(path, start, stop, columns)


def iter_texts(
    inputs: Sequence[str | Path], text_column: str = "text", filters: Filters | None = None
) -> Iterator[str]:
    """Every kept text of the inputs, in order (files are all checked first)."""
    filters = filters or Filters()
    columns = columns_for(filters, text_column)
    sources = open_sources(inputs, columns)
    with tempfile.TemporaryDirectory(prefix="megatron_act-") as downloads:
        for batch in _batches(sources, Path(downloads), columns):
            keep, _ = keep_mask(batch, text_column, filters)
            yield from batch.column(text_column).filter(pa.array(keep)).to_pylist()


def _batches(sources: Iterable[Source], downloads: Path, columns: Columns) -> Iterator[pa.RecordBatch]:
    for source in sources:
        path = fetch(source, downloads)
        yield from read(path, 0, len(inspect(path, columns)[1]), columns)
        if downloads in path.parents:
            path.unlink()


def columns_for(filters: Filters, text_column: str, with_id: bool = False) -> Columns:
    """What has to be read for these filters, with the id where a split needs it."""
    return Columns(
        text_column,
        "id" if with_id else None,
        filters.numbers(),
        "dump" if filters.dumps else None,
        refuse_invalid=not filters.drop_invalid_text,
    )
