"""One task: read a stretch of rows, filter, encode, append EOD, divide into parts, write tokens aside.

What it writes depends on the plan and the task's number alone, so it may be done twice, anywhere, in any order.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from megatron_act.data.checksum import Checksum, file_checksum
from megatron_act.data.columns import BATCH_BYTES
from megatron_act.data.cuts import Cut, cut_of, pieces
from megatron_act.data.filters import byte_lengths, keep_mask, text_bytes
from megatron_act.data.hub import is_hub
from megatron_act.data.indexed import token_dtype
from megatron_act.data.plan import Plan, Stretch, stretches
from megatron_act.data.source import Source, fetch, inspect, read
from megatron_act.data.stopwatch import Stopwatch
from megatron_act.data.tokenizer import load_encoder
from megatron_act.data.work import Work
from megatron_act.errors import UserError


@dataclass
class Result:
    """What a task reports, as `result.json`.

    Attributes:
        inputs: (path, bytes, stamp) of each source, for `is_done`.
        rows, text_bytes: read, dropped ones included; bytes of the kept texts.
        dropped: rows left out, by reason.
        parts: per part {"documents", "tokens", "checksum" (None where the tokens become part of a larger file)}.
        sources: by the source's number: {"rows" read by this task, "checksum" if this task was the one to take it}.
        seconds: by stage.
    """

    inputs: list[list]
    rows: int = 0
    text_bytes: int = 0
    dropped: Counter = field(default_factory=Counter)
    parts: list[dict] = field(default_factory=list)
    sources: dict[str, dict] = field(default_factory=dict)
    seconds: Stopwatch = field(default_factory=Stopwatch)


class PartWriter:
    """Tokens and lengths of one part of the split, as `K.bin` and `K.len` in the task's folder."""

    def __init__(self, folder: Path, part: int, hashed: bool) -> None:
        self.documents, self.tokens = 0, 0
        self._bin = (folder / f"{part}.bin").open("wb")
        self._lengths = (folder / f"{part}.len").open("wb")
        self._checksum = Checksum() if hashed else None

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents end to end; lengths int32 [documents]."""
        self._bin.write(tokens.data)
        self._lengths.write(lengths.data)
        if self._checksum:
            self._checksum.update(tokens.data)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def close(self) -> dict:
        """Close both files, and the part's entry of the result."""
        self._bin.close()
        self._lengths.close()
        checksum = str(self._checksum) if self._checksum else None
        return {"documents": self.documents, "tokens": self.tokens, "checksum": checksum}


def is_done(work: Work, plan: Plan, number: int) -> bool:
    """Whether a task's result is there and was made from the files that the plan means."""
    result = work.result(number)
    return result is not None and result["inputs"] == _inputs(plan, number)


def _inputs(plan: Plan, number: int) -> list[list]:
    return [[source.path, source.size_bytes, source.stamp] for source, _ in stretches(plan, number)]


def run_task(work: Work, plan: Plan, number: int) -> Result | None:
    """Do a task, unless it is done.

    Raises:
        UserError: damaged or changed input, no answer of the hub, or a full disk.
    """
    if is_done(work, plan, number):
        return None
    with work.begin(number) as (folder, progress):
        result = _Task(work, plan, number, folder, progress).run()
        (folder / "result.json").write_text(json.dumps(vars(result)), encoding="utf-8")
    return result


class _Task:
    def __init__(self, work: Work, plan: Plan, number: int, folder: Path, progress: IO[bytes]) -> None:
        self.plan, self.job, self.number, self.progress = plan, plan.job, number, progress
        self.result = Result(_inputs(plan, number))
        self.clock = self.result.seconds
        self.keep = plan.downloads is not None
        self.downloads = Path(plan.downloads) if plan.downloads else work.folder / "downloads"
        self.dtype = token_dtype(self.job.tokenizer.vocab_size)
        final = plan.shards or len(plan.tasks) == 1  # then nothing else will read all of the tokens
        self.writers = [PartWriter(folder, part, final) for part in range(len(self.job.split.names))]

    def run(self) -> Result:
        with self.clock.stage("load tokenizer"):
            self.encoder = load_encoder(self.job.tokenizer)
        try:
            for source, stretch in stretches(self.plan, self.number):
                self._source(source, stretch)
        finally:
            with self.clock.stage("write"):
                self.result.parts = [writer.close() for writer in self.writers]
        return self.result

    def _source(self, source: Source, stretch: Stretch) -> None:
        before = self.result.rows
        with self.clock.stage("download"):
            path = fetch(source, self.downloads)
        batches = read(path, stretch.start, self._stop(source, stretch, path), self.job.columns)
        for batch in self.clock.stages(batches, "read"):
            self._batch(batch)
            os.pwrite(self.progress.fileno(), self.result.rows.to_bytes(8, "little"), 0)
        with self.clock.stage("checksum of sources"):
            checksum = _checksum(source, path) if stretch.start == 0 or source.sha256 else None
        self.result.sources[str(stretch.source)] = {"rows": self.result.rows - before, "checksum": checksum}
        if is_hub(source.path) and not self.keep:
            path.unlink()

    def _stop(self, source: Source, stretch: Stretch, path: Path) -> int:
        """Where to stop: at the end of a file whose pieces were not known when the plan was made."""
        if is_hub(source.path):
            return len(inspect(path, self.job.columns)[1])
        state = path.stat()
        if (state.st_size, str(state.st_mtime_ns)) != (source.size_bytes, source.stamp):
            raise UserError(f"expected {path} as it was when the run began, got a changed file; start again")
        return stretch.stop

    def _batch(self, batch: pa.RecordBatch) -> None:
        self.result.rows += batch.num_rows
        with self.clock.stage("filter"):
            keep, reasons = keep_mask(batch, self.job.columns.text, self.job.filters)
            self.result.dropped.update(reasons)
            kept = batch if keep.all() else batch.filter(pa.array(keep))
            sizes = byte_lengths(kept.column(self.job.columns.text))
            self.result.text_bytes += int(sizes.sum())
        for start, stop in _bounded(sizes):
            rows = kept.slice(start, stop - start)
            if stop - start == 1 and sizes[start] > BATCH_BYTES:
                self._long_document(rows)
            else:
                self._documents(rows)

    def _documents(self, batch: pa.RecordBatch) -> None:
        with self.clock.stage("to Python strings"):
            texts = batch.column(self.job.columns.text).to_pylist()
        with self.clock.stage("encode"):
            ids, offsets = self.encoder.encode(texts)
        with self.clock.stage("append EOD, split"):
            tokens, lengths = append_eod(ids, offsets, self.job.tokenizer.eod_id, self.dtype)
            silent = lengths == 1  # a normalizer can leave nothing of a text but its EOD
            self.result.dropped["no_tokens"] += int(silent.sum())
            part_of = self._parts(batch)
        for part, writer in enumerate(self.writers):
            with self.clock.stage("write"):
                chosen = (part_of == part) & ~silent
                writer.append(tokens if chosen.all() else tokens[np.repeat(chosen, lengths)], lengths[chosen])

    def _long_document(self, batch: pa.RecordBatch) -> None:
        """Encode one in pieces, so that no more than its bytes is held of it."""
        writer, length = self.writers[self._parts(batch)[0]], 0
        for piece in self.clock.stages(pieces(text_bytes(batch, self.job.columns.text), BATCH_BYTES, self.cut), "cut"):
            with self.clock.stage("encode"):
                ids = self.encoder.encode([piece])[0].astype(self.dtype)
            with self.clock.stage("write"):
                writer.append(ids, np.empty(0, "<i4"))
            length += len(ids)
        if length:
            writer.append(np.array([self.job.tokenizer.eod_id], self.dtype), np.array([length + 1], "<i4"))
        else:
            self.result.dropped["no_tokens"] += 1

    @cached_property
    def cut(self) -> Cut | None:
        """How long documents may be cut."""
        return cut_of(self.job.tokenizer)

    def _parts(self, batch: pa.RecordBatch) -> np.ndarray:
        if self.job.columns.id is None:
            return np.zeros(batch.num_rows, np.int64)
        ids = batch.column(self.job.columns.id)
        if ids.null_count:
            raise UserError(
                f"expected an id in every row, got {ids.null_count} nulls in '{self.job.columns.id}'; drop --split"
            )
        return self.job.split.part_of(ids.to_pylist())


def _checksum(source: Source, path: Path) -> str:
    return f"sha256:{source.sha256}" if source.sha256 else file_checksum(path)


def append_eod(ids: np.ndarray, offsets: np.ndarray, eod_id: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [total + documents] in the output's dtype with EOD after each document; lengths int32 [documents]."""
    documents = len(offsets) - 1
    ends = offsets[1:] + np.arange(documents)
    tokens = np.empty(len(ids) + documents, dtype)
    body = np.ones(len(tokens), bool)
    body[ends] = False
    tokens[body] = ids
    tokens[ends] = eod_id
    return tokens, (np.diff(offsets) + 1).astype("<i4")


def _bounded(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of rows, each of at most `BATCH_BYTES` of text or of one row."""
    ends, start = np.cumsum(sizes), 0
    while start < len(sizes):
        limit = ends[start] - sizes[start] + BATCH_BYTES
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield start, stop
        start = stop
