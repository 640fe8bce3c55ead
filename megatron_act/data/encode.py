"""One row group of parquet to files of tokens: the unit of work, the same whichever process does it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_act.data.filters import Filters, keep_mask
from megatron_act.data.indexed import token_dtype
from megatron_act.data.source import Columns, read_row_group
from megatron_act.data.split import Split
from megatron_act.data.tokenizer import Encoder, TokenizerInfo, load_encoder
from megatron_act.errors import UserError


@dataclass(frozen=True)
class Job:
    """What holds for every unit: picklable, so that a worker process can be started from it."""

    tokenizer: TokenizerInfo
    columns: Columns
    filters: Filters
    split: Split
    staging: Path


@dataclass(frozen=True)
class Unit:
    """One row group of one file; `number` is its place in the output."""

    number: int
    path: Path
    row_group: int


@dataclass(frozen=True)
class Encoded:
    """What a unit became.

    Attributes:
        shards: per part of the split, a file of tokens in the output's dtype.
        lengths: per part, int32 [documents]: tokens of each document, EOD included.
        rows: rows read.
        dropped: rows left out, by reason.
    """

    shards: list[Path]
    lengths: list[np.ndarray]
    rows: int
    dropped: Counter


@dataclass(frozen=True)
class UnitEncoder:
    """`job` made callable: build() loads the tokenizer, the result turns a `Unit` into an `Encoded`."""

    job: Job

    def __call__(self) -> Callable[[Unit], Encoded]:
        encoder = load_encoder(self.job.tokenizer.file, self.job.tokenizer.encoder)
        return lambda unit: _encode_unit(self.job, encoder, unit)


def _encode_unit(job: Job, encoder: Encoder, unit: Unit) -> Encoded:
    parts = range(len(job.split.names))
    shards = [job.staging / f"{unit.number:08d}.{part}" for part in parts]
    dtype = token_dtype(job.tokenizer.vocab_size)
    lengths: list[list[np.ndarray]] = [[np.empty(0, np.int32)] for _ in parts]
    rows, dropped = 0, Counter[str]()
    files = [shard.open("wb") for shard in shards]
    try:
        for batch in read_row_group(unit.path, unit.row_group, job.columns):
            rows += batch.num_rows
            for part, tokens, sizes in _encode_batch(job, encoder, batch, dropped):
                files[part].write(tokens.astype(dtype).tobytes())
                lengths[part].append(sizes)
    finally:
        for file in files:
            file.close()
    return Encoded(shards, [np.concatenate(sizes) for sizes in lengths], rows, dropped)


def _encode_batch(
    job: Job, encoder: Encoder, batch: pa.RecordBatch, dropped: Counter
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (part, tokens uint32 [total], lengths int32 [documents]) for every part; count into `dropped`."""
    keep, reasons = keep_mask(batch, job.columns.text, job.filters)
    dropped.update(reasons)
    kept = batch.filter(pa.array(keep))
    tokens, sizes = _append_eod(*encoder.encode(kept.column(job.columns.text).to_pylist()), job.tokenizer.eod_id)
    part_of = _parts(job, kept)
    silent = sizes == 1  # a normalizer can leave nothing of a text but its EOD
    dropped["no_tokens"] += int(silent.sum())
    for part in range(len(job.split.names)):
        chosen = (part_of == part) & ~silent
        yield part, tokens if chosen.all() else tokens[np.repeat(chosen, sizes)], sizes[chosen]


def _append_eod(ids: np.ndarray, offsets: np.ndarray, eod_id: int) -> tuple[np.ndarray, np.ndarray]:
    return np.insert(ids, offsets[1:], eod_id), (np.diff(offsets) + 1).astype(np.int32)


def _parts(job: Job, batch: pa.RecordBatch) -> np.ndarray:
    if job.columns.id is None:
        return np.zeros(batch.num_rows, np.int64)
    ids = batch.column(job.columns.id)
    if ids.null_count:
        raise UserError(f"expected an id in every row, got {ids.null_count} nulls in '{job.columns.id}'; drop --split")
    return job.split.part_of(ids.to_pylist())
