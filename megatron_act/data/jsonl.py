"""JSON lines, plain or compressed (.gz, .zst): one object a line, read in bounded batches.

A compressed stream that ends early is an error, not an end. A key that a line lacks is null; only the text's key must
be there.
"""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_act.data.columns import BATCH_BYTES, BATCH_ROWS, Columns, check_batch
from megatron_act.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}


def inspect(path: Path, columns: Columns) -> tuple[None, tuple[int, ...]]:
    """No number of rows (that takes reading it), and the file's bytes as its only piece.

    Raises:
        UserError: the first line is not what `read` accepts.
    """
    for number, text, encoding in _texts(path, columns):
        _row(text, encoding, columns, f"{path}, line {number}")
        break
    return None, (path.stat().st_size,)


def read(path: Path, columns: Columns) -> Iterator[pa.RecordBatch]:
    """The named columns of every line, as checked batches of at most `BATCH_ROWS` rows or about `BATCH_BYTES` of text.

    Raises:
        UserError: a line is no JSON object, a value has another type, the stream is cut short, a text is not UTF-8.
    """
    rows: list[list[Any]] = []
    size = 0
    for number, text, encoding in _texts(path, columns):
        rows.append(_row(text, encoding, columns, f"{path}, line {number}"))
        size += len(rows[-1][0] or ())
        if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
            yield _batch(rows, columns, f"{path}, lines up to {number}")
            rows, size = [], 0
    if rows:
        yield _batch(rows, columns, f"{path}, last lines")


def _texts(path: Path, columns: Columns) -> Iterator[tuple[int, str, str]]:
    """Number from 1 and text of each line that is not blank, and the encoding that gives its strings' bytes.

    Latin-1 makes each byte a character: a long text takes its bytes, where the characters meant take up to four each.
    """
    ascii_names, number = all(map(str.isascii, columns.names())), 0
    for line in _lines(path):
        number += 1
        if line.isspace():
            continue
        encoding = "latin-1" if ascii_names and b"\\u" not in line else "utf-8"
        # a byte that is no UTF-8 becomes a lone surrogate, as it may be written in JSON: judged with the text
        text = line.decode(encoding, "surrogateescape")
        del line  # half of what is held of a long one
        yield number, text, encoding


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with pa.input_stream(str(path), compression=COMPRESSION.get(path.suffix)) as stream:
            yield from io.BufferedReader(stream, 1 << 20)
    except OSError as error:
        raise UserError(f"expected readable JSON lines, got {path} ({error}); fetch it again") from error


def _row(text: str, encoding: str, columns: Columns, where: str) -> list[Any]:
    """The columns' values, in the order of `names()`, strings as bytes."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected a JSON object, got {error}; correct or fetch the file again") from error
    if not isinstance(record, dict) or columns.text not in record:
        got = f"keys {', '.join(record) or 'none'}" if isinstance(record, dict) else type(record).__name__
        raise UserError(
            f"{where}: expected an object with a column '{columns.text}' of type string, got {got}; see --text-column"
        )
    strings = [_string(record.get(name), name, encoding, where) for name in columns.strings()]
    return strings + [_number(record.get(name), name, where) for name in columns.numbers]


def _string(value: Any, name: str, encoding: str, where: str) -> bytes | None:
    if value is None or isinstance(value, str):
        return None if value is None else value.encode(encoding, "surrogatepass")
    raise UserError(f"{where}: expected column '{name}' of type string, got {type(value).__name__}; correct it")


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    got = type(value).__name__
    raise UserError(f"{where}: expected column '{name}' of type number, got {got}; give one that a float64 holds")


def _batch(rows: list[list[Any]], columns: Columns, where: str) -> pa.RecordBatch:
    strings = len(columns.strings())
    arrays = [
        _text(values) if place < strings else pa.array(values, pa.float64())
        for place, values in enumerate(zip(*rows, strict=True))
    ]
    batch = pa.RecordBatch.from_arrays(arrays, columns.names())
    check_batch(batch, columns, where)
    return batch


def _text(values: tuple[bytes | None, ...]) -> pa.Array:
    """Bytes that claim to be UTF-8, unchecked."""
    array = pa.array(values, pa.large_binary())
    return pa.Array.from_buffers(pa.large_string(), len(array), array.buffers(), array.null_count)
