"""SIGTERM, as preemption sends it: every rank finishes its step, saves and ends with exit code 0.

Megatron's ``--exit-signal-handler`` does this where it is given; the entry point always gives it. Its handler only sets
a mark, which is read after each step and its evaluation: the grace time must be longer than a step, an evaluation and a
save. torchrun itself sends SIGKILL after 30 s and then fails by the signal: ``interruption_torchrun`` does neither.
"""

import torch
from megatron.training import global_vars
from megatron.training.dist_signal_handler import DistributedSignalHandler

FLAGS = ("--exit-signal-handler",)


class AgreedSignal(DistributedSignalHandler):
    """The mark of any rank, by one all-reduce; Megatron's own gathers all ranks' and reads each from the GPU."""

    def signals_received(self) -> list[bool]:
        """Whether some rank has received the signal, as a list of one; collective."""
        received = torch.tensor([self._signal_received], dtype=torch.int32, device=torch.cuda.current_device())
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return [bool(received.item())]


def install() -> None:
    """Makes Megatron's handler the one above; called before Megatron is initialized."""
    global_vars.DistributedSignalHandler = AgreedSignal
