"""Whether a checkpoint's experts fit the run that loads it, as far as Megatron cannot tell or would not say clearly."""

from argparse import Namespace
from pathlib import Path

from megatron_act.checkpoint.reader import MegatronCheckpoint, has_torch_dist
from megatron_act.errors import UserError


def check_experts(load: str | Path, args: Namespace) -> None:
    """Refuses a checkpoint whose experts keep their scalars, or their optimizer state, in another way.

    Megatron gives experts an optimizer of their own when they are spread over ranks (expert parallel > 1, or expert
    tensor parallel != tensor parallel) and reads one optimizer's state into one, two into two.

    Args:
        load: the ``--load`` folder; does nothing if it holds no ``torch_dist`` checkpoint yet.
        args: the run's validated arguments.

    Raises:
        UserError: naming the flag to change.
    """
    if not args.num_experts or not has_torch_dist(load):
        return
    saved = MegatronCheckpoint(load).args
    was, wanted = getattr(saved, "activation_per_expert", False), args.activation_per_expert
    if args.activation and was != wanted:
        kinds = {False: "one set of scalars per layer", True: "scalars per expert"}
        raise UserError(
            f"--load {load}: expected {kinds[wanted]}, got a checkpoint with {kinds[was]}: "
            f"{'add' if was else 'remove'} --activation-per-expert"
        )
    if not (args.finetune or args.no_load_optim) and has_expert_optimizer(saved) != has_expert_optimizer(args):
        raise UserError(
            f"--load {load}: expected optimizer state of {_layout(args)}, got {_layout(saved)}: Megatron cannot "
            "reshard it between one optimizer and two: add --no-load-optim, or spread the experts (or not) as it did"
        )


def has_expert_optimizer(args: Namespace) -> bool:
    """Whether Megatron trains the experts of this layout with an optimizer of their own."""
    tensor = args.tensor_model_parallel_size
    return args.expert_model_parallel_size > 1 or (args.expert_tensor_parallel_size or tensor) != tensor


def _layout(args: Namespace) -> str:
    where = "spread over ranks" if has_expert_optimizer(args) else "all on each rank"
    return f"experts {where} (--expert-model-parallel-size {args.expert_model_parallel_size})"
