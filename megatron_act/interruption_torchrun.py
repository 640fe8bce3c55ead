"""torchrun in this process, with a SIGTERM that lets the ranks save and ends with exit code 0.

torchrun answers a SIGTERM by sending it to its ranks, SIGKILL 30 s later, and then fails by the signal, whether or not
all of them have saved. Here the ranks alone receive it, as long as they need is waited for, and what counts is how they
end. The scheduler's own grace time remains the limit.

torch 2.13 keeps one store for all starts of the ranks: after a restart gloo finds the addresses of dead ones in it and
waits for them. ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, set here, gives every start its own.

Nodes that do not find each other, at the start or after a failure, are a line with what to look at.

A rank without a handler yet, in the first seconds of its start, dies by the signal; torchrun may restart it then.
"""

import os
import signal
import sys
from types import FrameType

from torch.distributed import run as elastic
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from megatron_act.errors import FAILED, OK
from megatron_act.rendezvous import await_node_0, sentence

# Ranks that hang after another one has failed are given this long: their SIGTERM only asks them to save.
_AFTER_FAILURE_S = 5
_WORDS = ("--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", "--shutdown-timeout", str(_AFTER_FAILURE_S))


def run(words: list[str]) -> int:
    """Runs torchrun with its own command line and returns the exit code.

    Args:
        words: what follows ``torchrun`` on a command line; a ``--shutdown-timeout`` among them wins.

    Returns:
        0 if all ranks ended with 0, after a SIGTERM or without; 1 if one failed and no restart was left, the nodes did
        not find each other, or another signal came (Ctrl-C).
    """
    signal.signal(signal.SIGTERM, _to_ranks)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = elastic.parse_args(words)
    try:
        await_node_0(options)
        elastic.main([*_WORDS, *words])
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        return FAILED
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        print(
            f"error: ended by {name}, the ranks too, without a save: SIGTERM lets them save",
            file=sys.stderr,
            flush=True,
        )
        return FAILED
    except RendezvousError as error:
        print(f"error: {sentence(error, options)}", file=sys.stderr, flush=True)
        return FAILED
    return OK


def _to_ranks(number: int, frame: FrameType | None) -> None:
    """torchrun's children are its ranks; before there are any, nothing is lost by ending."""
    ranks = _children()
    for rank in ranks:
        os.kill(rank, number)
    if not ranks:
        sys.exit(OK)


def _children() -> list[int]:
    found = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
            found += [int(word) for word in file.read().split()]
    return found


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
