"""Which activation a checkpoint was trained with, and the values of its trainable scalars in each layer."""

import re
from argparse import Namespace
from pathlib import Path

from megatron_act.checkpoint.reader import MegatronCheckpoint, has_torch_dist
from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

_EXPERTS = r"(?:\.experts\.experts|\.shared_experts)?"  # of a mixture of experts, beside the layer's own scalars
_SCALAR = re.compile(rf"(?:^|\.)mlp{_EXPERTS}\.activation_func\.(\w+)$")
STOCK = (("swiglu", "swiglu"), ("quick_geglu", "quick_geglu"), ("squared_relu", "relu2"))  # argument, activation


def scalar_names(checkpoint: MegatronCheckpoint) -> tuple[str, ...]:
    """Names of the trainable scalars that the checkpoint holds, sorted; metadata only."""
    return tuple(sorted({found[1] for key in tuple(checkpoint.keys()) if (found := _SCALAR.search(key))}))


def trained_activation(args: Namespace) -> str:
    """What saved arguments ask for: ``--activation``, ``--spec megatron_act.specs NAME``, or Megatron's own."""
    if getattr(args, "activation", None):
        return str(args.activation)
    spec = getattr(args, "spec", None) or []
    if len(spec) == 2 and spec[0] == "megatron_act.specs":
        return str(spec[1])
    return next((name for argument, name in STOCK if getattr(args, argument, False)), "gelu")


def effective_scalars(checkpoint: MegatronCheckpoint) -> list[dict[str, float]]:
    """The values that the formula uses (after softplus and offset), by layer; empty dictionaries without scalars."""
    params = _params(trained_activation(checkpoint.args))
    return [
        {param.name: param.effective(float(checkpoint.layer_tensor(scalar_key(param.name), layer))) for param in params}
        for layer in range(checkpoint.args.num_layers)
    ]


def scalar_key(name: str) -> str:
    """Where a layer keeps a scalar, after ``decoder.layers.``."""
    return f"mlp.activation_func.{name}"


def _params(activation: str) -> tuple[kernels.Param, ...]:
    return kernels.get(activation).params if activation in kernels.names() else ()  # e.g. Megatron's swiglu


def check_scalars(load: str | Path, activation: str) -> None:
    """Refuses to continue a run of another activation; reads metadata and saved arguments, no tensor.

    Does nothing where ``load`` holds no checkpoint yet, or one that is not ``torch_dist`` (Megatron judges that).

    Args:
        load: the ``--load`` folder.
        activation: the activation that the run asks for: a name of ``kernels.names()``, or ``swiglu``.

    Raises:
        UserError: the checkpoint lacks the activation's scalars, has others, or was trained with another activation.
    """
    if not has_torch_dist(load):
        return
    checkpoint = MegatronCheckpoint(load)
    trained, found = trained_activation(checkpoint.args), scalar_names(checkpoint)
    wanted = tuple(sorted(param.name for param in _params(activation)))
    if found != wanted or trained != activation:
        raise UserError(
            f"--load {load}: expected a checkpoint of --activation {activation} (scalars: {_words(wanted)}), got "
            f"one of {trained} (scalars: {_words(found)}): use --activation {trained} or another --load"
        )


def _words(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
