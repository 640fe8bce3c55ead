"""Whether a checkpoint's optimizer state can be read by a run's optimizers, told from both runs' arguments alone.

What ``optimizer_resharding`` does while loading; here nothing of Megatron is imported.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_act.checkpoint.reader import MegatronCheckpoint, has_torch_dist
from megatron_act.errors import UserError

SHARDING = "distrib_optim_sharding_type"  # in a checkpoint's content metadata: the distributed optimizer's format
RESHARDABLE = "fully_reshardable"
BY_PARAMETER = (None, RESHARDABLE)  # formats with a tensor for each parameter; None: plain optimizers
MODEL_SPACE = "fully_sharded_model_space"  # of older Megatron: the distributed optimizer reshards it, nothing else does
ADAM = "adam"  # the optimizer whose state moves between kinds and numbers of optimizers
REMEDY = "resume once in that layout with --dist-ckpt-optim-fully-reshardable and save, or add --no-load-optim"

# What cuts the distributed optimizer's buffers, with the flags that set it; data-parallel ranks only pad them.
_LAYOUT = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "virtual_pipeline_model_parallel_size": "--num-virtual-stages-per-pipeline-rank",
    "expert_model_parallel_size": "--expert-model-parallel-size",
}


def check_optimizer(load: str | Path, args: Namespace) -> None:
    """Refuses a checkpoint whose optimizer state this run would load and cannot.

    Args:
        load: the ``--load`` folder; does nothing if it holds no ``torch_dist`` checkpoint yet.
        args: the run's validated arguments.

    Raises:
        UserError: naming the flag to change.
    """
    if args.finetune or args.no_load_optim or not has_torch_dist(load):
        return
    checkpoint = MegatronCheckpoint(load)
    saved_none = getattr(checkpoint.args, "no_save_optim", False)
    if saved_none or checkpoint.path.name == "release":  # Megatron loads weights alone
        return
    if why := conflict(checkpoint.args, format_of(checkpoint.args, checkpoint.content), args):
        raise UserError(f"--load {load}: {why}")


def format_of(saved: Namespace, content: dict[str, Any] | None) -> str | None:
    """The format of a checkpoint's optimizer state, from its arguments and content metadata; None: plain optimizers."""
    return (content or {}).get(SHARDING, "unnamed" if is_distributed(saved) else None)


def conflict(saved: Namespace, form: str | None, args: Namespace, moves: bool | None = None) -> str | None:
    """Why optimizer state cannot be loaded: one sentence with the flag to change, or None.

    Args:
        saved: the arguments of the run that saved it.
        form: ``format_of`` it.
        args: the arguments of the run that loads it.
        moves: whether kind or number of the optimizers differ; None: as the arguments tell.
    """
    if moves is None:
        moves = bool(form) != is_distributed(args)
        moves |= has_expert_optimizer(saved) != has_expert_optimizer(args)
    if args.optimizer != ADAM and not moves:
        return None  # Megatron's own affair
    cut = _layout(saved) != _layout(args) and form != MODEL_SPACE
    if form not in BY_PARAMETER and (moves or cut):
        return (
            f"expected optimizer state by parameter, got the distributed optimizer's {form} format, that of "
            f"{_words(saved)} only: {REMEDY}"
        )
    if moves and precision_of(saved) != precision_of(args):
        return (
            f"expected optimizer state of a {precision_of(args)} run, got {precision_of(saved)}: change the precision "
            "or the optimizer and the experts' layout, not both, or add --no-load-optim"
        )
    if moves and args.optimizer != ADAM:
        return (
            "expected --optimizer adam, whose state moves between plain and distributed optimizers and one and several "
            f"expert-parallel ranks, got {args.optimizer}: add --no-load-optim"
        )
    return None


def is_distributed(args: Namespace) -> bool:
    """Whether optimizer state is spread over data-parallel ranks; muon's by layers, which has another flag."""
    return args.use_distributed_optimizer or getattr(args, "use_layer_wise_distributed_optimizer", False)


def has_expert_optimizer(args: Namespace) -> bool:
    """Whether Megatron trains the experts of this layout with an optimizer of their own."""
    return args.num_experts is not None and _experts_are_spread(args)


def _experts_are_spread(args: Namespace) -> bool:
    return args.expert_model_parallel_size > 1 or _expert_tensor_size(args) != args.tensor_model_parallel_size


def precision_of(args: Namespace) -> str:
    """The model's precision, from a run's arguments."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def _expert_tensor_size(args: Namespace) -> int:
    return getattr(args, "expert_tensor_parallel_size", None) or args.tensor_model_parallel_size


def _layout(args: Namespace) -> tuple:
    sizes = [getattr(args, name, None) or 1 for name in _LAYOUT]
    experts = None if args.num_experts is None else _expert_tensor_size(args)
    return *sizes, experts, precision_of(args)


def _words(args: Namespace) -> str:
    """The flags of a layout, as far as they are not Megatron's defaults."""
    words = ["--use-distributed-optimizer"]
    words += [f"{flag} {getattr(args, name)}" for name, flag in _LAYOUT.items() if (getattr(args, name, None) or 1) > 1]
    if _expert_tensor_size(args) != args.tensor_model_parallel_size:
        words.append(f"--expert-tensor-parallel-size {args.expert_tensor_parallel_size}")
    return " ".join(words + [f"--{precision_of(args)}"] * (precision_of(args) != "fp32"))
