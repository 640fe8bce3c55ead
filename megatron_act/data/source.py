"""Parquet in FineWeb-Edu's schema: find the files, check them all before any work, read them in bounded batches."""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from megatron_act.data.filters import Filters, keep_mask
from megatron_act.errors import UserError

BATCH_ROWS = 1024  # FineWeb-Edu documents average 5 kB: about 5 MB of text held at a time


@dataclass(frozen=True)
class Source:
    """One readable parquet file: path, size in bytes, number of rows and of row groups."""

    path: Path
    size_bytes: int
    rows: int
    row_groups: int


@dataclass(frozen=True)
class Columns:
    """What is read from each row: the text, the id where a split needs it, the filtered numbers."""

    text: str
    id: str | None = None
    numbers: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """The columns' names, each once."""
        return list(dict.fromkeys([self.text, *([self.id] if self.id else []), *self.numbers]))


def expand_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """Files, folders (every `*.parquet` below, sorted) and glob patterns (sorted) as files, each once, in order.

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
        found = sorted(path.rglob("*.parquet"))
    else:
        found = sorted(Path(name) for name in glob.glob(item, recursive=True) if Path(name).is_file())
    if not found:
        what = "the folder holds no *.parquet" if path.is_dir() else "no such file, and as a pattern it matches nothing"
        raise UserError(f"expected a parquet file, a folder or a glob, got {item} ({what}); check --input")
    return found


def open_sources(paths: Iterable[Path], columns: Columns) -> list[Source]:
    """Check every file's footer and schema.

    Raises:
        UserError: a file is not parquet or is cut short, lacks a column, has one of a wrong type, or no file has rows.
    """
    sources = [_open_source(path, columns) for path in paths]
    if not any(source.rows for source in sources):
        names = ", ".join(str(source.path) for source in sources[:3])
        raise UserError(f"expected at least one row, got 0 rows in {names}; give a file that holds documents")
    return sources


def _open_source(path: Path, columns: Columns) -> Source:
    with _open_parquet(path) as file:
        schema = file.schema_arrow
        _check_column(path, schema, columns.text, "string", _is_string)
        if columns.id:
            _check_column(path, schema, columns.id, "string", _is_string)
        for name in columns.numbers:
            _check_column(path, schema, name, "number", lambda t: pt.is_integer(t) or pt.is_floating(t))
        return Source(path, path.stat().st_size, file.metadata.num_rows, file.metadata.num_row_groups)


def _is_string(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind)


def _check_column(path: Path, schema: pa.Schema, name: str, kind: str, accepts: Callable[[pa.DataType], bool]) -> None:
    if name not in schema.names:
        raise UserError(
            f"{path}: expected a column '{name}' of type {kind}, got columns {', '.join(schema.names) or 'none'}; "
            "name the text column with --text-column, and filter or split only by columns that exist"
        )
    if not accepts(schema.field(name).type):
        got = schema.field(name).type
        raise UserError(f"{path}: expected column '{name}' of type {kind}, got {got}; convert it or name another")


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"expected a parquet file, got {path} ({_why_not(path, error)}); fetch it again") from error


def _why_not(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied"
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        return "the file is empty"
    return "it starts as parquet but is cut short or damaged" if head == b"PAR1" else "it is another kind of file"


def read_row_group(path: Path, row_group: int, columns: Columns) -> Iterator[pa.RecordBatch]:
    """The named columns of one row group, at most `BATCH_ROWS` rows at a time.

    Raises:
        UserError: the data is damaged, or a text is not UTF-8.
    """
    with _open_parquet(path) as file:
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[row_group], columns=columns.names()):
                batch.validate(full=True)  # parquet does not promise UTF-8; the tokenizer does rely on it
                yield batch
        except (pa.ArrowException, OSError) as error:
            where = f"{path}, row group {row_group}"
            raise UserError(f"{where}: expected intact rows of UTF-8 text, got: {error}; fetch it again") from error


def iter_texts(
    inputs: Sequence[str | Path], text_column: str = "text", filters: Filters | None = None
) -> Iterator[str]:
    """Every kept text of the inputs, in order (files are all checked first)."""
    filters = filters or Filters()
    columns = Columns(text_column, numbers=filters.columns())
    for source in open_sources(expand_inputs(inputs), columns):
        for row_group in range(source.row_groups):
            for batch in read_row_group(source.path, row_group, columns):
                keep, _ = keep_mask(batch, text_column, filters)
                yield from batch.column(text_column).filter(pa.array(keep)).to_pylist()
