"""SkyPilot: a task for a managed job, which finds machines again when spot ones are taken away."""

from typing import Any

from megatron_act.launch import node, yaml_text
from megatron_act.launch.job import Job

SUFFIX = ".yaml"
PREEMPTED = 143

_PLACE = [
    'NODE_RANK="$SKYPILOT_NODE_RANK"',
    'NODE_ADDR="$(sed -n "$((SKYPILOT_NODE_RANK + 1))p" <<<"$SKYPILOT_NODE_IPS")"',
    'RDZV_HOST="$(head -n 1 <<<"$SKYPILOT_NODE_IPS")"',
]


def render(job: Job) -> str:
    """The task; ``workdir`` is uploaded and is the working directory of the script."""
    settings = job.settings
    place = [
        *_PLACE,
        f"RDZV_PORT={settings.port}",
        f"RDZV_ID={job.name}",
        f"PREEMPTED={PREEMPTED} # job_recovery starts the task again",
    ]
    task: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "workdir": settings.workdir,
        "resources": _resources(job),
    }
    if settings.buckets:  # cached: a checkpoint is written at disk speed and uploaded behind
        sources = {path: {"source": source, "mode": "MOUNT_CACHED"} for path, source in settings.buckets.items()}
        task["file_mounts"] = sources
    if settings.setup:
        task["setup"] = settings.setup
    return yaml_text.dump({**task, "run": node.script(job, place, workdir='"$PWD"')})


def _resources(job: Job) -> dict[str, Any]:
    settings = job.settings
    chosen: dict[str, Any] = {"cpus": f"{settings.cpus_per_gpu * job.gpus_per_node}+"}
    if not job.cpu:
        chosen["accelerators"] = f"{settings.accelerator}:{job.gpus_per_node}"
        chosen["network_tier"] = "best"  # the cloud's fastest network between nodes, and NCCL's plug-in for it
    if settings.infra:
        chosen["infra"] = settings.infra
    if settings.image:
        chosen["image_id"] = f"docker:{settings.image}"
    recovery = {"max_restarts_on_errors": settings.max_restarts, "recover_on_exit_codes": [PREEMPTED]}
    return {**chosen, "use_spot": settings.spot, "job_recovery": recovery}


def submit(path: str, job: Job) -> list[str]:
    """The command that starts the managed job."""
    return ["sky", "jobs", "launch", "--yes", "--detach-run", path]
