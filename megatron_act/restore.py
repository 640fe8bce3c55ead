"""What a run takes from the checkpoint it loads, besides the weights: this project's flags, and which scalars it lacks.

Megatron's ``--use-checkpoint-args`` restores a fixed list of its own arguments; ``flags_of`` adds ours.
``--activation-init-missing`` starts from the weights of a run with another activation, as from a GELU or ReLU^2 model.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import print_rank_0

from megatron_act.activation import activations_of
from megatron_act.checkpoint.reader import MegatronCheckpoint, chosen, has_torch_dist
from megatron_act.checkpoint.scalars import check_scalars, scalar_names, trained_activation
from megatron_act.errors import UserError

FLAG = "--activation-init-missing"
_RESTORED = (
    "activation",
    "activation_init",
    "activation_backend",
    "activation_per_expert",
    "recompute_activation_function",
)
_GATED = ("swiglu", "quick_geglu")

Hook = Callable[[list[Any]], list[Any]]


def source_of(args: Namespace) -> str | None:
    """The ``torch_dist`` checkpoint folder that Megatron will load: ``--load``, else ``--pretrained-checkpoint``."""
    folders = (_loaded(args), getattr(args, "pretrained_checkpoint", None))
    return next((folder for folder in folders if folder and has_torch_dist(folder)), None)


def _loaded(args: Namespace) -> str | None:
    return str(chosen(args.load, getattr(args, "ckpt_step", None))) if args.load else None


def flags_of(args: Namespace, parser: ArgumentParser, given: list[str]) -> list[str]:
    """This project's flags of the checkpoint, as command-line words, for ``--use-checkpoint-args``.

    Args:
        args: the parsed command line.
        parser: the parser, with this project's flags.
        given: the command line's words; a flag among them is left out.
    """
    folder = source_of(args) if args.use_checkpoint_args else None
    if folder is None:
        return []
    saved, actions = MegatronCheckpoint(folder).args, parser._option_string_actions
    present = {actions[word.split("=")[0]].dest for word in given if word.split("=")[0] in actions}
    if "activation" in present and args.activation != getattr(saved, "activation", None):
        present.add("activation_init")  # another activation's scalars
    words: list[str] = []
    for name in _RESTORED:
        value = getattr(saved, name, None)
        if name not in present and value:
            words += ["--" + name.replace("_", "-"), *_values(value)]
    return words


def _values(value: Any) -> list[str]:
    if value is True:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def check(args: Namespace) -> list[Hook]:
    """Refuses a checkpoint of another activation; with ``--activation-init-missing`` says how to take it.

    Args:
        args: validated arguments.

    Returns:
        Hooks for ``ModelConfig.post_wrap_hooks``.

    Raises:
        UserError: a checkpoint that cannot be loaded into this run, with both activations named.
    """
    folder = source_of(args)
    if folder is None:
        return []
    if not getattr(args, "activation_init_missing", False):
        if args.rank == 0:
            check_scalars(folder, trained_activation(args))
        return []
    checkpoint = MegatronCheckpoint(folder)
    trained = trained_activation(checkpoint.args)
    if trained == args.activation:
        check_scalars(folder, args.activation)
        return []
    _check_weights(args, checkpoint, trained, folder)
    ignored = ", ".join(scalar_names(checkpoint)) or "none"
    return [_Fill(f"> megatron-act: {FLAG}: weights of a {trained} checkpoint (its scalars, ignored: {ignored})")]


def _check_weights(args: Namespace, checkpoint: MegatronCheckpoint, trained: str, folder: str) -> None:
    where = f"{FLAG}: --load {folder}"
    if trained in _GATED:
        raise UserError(
            f"{where}: expected a checkpoint without a gate for --activation {args.activation}, got one of {trained}, "
            "whose fc1 has another shape: train anew"
        )
    width = getattr(checkpoint.args, "ffn_hidden_size", None)
    if width != args.ffn_hidden_size:
        raise UserError(
            f"{where}: expected a checkpoint of --ffn-hidden-size {args.ffn_hidden_size}, got {width}: change the flag"
        )
    if not (args.finetune or args.no_load_optim or folder != _loaded(args)):
        raise UserError(
            f"{where}: expected --finetune or --no-load-optim with it, got neither: its optimizer state ({trained}) "
            f"has nothing for {args.activation}'s scalars: add one"
        )


def install() -> None:
    """A learning-rate schedule that differs from the loaded checkpoint's is the user's to mend: one line, not a trace.

    Megatron compares it, in samples, after reading the checkpoint; a longer ``--train-iters`` already changes it.
    """
    original = OptimizerParamScheduler._check_and_set

    def checked(self: OptimizerParamScheduler, ours: float, saved: float, name: str) -> float:
        try:
            return original(self, ours, saved, name)
        except AssertionError:
            what = name.replace("iterations", "samples")  # which Megatron counts here
            raise UserError(
                f"--load: expected the checkpoint's {what} ({saved}), got {ours}: give the schedule's flags as they "
                "were, or add --override-opt-param-scheduler (the flags hold) or --use-checkpoint-opt-param-scheduler"
            ) from None

    OptimizerParamScheduler._check_and_set = checked  # type: ignore[method-assign]


class _Fill:
    """Leaves the scalars out of the load and keeps their initial values; the next save has them."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, models: list[Any]) -> list[Any]:
        modules = activations_of(models)
        for module in modules:
            module.sharded_state_dict = lambda *args, **kwargs: {}
            module.register_load_state_dict_pre_hook(_keep_initial)
        if modules:
            filled = {param.name: param.effective(float(raw)) for param, raw in _scalars(modules[0])}
            values = ", ".join(f"{name}={value:.6g}" for name, value in filled.items()) or "nothing to fill"
            print_rank_0(f"{self.message}; filled in {len(modules)} activations of this rank: {values}")
        return models


def _scalars(module: Any) -> list[tuple[Any, Any]]:
    return list(zip(module.activation.params, module.raw_scalars(), strict=True))


def _keep_initial(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if "sharded_state_dict" in vars(module):  # once: a later load in this process reads what was saved
        for param, raw in _scalars(module):
            state[prefix + param.name] = raw.detach()
        del module.sharded_state_dict
