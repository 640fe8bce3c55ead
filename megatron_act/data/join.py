"""The end of a run: every task's tokens into the output's files, the manifest, and all of it under the final names."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_act.data.indexed import Part, single_documents, token_dtype, write_pair
from megatron_act.data.manifest import all_dropped, build_manifest, read_manifest, write_manifest
from megatron_act.data.plan import Output, Plan, final_paths
from megatron_act.data.staging import check_absent, publish, sync
from megatron_act.data.stopwatch import Stopwatch
from megatron_act.data.task import is_done
from megatron_act.data.work import Work, finish, room
from megatron_act.errors import UserError


def finish_run(work: Work, clock: Stopwatch) -> dict:
    """Join what the tasks wrote, publish it and remove the work folder.

    Args:
        clock: gets the seconds of the tasks' stages and of this one's.

    Returns:
        The manifest (see `build_manifest`), as written.

    Raises:
        UserError: a task is not done, a part has no documents, the output exists, or the disk is full.
    """
    plan = work.plan()
    results = _results(work, plan)
    staging = work.folder / "out"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    with room(work.folder):
        with clock.stage("join"):
            outputs = [_write(work, plan, results, output, staging) for output in plan.outputs()]
            manifest = build_manifest(plan, outputs, results)
            finals = final_paths(plan.prefix, plan.outputs())
            staged = [staging / final.name for final in finals]
            write_manifest(staged[-1], manifest)
        with clock.stage("publish"):
            _publish(work, plan, staged, finals)
    for result in results:
        clock.update(result["seconds"])
    finish(work)
    return manifest


def _results(work: Work, plan: Plan) -> list[dict]:
    missing = [number for number in range(len(plan.tasks)) if not is_done(work, plan, number)]
    if missing:
        reasons = work.errors()
        first = reasons.get(missing[0], next(iter(reasons.values()), "no reason noted: its process was ended"))
        raise UserError(f"expected {len(plan.tasks)} finished tasks, got {len(missing)} unfinished: {first}")
    results = [result for number in range(len(plan.tasks)) if (result := work.result(number)) is not None]
    expected = sum(source.rows or 0 for source in plan.sources)
    counted = sum(
        seen["rows"]
        for result in results
        for number, seen in result["sources"].items()
        if plan.sources[int(number)].rows is not None
    )
    if expected != counted:
        raise RuntimeError(f"{counted} rows were read where the files hold {expected}")
    return results


def _write(work: Work, plan: Plan, results: Sequence[dict], output: Output, staging: Path) -> dict[str, object]:
    """Write one pair of files; its entry in the manifest."""
    part, tasks = plan.job.split.names.index(output.name), plan.tasks_of(output)
    counts = [results[task]["parts"][part] for task in tasks]
    documents, tokens = (sum(count[key] for count in counts) for key in ("documents", "tokens"))
    if not documents:
        work.forget()  # no use to a run that goes on
        raise UserError(_nothing(output, plan, results))
    parts = [_part(work.task(task), part, count["documents"]) for task, count in zip(tasks, counts, strict=True)]
    known = counts[0]["checksum"] if len(tasks) == 1 else None
    files = write_pair(staging / Path(output.stem).name, parts, token_dtype(plan.job.tokenizer.vocab_size), known)
    return {"name": output.name, "documents": documents, "tokens": tokens, **files}


def _part(folder: Path, part: int, documents: int) -> Part:
    return single_documents(folder / f"{part}.bin", folder / f"{part}.len", documents)


def _nothing(output: Output, plan: Plan, results: Sequence[dict]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in all_dropped(results).items()) or "none"
    where = f"part '{output.name}'" + ("" if output.shard is None else f", shard {output.shard}")
    advice = "loosen filters or split" + (", or ask for fewer shards" if plan.shards else "")
    return f"expected documents in {where}, got 0 (dropped: {reasons}); {advice}"


def _publish(work: Work, plan: Plan, staged: Sequence[Path], finals: Sequence[Path]) -> None:
    mark = work.folder / "publishing"
    check_absent(finals, plan.overwrite or mark.exists())  # another run may have finished meanwhile
    mark.touch()
    sync(work.folder)
    publish(staged, finals, _superseded(finals))


def _superseded(finals: Sequence[Path]) -> list[Path]:
    """What the manifest that is replaced lists and the new one does not: other shards, parts of another split."""
    try:
        outputs = read_manifest(finals[-1])["outputs"]
        old = [finals[-1].with_name(Path(item[kind]["file"]).name) for item in outputs for kind in ("bin", "idx")]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # none, or not ours
    return [path for path in old if path not in finals]
