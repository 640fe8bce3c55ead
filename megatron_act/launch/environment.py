"""Environment variables of every rank, each with its reason. LAUNCH's ``env`` adds to them and overrides them.

What depends on a site (NCCL_IB_HCA, NCCL_IB_GID_INDEX, a cloud's NCCL plug-in) belongs into ``env``. So does
NCCL_SOCKET_IFNAME: unset, NCCL leaves out loopback and Docker's bridges by itself, and still runs on a machine that has
nothing else.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variable:
    """A name, its value, and why it is set."""

    name: str
    value: str
    reason: str


VARIABLES = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "Megatron overlaps tensor-parallel communication by the order of launches, which one queue keeps",
    ),
    Variable("OMP_NUM_THREADS", "1", "torchrun would set it and warn; data loaders are processes, not threads"),
    Variable("PYTHONUNBUFFERED", "1", "the last lines before a kill reach the log"),
    Variable("NCCL_DEBUG", "WARN", "names the rank and the link that failed; silent otherwise"),
    Variable("NCCL_IB_TIMEOUT", "22", "4 us x 2^22 = 17 s before a retry fails: a link that flaps does not end a run"),
    Variable("TORCH_FR_BUFFER_SIZE", "2000", "the flight recorder keeps the last collectives of each rank"),
    Variable(
        "TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "and writes them when one hangs, which shows the rank that did not come"
    ),
)


def exports(env: Mapping[str, Any]) -> list[str]:
    """Lines of shell: a comment with the reason above each export.

    Args:
        env: LAUNCH's own.
    """
    own = [Variable(str(name), str(value), "from LAUNCH.env") for name, value in env.items()]
    chosen = [item for item in VARIABLES if item.name not in env] + own
    return [line for item in chosen for line in (f"# {item.reason}", f"export {item.name}={shlex.quote(item.value)}")]
