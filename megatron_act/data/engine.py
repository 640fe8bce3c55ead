"""Who does the tasks: datatrove's executors, on this machine, on Slurm or on Ray.

datatrove gives each task to a worker and marks it complete; the task itself (`run_task`) reads the plan from the work
folder, so nothing else has to reach the worker, and any machine that shares the file system can do it.
"""

import os
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats
from loguru import logger

from megatron_act.data import pool
from megatron_act.data.bar import shown
from megatron_act.data.join import finish_run
from megatron_act.data.plan import Plan
from megatron_act.data.stopwatch import Stopwatch
from megatron_act.data.task import is_done, run_task
from megatron_act.data.work import Work, locked
from megatron_act.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # where megatron_act lies, for workers elsewhere
if "SLURM_JOB_ID" not in os.environ:
    logger.disable("datatrove")  # its log lines; a Slurm job keeps them, for its log file


@dataclass(frozen=True)
class Executor:
    """Where the tasks run.

    Attributes:
        kind: "local", "slurm" or "ray".
        workers: tasks at a time; the output does not depend on it.
        slurm: options of sbatch; `partition` and `time` are needed.
    """

    kind: str = "local"
    workers: int = 1
    slurm: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = {"partition", "time"} - self.slurm.keys() if self.kind == "slurm" else set()
        if missing:
            raise UserError(
                "expected --slurm partition=NAME time=HH:MM:SS, got no "
                f"{' and no '.join(sorted(missing))}; give what your cluster's sbatch wants"
            )


class EncodeStep(PipelineStep):
    """datatrove's unit of work: task number `rank` of the plan."""

    type, name = "TOKENIZE", "rows to token files"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.cwd = folder, os.getcwd()  # the plan's paths may be relative

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        """Do the task and count it in datatrove's statistics."""
        os.chdir(self.cwd)
        work = Work(Path(self.folder))
        result = run_task(work, work.plan(), rank)
        if result is not None:
            self.stat_update("rows", value=result.rows)
            self.stat_update("tokens", value=sum(part["tokens"] for part in result.parts))


class FinishStep(PipelineStep):
    """Join and publish, as the last job on Slurm."""

    type, name = "FINISH", "task files to the output"

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix, self.cwd = prefix, os.getcwd()

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        """Hold the output and finish it."""
        os.chdir(self.cwd)
        with locked(Path(self.prefix)) as work:
            finish_run(work, Stopwatch())


def run_tasks(work: Work, plan: Plan, executor: Executor, progress: bool) -> None:
    """Do all unfinished tasks here or on Ray, and return when they are done.

    Raises:
        UserError: of a task.
        WorkerKilled: a worker of this machine ended without a word.
    """
    rows = [source.rows for source in plan.sources]
    total = None if None in rows else sum(row or 0 for row in rows)
    build = _local if executor.kind == "local" else _ray
    with shown(work, total, progress):
        build(work, plan, executor).run()


def _local(work: Work, plan: Plan, executor: Executor) -> PipelineExecutor:
    step, workers = EncodeStep(str(work.folder)), min(executor.workers, len(plan.tasks))
    return OnThisMachine([step], len(plan.tasks), workers, logging_dir=_logs(work, plan))


class OnThisMachine(LocalPipelineExecutor):
    """The local executor with this project's pool in place of its own, and without a log file for each task.

    One worker is this process. (datatrove forks a manager process: every page that the tokenizer writes to would be
    copied, encoding takes 15 % longer. Opening the log takes 10 ms.)
    """

    def run(self) -> None:
        """Do what is not complete."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                self.run_rank(rank)
        else:
            pool.each(self.run_in_worker, ranks, self.workers)

    def run_in_worker(self, rank: int) -> None:
        """Do one task with one thread for the tokenizer."""
        os.environ.setdefault("RAYON_NUM_THREADS", "1")  # read when the tokenizer is first used
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.run_rank(rank)

    def run_rank(self, rank: int) -> None:
        """Do one task, write its statistics and mark it complete."""
        steps = deepcopy(self.pipeline)  # each task has statistics of its own
        for step in steps:
            step(None, rank, self.world_size)
        with self.logging_dir.open(f"stats/{rank:05d}.json", "w") as file:
            PipelineStats(steps).save_to_disk(file)
        self.mark_rank_as_completed(rank)


def _ray(work: Work, plan: Plan, executor: Executor) -> PipelineExecutor:
    try:
        import ray
    except ImportError as error:
        raise UserError("expected the ray package for --executor ray, got none; pip install ray") from error
    from datatrove.executor.ray import RayPipelineExecutor

    if not ray.is_initialized():
        code = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {"env_vars": {"PYTHONPATH": code}}
        ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=environment)  # RAY_ADDRESS names a cluster
    step = EncodeStep(str(work.folder.resolve()))
    return RayPipelineExecutor([step], len(plan.tasks), executor.workers, logging_dir=_logs(work, plan))


def submit(work: Work, plan: Plan, executor: Executor) -> str:
    """Send all unfinished tasks to Slurm, and after them the job that joins and publishes; its id.

    Scripts and logs go to `P.slurm`, which stays. The folder of the work, `P.work`, must be shared by all nodes.

    Raises:
        UserError: sbatch is missing or refuses.
    """
    from datatrove.executor.slurm import SlurmPipelineExecutor

    options = {"kill-on-invalid-dep": "yes", **executor.slurm}  # no join waits for ever for a failed task
    common: dict[str, Any] = {"partition": options.pop("partition"), "time": options.pop("time")}
    common |= {"sbatch_args": options, "qos": None, "env_command": _environment()}
    logs = Path(f"{plan.prefix}.slurm").resolve()
    _mark_completed(logs / "encode", work, plan)
    encode = SlurmPipelineExecutor(
        [EncodeStep(str(work.folder.resolve()))],
        len(plan.tasks),
        workers=executor.workers,
        job_name="tokenize",
        logging_dir=str(logs / "encode"),
        **common,
    )
    join = SlurmPipelineExecutor(
        [FinishStep(str(Path(plan.prefix).resolve()))],
        1,
        job_name="join",
        logging_dir=str(logs / "join"),
        skip_completed=False,
        depends=encode,
        **common,
    )
    try:
        join.run()
    except Exception as error:  # a missing command, its exit code, an answer that is not understood
        raise UserError(f"expected sbatch to take the jobs, got {error}; correct --slurm, then use --resume") from error
    return str(join.job_id)


def _environment() -> str:
    """The same interpreter and the same code in a job."""
    scripts = Path(sys.executable).parent
    return f'export PATH="{scripts}:$PATH" PYTHONPATH="{ROOT}:$PYTHONPATH" RAYON_NUM_THREADS=1'


def _logs(work: Work, plan: Plan) -> str:
    folder = work.folder.resolve() / "datatrove"
    _mark_completed(folder, work, plan)
    return str(folder)


def _mark_completed(logs: Path, work: Work, plan: Plan) -> None:
    """Tell datatrove what is done: exactly the tasks whose result is whole."""
    marks = logs / "completions"
    marks.mkdir(parents=True, exist_ok=True)
    for mark in marks.iterdir():
        mark.unlink()
    for number in work.done():
        if is_done(work, plan, number):
            (marks / f"{number:05d}").touch()
