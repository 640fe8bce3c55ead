"""Slurm: one batch script. It requeues itself when it was given notice, and resumes from its last checkpoint.

Its own log is in the folder of submission, the one that surely exists before it runs: slurmd opens the log first, and
fails the job where its folder is not there. The nodes' logs are in the run's folder, which the script makes.
"""

import re
import shlex

from megatron_act.launch import node
from megatron_act.launch.job import Job

SUFFIX = ".sbatch"
_REGISTRY = re.compile(r"^([\w-]+(?:\.[\w-]+)+(?::\d+)?|[\w-]+:\d+)/")  # a host: with a dot, or with a port

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
result="$(mktemp)" # of srun: what `wait` says is not certain when a signal comes at that moment
echo 1 >"$result"
trap 'rm -f "$result"' EXIT
trap 'notice=1; if [[ -n "$step" ]]; then pkill -USR1 -P "$step" || true; fi' USR1 TERM
(
  trap : USR1 TERM # srun's to answer, this shell writes down how it ends
  trap - EXIT
  code=0
"""
_WAIT = r"""  echo "$code" >"$result"
) &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done # a trapped signal ends the waiting only
code="$(cat "$result")"
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
            f"  {' '.join(_srun(job))} bash {script} || code=$?",
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
        "--output=%x-%j.log",
    ]


def _srun(job: Job) -> list[str]:
    """srun with a log a node, and with the container."""
    settings = job.settings
    words = ["srun", "--kill-on-bad-exit=1", "--open-mode=append", '--output="$RUN_DIR/logs/%x-%j-node%n.log"']
    mounts = [settings.workdir, settings.output, *settings.mounts]
    if settings.runtime == "pyxis":
        pairs = ",".join(path if ":" in path else f"{path}:{path}" for path in mounts)
        words += [
            f"--container-image={shlex.quote(_pyxis_image(settings.image))}",
            f"--container-mounts={shlex.quote(pairs)}",
        ]
    if settings.runtime == "apptainer":
        words += ["apptainer", "exec", "--nv", "--bind", shlex.quote(",".join(mounts)), shlex.quote(settings.image)]
    return words


def _pyxis_image(image: str) -> str:
    """REGISTRY#NAME:TAG of REGISTRY/NAME:TAG: without the # enroot up to 3 looks for all of it on Docker Hub."""
    return _REGISTRY.sub(r"\1#", image)


def submit(path: str, job: Job) -> list[str]:
    """The command that queues it."""
    return ["sbatch", path]
