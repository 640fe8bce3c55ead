"""This machine, or machines that someone starts by hand: the node script, run here."""

from megatron_act.launch import node
from megatron_act.launch.job import Job

SUFFIX = ".sh"


def render(job: Job) -> str:
    """The node script. With several nodes each sets NODE_RANK and RDZV_HOST in its environment."""
    return node.script(job, _alone() if job.nodes == 1 else _several(job))


def _alone() -> list[str]:
    port = 'RDZV_PORT="${RDZV_PORT:-$((20000 + 2 * ($$ % 6000)))}"'
    return [
        *_value("NODE_RANK", "0"),
        *_value("NODE_ADDR", "localhost"),
        *_value("RDZV_HOST", "localhost"),
        port,
        *_end(),
    ]


def _several(job: Job) -> list[str]:
    return [
        "# Start it on every machine with NODE_RANK=0, 1, ... and RDZV_HOST=the name of machine 0.",
        'NODE_RANK="${NODE_RANK:?expected the number of this machine, from 0}"',
        'RDZV_HOST="${RDZV_HOST:?expected the name of machine 0}"',
        'NODE_ADDR="${NODE_ADDR:-$(hostname)}"',
        *_value("RDZV_PORT", str(job.settings.port)),
        *_end(),
    ]


def _end() -> list[str]:
    return [*_value("RDZV_ID", "local"), "PREEMPTED=0"]


def _value(name: str, default: str) -> list[str]:
    return [f'{name}="${{{name}:-{default}}}"']


def submit(path: str, job: Job) -> list[str]:
    """The command that runs it."""
    return ["bash", path]
