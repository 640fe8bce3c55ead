"""Entry point: ``torchrun ... -m megatron_act.pretrain_gpt --activation xielu [--config FILE] [any Megatron flag]``.

Megatron's own GPT pretraining (``megatron.training.pretrain``) with this project's flags. It must stay importable
without side effects but one: Megatron's checkpoint writer spawns processes that import this module again, and those
need the CPU backend if the parent has it.
"""

import sys
import time

PROGRAM_START = time.time()

from megatron_act import arguments, cpu_backend
from megatron_act.errors import run_cli

cpu_backend.install_if_requested()


def main(argv: list[str]) -> int:
    """Trains as the command line says; returns 0.

    Raises:
        UserError: a flag, file or combination that cannot work.
    """
    flags, cpu = arguments.peek(argv)
    if cpu:
        cpu_backend.install()
    from megatron_act import training_run  # imports Megatron: after the backend's patches

    training_run.run(flags, argv, program_start=PROGRAM_START)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(lambda: main(sys.argv[1:]), debug="--debug" in sys.argv))
