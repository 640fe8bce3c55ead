"""How the nodes of a job find each other: node 0 is waited for, and one line says which of them did not come.

torchrun alone tries to reach node 0 with a C++ stack for every try, and ends with a traceback that names neither.
"""

import socket
import sys
import time
from argparse import Namespace

from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)

_TRY_S = 5
_UNREACHED = "look whether node 0 runs, RDZV_HOST is its name in the nodes' network, and the port is open there"
_ALONE = "look at the other nodes' logs: each must run this job with the same RDZV_ID and reach that address"


def await_node_0(options: Namespace) -> None:
    """Returns when the rendezvous' port takes connections; at once on node 0, or where nobody said who that is.

    Args:
        options: torchrun's own: ``rdzv_endpoint``, ``rdzv_conf``.

    Raises:
        RendezvousConnectionError: it did not within ``read_timeout``.
    """
    if _conf(options).get("is_host") != "0":
        return
    host, _, port = options.rdzv_endpoint.rpartition(":")
    seconds, waiting = _seconds(options, "read_timeout"), False
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=_TRY_S):
                return
        except OSError as error:
            reason = error.strerror or str(error)
            if time.monotonic() > end:
                raise RendezvousConnectionError(f"none within {seconds} s ({reason})") from None
            if not waiting:
                print(
                    f"rendezvous: waiting for node 0 at {options.rdzv_endpoint} ({reason})", file=sys.stderr, flush=True
                )
            waiting = True
        time.sleep(1)


def sentence(error: RendezvousError, options: Namespace) -> str:
    """What was expected, what came, what to do.

    Args:
        error: torchrun's or ours, at the start, or after a failure when the ranks are to be started again.
        options: torchrun's own: ``rdzv_endpoint``, ``rdzv_conf``, ``nnodes``.
    """
    place = f"rendezvous at {options.rdzv_endpoint}"
    if isinstance(error, RendezvousConnectionError):
        reason = str(error.__cause__ or error).partition("\n")[0]  # a C++ stack follows
        return f"{place}: expected an answer, got {reason}: {_UNREACHED}"
    if isinstance(error, RendezvousTimeoutError):
        seconds = _seconds(options, "join_timeout")
        return f"{place}: expected {options.nnodes} nodes within {seconds} s, got fewer: {_ALONE}"
    if isinstance(error, RendezvousClosedError):
        return f"{place}: expected to join, got a job that the other nodes have ended: start all of them again"
    return f"{place}: expected to join, got {type(error).__name__} ({error}): look at node 0's log"


def _conf(options: Namespace) -> dict[str, str]:
    return dict(item.split("=") for item in options.rdzv_conf.split(",") if "=" in item)


def _seconds(options: Namespace, name: str) -> int:
    defaults = {"read_timeout": 60, "join_timeout": 600}  # torchrun's
    return int(_conf(options).get(name, defaults[name]))
