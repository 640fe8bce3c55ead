"""Slurm: one batch script. It requeues itself when it was given notice, and resumes from its last checkpoint."""

import shlex

from megatron_act.launch import node
from megatron_act.launch.job import Job

SUFFIX = ".sbatch"

_PLACE = [
    'NODE_RANK="$SLURM_NODEID"',
    'NODE_ADDR="$SLURMD_NODENAME"',
    ': "${RDZV_HOST:?set by the batch script}" "${RDZV_PORT:?}" "${RDZV_ID:?}"',
    "PREEMPTED=0 # the batch script requeues",
]
_HEAD = r"""
export RDZV_HOST RDZV_PORT RDZV_ID
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
RDZV_HOST="${hosts%%$'\n'*}" # a pipe into head would end this script where head closes it first
RDZV_PORT="$((20000 + 2 * (SLURM_JOB_ID % 6000)))" # and the next: two jobs on a node do not meet
RDZV_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
"""
_RUN = r"""
# Notice comes before the time limit (--signal) or with a preemption (SIGTERM); srun hands SIGUSR1 to the node scripts.
notice=0
step=""
trap 'notice=1; interrupted=1; if [[ -n "$step" ]]; then kill -USR1 "$step" || true; fi' USR1 TERM
"""
_WAIT = r"""step=$!
while true; do # a trapped signal ends the waiting, not what is waited for
  code=0
  interrupted=0
  wait "$step" || code=$?
  if [[ "$interrupted" == 0 ]]; then break; fi
done
if [[ "$notice" == 1 && "$code" == 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID" # it goes on from the checkpoint that the ranks have just written
fi
exit "$code"
"""


def render(job: Job) -> str:
    """The batch script."""
    script = f'"$RUN_DIR/node-{job.name}.sh"'
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {job.name} on {job.nodes} nodes. Written by python -m megatron_act.launch; submit it with sbatch.",
            *(f"#SBATCH {line}" for line in _directives(job)),
            "set -euo pipefail",
            f"RUN_DIR={shlex.quote(job.folder)}",
            'mkdir -p "$RUN_DIR/logs"',
            _HEAD,
            f"cat >{script} <<'NODE_SCRIPT'",
            node.script(job, _PLACE) + "NODE_SCRIPT",
            _RUN,
            f"{' '.join(_srun(job))} bash {script} &",
            _WAIT,
        ]
    )


def _directives(job: Job) -> list[str]:
    settings = job.settings
    optional = ("partition", "account", "qos", "constraint")
    return [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *([] if job.cpu else [f"--gpus-per-node={job.gpus_per_node}"]),
        f"--cpus-per-task={settings.cpus_per_gpu * job.gpus_per_node}",
        "--mem=0",
        "--exclusive",
        f"--time={settings.time}",
        *(f"--{name}={getattr(settings, name)}" for name in optional if getattr(settings, name)),
        "--requeue",
        f"--signal=B:USR1@{settings.grace_seconds}",
        "--open-mode=append",
        f"--output={job.folder}/logs/%x-%j.log",
    ]


def _srun(job: Job) -> list[str]:
    """srun with a log a node, and with the container."""
    settings = job.settings
    words = ["srun", "--kill-on-bad-exit=1", "--open-mode=append", '--output="$RUN_DIR/logs/%x-%j-node%n.log"']
    mounts = [settings.workdir, settings.output, *settings.mounts]
    if settings.runtime == "pyxis":
        pairs = ",".join(path if ":" in path else f"{path}:{path}" for path in mounts)
        words += [f"--container-image={shlex.quote(settings.image)}", f"--container-mounts={shlex.quote(pairs)}"]
    if settings.runtime == "apptainer":
        words += ["apptainer", "exec", "--nv", "--bind", shlex.quote(",".join(mounts)), shlex.quote(settings.image)]
    return words


def submit(path: str, job: Job) -> list[str]:
    """The command that queues it."""
    return ["sbatch", path]
