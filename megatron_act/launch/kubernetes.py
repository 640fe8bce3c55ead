"""Kubernetes: a ConfigMap with the node script, and a PyTorchJob (Kubeflow training operator v1) or a JobSet.

Both give every node a pod with a name of its own in DNS; node 0's is the rendezvous. The operator also sets torchrun's
variables (PET_*), which the flags of our line override. A pod that is evicted gets SIGTERM: its ranks save, and exit
code 143 makes the controller start the pods again.

A preemption is no failure, but both controllers have one limit for all restarts, and one that is reached ends the job:
`PREEMPTIONS` is large for that. The training operator (1.9, pkg/core/job.go) adds up the restarts of all pods, so that
a preemption costs one for each node that stays; a JobSet counts starts of the whole set. Where a lost machine's
replacement is late, its preflight gives up after ``rendezvous_seconds`` and that counts too. Failures in one start are
limited by torchrun's ``max_restarts``; a job that fails at every start, e.g. by a wrong path, is to be deleted by hand.
"""

from typing import Any

from megatron_act.launch import node, yaml_text
from megatron_act.launch.job import Job

SUFFIX = ".yaml"
MOUNT, SCRIPT = "/etc/megatron-act", "node.sh"
CONTAINER = "pytorch"  # the name that the training operator looks for
PREEMPTIONS = 100  # that a job survives
SHARED_MEMORY = {"name": "shm", "emptyDir": {"medium": "Memory"}}  # data loaders and NCCL; a container's own is 64 MB


def render_pytorchjob(job: Job) -> str:
    """ConfigMap and PyTorchJob; the first node is the Master replica."""
    place = [*_place(f"{job.name}-master-0"), 'NODE_RANK="$PET_NODE_RANK" # set by the training operator']
    replicas = {"Master": 1, "Worker": job.nodes - 1}
    specs = {
        kind: {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": _pod(job)}}
        for kind, count in replicas.items()
        if count
    }
    spec = {"runPolicy": {"cleanPodPolicy": "None", "backoffLimit": PREEMPTIONS * job.nodes}}
    return yaml_text.dump(
        _config_map(job, node.script(job, [*place, *_end(job)])),
        _object("kubeflow.org/v1", "PyTorchJob", job, {"spec": spec | {"pytorchReplicaSpecs": specs}}),
    )


def render_jobset(job: Job) -> str:
    """ConfigMap and JobSet; nodes are the indexes of one indexed Job."""
    place = [*_place(f"{job.name}-node-0-0.{job.name}"), 'NODE_RANK="$JOB_COMPLETION_INDEX" # set by Kubernetes']
    template = {
        "spec": {
            "parallelism": job.nodes,
            "completions": job.nodes,
            "completionMode": "Indexed",
            "backoffLimit": 0,  # one pod alone cannot go on: the JobSet starts all of them again
            "template": {"spec": {"restartPolicy": "Never", **_pod(job)}},
        }
    }
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": PREEMPTIONS},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": template}],
    }
    return yaml_text.dump(
        _config_map(job, node.script(job, [*place, *_end(job)])),
        _object("jobset.x-k8s.io/v1alpha2", "JobSet", job, {"spec": spec}),
    )


def _place(first: str) -> list[str]:
    return [f"RDZV_HOST={first}", 'NODE_ADDR="$POD_IP"']


def _end(job: Job) -> list[str]:
    return [
        f"RDZV_PORT={job.settings.port}",
        f"RDZV_ID={job.name}",
        "PREEMPTED=143 # the controller starts the pods again",
    ]


def _object(api: str, kind: str, job: Job, body: dict[str, Any]) -> dict[str, Any]:
    name = job.name if kind != "ConfigMap" else f"{job.name}-node"
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": job.settings.namespace}, **body}


def _config_map(job: Job, script: str) -> dict[str, Any]:
    return _object("v1", "ConfigMap", job, {"data": {SCRIPT: script}})


def _pod(job: Job) -> dict[str, Any]:
    settings = job.settings
    claims = [
        {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, claim in enumerate(settings.claims)
    ]
    return {
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "containers": [_container(job)],
        "volumes": [{"name": "script", "configMap": {"name": f"{job.name}-node"}}, SHARED_MEMORY, *claims],
    }


def _container(job: Job) -> dict[str, Any]:
    settings, cores = job.settings, job.settings.cpus_per_gpu * job.gpus_per_node
    paths = [
        {"name": "script", "mountPath": MOUNT},
        {"name": "shm", "mountPath": "/dev/shm"},
        *({"name": f"claim-{number}", "mountPath": path} for number, path in enumerate(settings.claims.values())),
    ]
    gpus = {} if job.cpu else {"nvidia.com/gpu": job.gpus_per_node}
    return {
        "name": CONTAINER,
        "image": settings.image or "IMAGE",
        "command": ["bash", f"{MOUNT}/{SCRIPT}"],
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "resources": {"requests": {"cpu": cores}, "limits": gpus | settings.resources},
        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},  # InfiniBand pins memory
        "volumeMounts": paths,
    }


def submit(path: str, job: Job) -> list[str]:
    """The command that creates both objects."""
    return ["kubectl", "apply", "-f", path]
