"""Parquet files: their schema and row groups, read in batches whose size does not depend on the file's."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_act.data.columns import BATCH_BYTES, BATCH_ROWS, Columns, check_batch, check_schema
from megatron_act.errors import UserError

READ_BYTES = 1 << 20  # read ahead: without a bound a whole column chunk is loaded, in one group up to the whole file


def inspect(path: Path, columns: Columns) -> tuple[int, tuple[int, ...]]:
    """Rows of a file and bytes of each row group, from its footer alone.

    Raises:
        UserError: it is not parquet or is cut short, or a column is missing or of a wrong type.
    """
    with _open(path) as file:
        check_schema(str(path), file.schema_arrow, columns)
        groups = range(file.metadata.num_row_groups)
        sizes = tuple(file.metadata.row_group(group).total_byte_size for group in groups)
        return file.metadata.num_rows, sizes or (0,)


def read(path: Path, start: int, stop: int, columns: Columns) -> Iterator[pa.RecordBatch]:
    """The named columns of row groups start to stop, as checked batches of about `BATCH_BYTES` of text.

    Raises:
        UserError: the data is damaged, or a text is not UTF-8.
    """
    with _open(path) as file:
        for group in range(start, min(stop, file.metadata.num_row_groups)):
            where = f"{path}, row group {group}"
            rows = _batch_rows(file.metadata.row_group(group), columns.text)
            batches = file.iter_batches(rows, row_groups=[group], columns=columns.names(), use_threads=False)
            while (batch := _next(batches, where)) is not None:
                check_batch(batch, columns, where)
                yield batch


def _batch_rows(group: pq.RowGroupMetaData, text_column: str) -> int:
    chunks = (group.column(i) for i in range(group.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_column)
    mean = size // max(group.num_rows, 1) + 1
    return max(1, min(BATCH_ROWS, BATCH_BYTES // mean))


def _next(batches: Iterator[pa.RecordBatch], where: str) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where}: expected intact rows of UTF-8 text, got: {error}; fetch it again") from error


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True)
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
