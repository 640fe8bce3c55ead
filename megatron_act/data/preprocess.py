"""FineWeb-Edu to Megatron `.bin/.idx` and a manifest: the whole of tools/preprocess_fineweb_edu.py.

    files, here or on the hub -> plan: tasks, each a stretch of rows -> datatrove's executor: filter, encode, append
    EOD, split, write aside -> joined in input order -> flushed, renamed: .bin, .idx, manifest last

Until the last step everything lies in the folder `P.work`, from which a run that was ended by anything goes on.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_act.data import engine
from megatron_act.data.engine import Executor
from megatron_act.data.filters import Filters
from megatron_act.data.join import finish_run
from megatron_act.data.manifest import read_manifest
from megatron_act.data.plan import WHOLE, Job, Plan, cut, default_tasks, final_paths, outputs
from megatron_act.data.source import columns_for, open_sources
from megatron_act.data.split import Split
from megatron_act.data.staging import check_absent
from megatron_act.data.stopwatch import Stopwatch
from megatron_act.data.task import is_done
from megatron_act.data.tokenizer import open_tokenizer
from megatron_act.data.work import Work, locked, remove_finished, work_folder
from megatron_act.errors import UserError

logger = logging.getLogger(__name__)


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
    resume: bool = False,
    progress: bool = True,
    command: str | None = None,
    clock: Stopwatch | None = None,
) -> dict:
    """Tokenize documents on this machine into `P.bin`, `P.idx` and `P.manifest.json`: `make_plan`, then `run`."""
    plan = make_plan(
        inputs,
        tokenizer,
        output_prefix,
        split=split,
        filters=filters,
        workers=workers,
        text_column=text_column,
        eod_token=eod_token,
        encoder=encoder,
        overwrite=overwrite,
        resume=resume,
        command=command,
    )
    return run(plan, Executor(workers=workers), resume=resume, progress=progress, clock=clock)


def make_plan(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output_prefix: str | Path,
    *,
    split: Split | None = None,
    filters: Filters | None = None,
    workers: int = 1,
    tasks: int | None = None,
    shards: int | None = None,
    text_column: str = "text",
    eod_token: str | None = None,
    eod_id: int | None = None,
    pattern: str | None = None,
    encoder: str = "auto",
    downloads: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    command: str | None = None,
) -> Plan:
    """Check the input, the tokenizer and the output, and decide on the tasks; nothing is written.

    Args:
        inputs: files, folders or globs of parquet or JSON lines with a string column of text, or
            `hf://datasets/OWNER/NAME[@REVISION]/FOLDER`.
        tokenizer: a file of one of four formats, or a folder that holds one (see `open_tokenizer`).
        output_prefix: P, as in Megatron's ``--data-path P``.
        split: parts `P_NAME` by document id (see `Split`); needs a string column `id`. Default: one output.
        filters: thresholds; null and empty texts are always dropped.
        workers: how many will work at a time, for the default of `tasks`.
        tasks: into how many tasks the work is cut; the output does not depend on it. Default: see `default_tasks`.
        shards: that many pairs `P_00000.bin`, ..., one for each task, in place of one pair.
        text_column: name of the column of text.
        eod_token, eod_id, pattern, encoder: see `open_tokenizer`.
        downloads: keep files of the hub in this folder; default: each is removed when its rows are encoded.
        overwrite: an existing output, and an unfinished run, may be replaced.
        resume: an unfinished run may go on: its number of tasks is the default.
        command: recorded in the manifest.

    Raises:
        UserError: bad input, or an output that exists.
    """
    prefix, filters = _named(output_prefix), filters or Filters()
    check_absent(final_paths(str(prefix), outputs(str(prefix), split, shards)), overwrite or resume)
    columns = columns_for(filters, text_column, with_id=split is not None)
    sources = open_sources(inputs, columns)
    info = open_tokenizer(tokenizer, eod_token, encoder, pattern=pattern, eod_id=eod_id)
    earlier = Work(work_folder(prefix)).earlier_plan() if resume else None
    count = shards or tasks or (len(earlier.tasks) if earlier else default_tasks(sources, workers))
    return Plan(
        Job(info, columns, filters, split or WHOLE),
        tuple(dataclasses.replace(source, pieces=()) for source in sources),
        cut(sources, count),
        str(prefix),
        shards is not None,
        str(Path(downloads).resolve()) if downloads else None,
        overwrite or (earlier is not None and earlier.overwrite),
        command,
    )


def _named(output_prefix: str | Path) -> Path:
    """The prefix, which must not be a folder."""
    prefix = Path(output_prefix)
    if prefix.is_dir() or not prefix.name:
        raise UserError(f"expected --output-prefix FOLDER/NAME, got the folder {prefix}; add a name for the files")
    return prefix


def run(
    plan: Plan,
    executor: Executor | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    clock: Stopwatch | None = None,
) -> dict:
    """Do what a plan says, on this machine or on Ray.

    Args:
        executor: default: one process, this one. More workers of this machine need an importable `__main__`.
        resume: go on with an unfinished run: only its unfinished tasks are done. An output that is finished already is
            returned as it is.
        progress: show a bar on standard error when that is a terminal.
        clock: gets the seconds of each stage, of all workers together.

    Returns:
        The manifest (see `build_manifest`), as written.

    Raises:
        UserError: damaged input, an output that exists or cannot be written, an unfinished run where `resume` is not
            set or that was another one. Finished tasks stay in `P.work`, for `resume`; nothing else is left.
    """
    remove_finished(work_folder(Path(plan.prefix)))
    if resume and (manifest := _finished(plan)):
        return manifest
    with locked(Path(plan.prefix)) as work:
        _adopt(work, plan, resume)
        with _kept(work, len(plan.tasks)):
            engine.run_tasks(work, plan, executor or Executor(), progress)
            return finish_run(work, Stopwatch() if clock is None else clock)


def submit(plan: Plan, executor: Executor, *, resume: bool = False) -> str:
    """Send a plan to Slurm; the last job's id. The output is there when that job has ended.

    Raises:
        UserError: as `run`, or sbatch refuses.
    """
    with locked(Path(plan.prefix)) as work:
        _adopt(work, plan, resume)
    try:
        return engine.submit(work, plan, executor)  # not held: the last job will hold it
    except UserError:
        with locked(Path(plan.prefix)):  # so removed, if no task is done
            raise


def _finished(plan: Plan) -> dict | None:
    """The manifest of an output that this very plan has made, where nothing is left to be done."""
    path = final_paths(plan.prefix, plan.outputs())[-1]
    if work_folder(Path(plan.prefix)).exists() or not path.is_file():
        return None
    manifest, job = read_manifest(path), plan.job
    if not all(_is_there(path.parent, item[kind]) for item in manifest.get("outputs") or () for kind in ("bin", "idx")):
        return None
    made = (
        manifest.get("filters"),
        manifest.get("split"),
        manifest.get("text_column"),
        (manifest.get("eod_id"), (manifest.get("tokenizer") or {}).get("sha256")),
        [(source["file"], source["bytes"]) for source in manifest.get("sources") or ()],
        [item["bin"]["file"] for item in manifest.get("outputs") or ()],
    )
    wanted = (
        job.filters.as_json(),
        dict(zip(job.split.names, job.split.shares, strict=True)) if job.columns.id else None,
        job.columns.text,
        (job.tokenizer.eod_id, job.tokenizer.sha256),
        [(source.path, source.size_bytes) for source in plan.sources],
        [Path(output.stem).name + ".bin" for output in plan.outputs()],
    )
    return manifest if made == wanted else None


def _is_there(folder: Path, entry: dict) -> bool:
    file = folder / entry["file"]
    return file.is_file() and file.stat().st_size == entry["bytes"]


def _adopt(work: Work, plan: Plan, resume: bool) -> None:
    """Make the work folder one of this plan: keep what it holds of it, or refuse."""
    done, mark = work.done(), work.folder / "publishing"
    if done and not resume and not plan.overwrite:
        raise UserError(
            f"expected no unfinished run, got {len(done)} finished tasks in {work.folder}; --resume goes on with them, "
            "--overwrite begins again"
        )
    if resume and done and (problem := plan.same_work(work.plan())):
        raise UserError(
            f"expected the unfinished run in {work.folder} to be this one, got other {problem}; repeat its command "
            "with --resume, or begin again with --overwrite"
        )
    if not resume:
        work.forget()
        mark.unlink(missing_ok=True)
    check_absent(final_paths(plan.prefix, plan.outputs()), plan.overwrite or mark.exists())
    work.write_plan(plan)
    for number in work.done():
        if not is_done(work, plan, number):
            work.forget(number)


@contextmanager
def _kept(work: Work, tasks: int) -> Iterator[None]:
    """Say what a run that ends early leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        if done := work.done():
            logger.warning("%d of %d tasks are kept in %s: --resume goes on", len(done), tasks, work.folder)
        raise
    except UserError as error:
        if done := work.done():
            kept = f"{len(done)} of {tasks} tasks are kept in {work.folder}: --resume goes on, --overwrite begins again"
            raise UserError(f"{error} ({kept})") from error
        raise
