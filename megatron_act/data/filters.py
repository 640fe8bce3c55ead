"""Which rows become documents: null and empty text never does, quality thresholds are optional."""

from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Filters:
    """Lower bounds, inclusive; None switches one off. A null in a filtered column fails that filter.

    Attributes:
        min_score: on `score`, FineWeb-Edu's classifier output (0 to 5).
        min_int_score: on `int_score`, the same rounded.
        min_language_score: on `language_score` (0 to 1).
        min_chars: on the number of Unicode code points of the text.
    """

    min_score: float | None = None
    min_int_score: int | None = None
    min_language_score: float | None = None
    min_chars: int | None = None

    def columns(self) -> tuple[str, ...]:
        """The numeric columns that the set bounds need."""
        bounds = {name: bound for name, bound in asdict(self).items() if name != "min_chars"}
        return tuple(name.removeprefix("min_") for name, bound in bounds.items() if bound is not None)


def keep_mask(batch: pa.RecordBatch, text_column: str, filters: Filters) -> tuple[np.ndarray, dict[str, int]]:
    """Decide every row of a batch.

    Returns:
        keep, bool [rows], and the number of rows dropped by each reason: `null_text`, `empty_text` or a filter's
        name. A row counts under the first reason that it meets, in that order.
    """
    text = batch.column(text_column)
    passes = {"null_text": pc.is_valid(text), "empty_text": pc.not_equal(pc.binary_length(text), 0)}
    if filters.min_chars is not None:
        passes["min_chars"] = pc.greater_equal(pc.utf8_length(text), filters.min_chars)
    for column in filters.columns():
        bound = getattr(filters, "min_" + column)
        passes["min_" + column] = pc.greater_equal(batch.column(column), bound)
    keep, dropped = np.ones(batch.num_rows, bool), {}
    for reason, passed in passes.items():
        ok = pc.fill_null(passed, False).to_numpy(zero_copy_only=False)
        dropped[reason] = int((keep & ~ok).sum())
        keep &= ok
    return keep, dropped
