"""Whether a checkpoint's experts keep their scalars as the run that loads it does."""

from argparse import Namespace
from pathlib import Path

from megatron_act.checkpoint.reader import MegatronCheckpoint, has_torch_dist
from megatron_act.errors import UserError


def check_experts(load: str | Path, args: Namespace) -> None:
    """Refuses a checkpoint whose experts share scalars where the run's do not, or the other way round.

    Args:
        load: the ``--load`` folder; does nothing if it holds no ``torch_dist`` checkpoint yet.
        args: the run's validated arguments.

    Raises:
        UserError: naming the flag to change.
    """
    if not args.num_experts or not args.activation or not has_torch_dist(load):
        return
    saved = MegatronCheckpoint(load).args
    was, wanted = getattr(saved, "activation_per_expert", False), args.activation_per_expert
    if was != wanted:
        kinds = {False: "one set of scalars per layer", True: "scalars per expert"}
        raise UserError(
            f"--load {load}: expected {kinds[wanted]}, got a checkpoint with {kinds[was]}: "
            f"{'add' if was else 'remove'} --activation-per-expert"
        )
