"""Which rows become documents: null and empty text never does, quality thresholds are optional."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Filters:
    """Lower bounds, inclusive, and chosen dumps; None or () switches one off. A null in a filtered column fails it.

    Attributes:
        min_score: on `score`, FineWeb-Edu's classifier output (0 to 5).
        min_int_score: on `int_score`, the same rounded.
        min_language_score: on `language_score` (0 to 1).
        min_chars: on the number of Unicode code points of the text.
        dumps: the Common Crawl dumps to keep, by `dump` ("CC-MAIN-2024-10").
        drop_invalid_text: drop (and count) a text that is not UTF-8, such as a lone surrogate, instead of refusing it.
    """

    min_score: float | None = None
    min_int_score: int | None = None
    min_language_score: float | None = None
    min_chars: int | None = None
    dumps: tuple[str, ...] = ()
    drop_invalid_text: bool = False

    def numbers(self) -> tuple[str, ...]:
        """The numeric columns that the set bounds need."""
        bounds = ("score", "int_score", "language_score")
        return tuple(name for name in bounds if getattr(self, "min_" + name) is not None)

    def as_json(self) -> dict:
        """Every field, for the manifest."""
        return {**asdict(self), "dumps": list(self.dumps)}


def keep_mask(batch: pa.RecordBatch, text_column: str, filters: Filters) -> tuple[np.ndarray, dict[str, int]]:
    """Decide every row of a batch.

    Returns:
        keep, bool [rows], and the number of rows dropped by each reason: `null_text`, `empty_text`, `invalid_text` or a
        filter's name. A row counts under the first reason that it meets, in that order.
    """
    keep, dropped = np.ones(batch.num_rows, bool), {}
    for reason, passed in _tests(batch, text_column, filters):
        dropped[reason] = int((keep & ~passed).sum())
        keep &= passed
    return keep, dropped


def byte_lengths(text: pa.Array) -> np.ndarray:
    """Bytes of each string, int64 [rows], without a look at them; of a null, whatever."""
    return np.diff(_offsets(text)).astype(np.int64)


def text_bytes(batch: pa.RecordBatch, column: str) -> memoryview:
    """The bytes of the only row, in place."""
    text = batch.column(column)
    start, stop = _offsets(text)
    return memoryview(text.buffers()[2])[start:stop]


def _offsets(text: pa.Array) -> np.ndarray:
    width = np.int64 if pa.types.is_large_string(text.type) else np.int32
    return np.frombuffer(text.buffers()[1] or b"\0" * 8, width, len(text) + 1, text.offset * width().itemsize)


def _tests(batch: pa.RecordBatch, text_column: str, filters: Filters) -> Iterator[tuple[str, np.ndarray]]:
    text = batch.column(text_column)
    yield "null_text", _numpy(pc.is_valid(text)) if text.null_count else np.ones(len(text), bool)
    yield "empty_text", byte_lengths(text) != 0
    if filters.drop_invalid_text:
        yield "invalid_text", _is_utf8(text)
    if filters.min_chars is not None:
        yield "min_chars", _numpy(pc.greater_equal(pc.utf8_length(text), filters.min_chars))
    for column in filters.numbers():
        bound = getattr(filters, "min_" + column)
        numbers = batch.column(column).cast(pa.float64(), safe=False)  # float16 and integers above 2^53 compare too
        yield "min_" + column, _numpy(pc.greater_equal(numbers, bound))
    if filters.dumps:
        dumps = batch.column("dump")
        yield "dump", _numpy(pc.is_in(dumps, pa.array(filters.dumps, dumps.type)))


def _numpy(passed: pa.Array) -> np.ndarray:
    return pc.fill_null(passed, False).to_numpy(zero_copy_only=False)


def _is_utf8(text: pa.Array) -> np.ndarray:
    """Whether each text is UTF-8; nearly always one check of the whole batch."""
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        return np.array([_decodes(item) for item in text.cast(pa.large_binary()).to_pylist()])
    return np.ones(len(text), bool)


def _decodes(item: bytes | None) -> bool:
    try:
        return item is not None and item.decode() is not None
    except UnicodeDecodeError:
        return False
