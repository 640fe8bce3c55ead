"""What is read from each row, whatever the file's format, and what a batch of rows must satisfy."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as pt

from megatron_act.errors import UserError

BATCH_ROWS = 1024
BATCH_BYTES = 4 << 20  # of text encoded at a time; more only costs page faults


@dataclass(frozen=True)
class Columns:
    """The text, the id where a split needs it, the filtered numbers, the dump where it is filtered.

    Attributes:
        refuse_invalid: a text that is not UTF-8 is an error; otherwise it passes, for a filter to drop.
    """

    text: str
    id: str | None = None
    numbers: tuple[str, ...] = ()
    dump: str | None = None
    refuse_invalid: bool = True

    def strings(self) -> list[str]:
        """The columns of text, each once."""
        return list(dict.fromkeys(name for name in (self.text, self.id, self.dump) if name))

    def names(self) -> list[str]:
        """All columns, each once."""
        return list(dict.fromkeys([*self.strings(), *self.numbers]))


def is_string(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    return pt.is_string(kind) or pt.is_large_string(kind)


def is_number(kind: pa.DataType) -> bool:
    """Whether a column can be compared with a bound."""
    return pt.is_integer(kind) or pt.is_floating(kind)


def check_schema(path: str, schema: pa.Schema, columns: Columns) -> None:
    """Check names and types.

    Raises:
        UserError: a column is missing, there twice, or of another type.
    """
    for name in columns.strings():
        _check_column(path, schema, name, "string", is_string)
    for name in columns.numbers:
        _check_column(path, schema, name, "number", is_number)


def _check_column(path: str, schema: pa.Schema, name: str, kind: str, accepts: Callable[[pa.DataType], bool]) -> None:
    if name not in schema.names:
        raise UserError(
            f"{path}: expected a column '{name}' of type {kind}, got columns {', '.join(schema.names) or 'none'}; "
            "name the text column with --text-column, and filter or split only by columns that exist"
        )
    if (count := schema.names.count(name)) > 1:
        raise UserError(f"{path}: expected one column '{name}', got {count} of that name; rename or drop the others")
    if not accepts(schema.field(name).type):
        got = schema.field(name).type
        raise UserError(f"{path}: expected column '{name}' of type {kind}, got {got}; convert it or name another")


def check_batch(batch: pa.RecordBatch, columns: Columns, where: str) -> None:
    """Check that every string is UTF-8: no format promises it, the tokenizer relies on it.

    Raises:
        UserError: a column holds other bytes, such as a lone surrogate.
    """
    for name in columns.strings():
        if name == columns.text and not columns.refuse_invalid:
            continue
        try:
            batch.column(name).validate(full=True)
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{where}: expected intact rows of UTF-8 text, got in column '{name}': {error}; "
                "fetch the file again, or drop such rows with --drop-invalid-text"
            ) from error
