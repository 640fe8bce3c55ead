"""Entry point: ``torchrun ... -m megatron_act.pretrain_gpt --activation xielu [--config FILE] [any Megatron flag]``.

Megatron's own GPT pretraining (``megatron.training.pretrain``) with this project's flags. It must stay importable
without side effects but one: Megatron's checkpoint writer spawns processes that import this module again, and those
need the CPU backend if the parent has it.
"""

import os
import signal
import sys
import time

import torch.distributed as dist

from megatron_act import arguments, cpu_backend, te
from megatron_act.compat import install_typing_override
from megatron_act.errors import BAD_INPUT, UserError

PROGRAM_START = time.time()
FIRST_RANK_S = 5

install_typing_override()
cpu_backend.install_if_requested()


def main(argv: list[str]) -> int:
    """Trains as the command line says, or with ``--preflight-only`` runs the preflight's checks.

    Returns:
        0, or 2 where a check failed.

    Raises:
        UserError: a flag, file or combination that cannot work.
    """
    flags, cpu = arguments.peek(argv)
    if "--preflight-only" in argv or flags.get("--preflight-only") is True:
        from megatron_act import preflight  # imports Megatron itself, after its first checks

        return preflight.main(argv)
    te.check_before_megatron(cpu)
    if cpu:
        cpu_backend.install()
    from megatron_act import training_run  # imports Megatron: after the backend's patches

    try:
        training_run.run(flags, argv, program_start=PROGRAM_START)
    except SystemExit as end:  # Megatron's way to end a run early
        if not end.code:
            _leave_groups()
        raise
    _leave_groups()
    return 0


def _leave_groups() -> None:
    """Threads of gloo groups that are alive when the process ends abort it: a good run would exit with -6."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _entry() -> int:
    """Exit code 2 and one line per host for bad input; anything else keeps the traceback that a job needs."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        print(f"error: {_speaker()}{error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    finally:
        _ignore_late_notices()


def _ignore_late_notices() -> None:
    """A run that handles SIGTERM is over, one more must not end it: Python puts the default back as it finalizes."""
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _speaker() -> str:
    """Nothing on a host's first rank. The others wait: where it says the same and ends, torchrun ends them too."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return ""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Megatron's handler would only note it
    time.sleep(FIRST_RANK_S)
    return f"rank {os.environ['RANK']}: "


if __name__ == "__main__":
    sys.exit(_entry())
