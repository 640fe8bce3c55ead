"""The door to Transformer Engine: whether it loads, whether this GPU has the recipe, and what to say where not.

Nothing here imports Megatron, and Transformer Engine only when asked. Megatron guards its own import with ``except
ImportError``, but a Transformer Engine without its CUDA libraries raises RuntimeError, which would end every program in
a traceback: ``check_before_megatron`` says it in one sentence, or hides the package from a CPU run.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

from megatron_act.errors import UserError

VERSION = (2, 20)  # whose sources `fp8_output` and `te_op` were written from
FP8_FLAG, FUSER_FLAG = "--fp8-format", "--use-transformer-engine-op-fuser"
UNPICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
INSTALL = "pip install transformer-engine[core_cu13,pytorch]==2.20.2"

# --fp8-recipe: (first compute capability, first that has it no more or None). Source: quantization.py, utils.py.
CAPABILITIES: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "delayed": ((8, 9), None),
    "tensorwise": ((8, 9), None),
    "blockwise": ((9, 0), None),
    "mxfp8": ((10, 0), (12, 0)),
}
BLOCKWISE_CUDA = (12, 9)


@functools.cache
def problem() -> str | None:
    """Why Transformer Engine cannot be used in this process, in one sentence, or None."""
    if importlib.util.find_spec("transformer_engine") is None:
        return f"expected Transformer Engine, got none: {INSTALL}"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, OSError) as error:
        got = f"{type(error).__name__}: {_first_line(error)}"
        remedy = f"install its CUDA build ({INSTALL}) or remove it (pip uninstall transformer-engine)"
        return f"expected a Transformer Engine that loads, got {got}: {remedy}"
    return None


@functools.cache
def version_problem() -> str | None:
    """Why our FP8 results are not handed to the Transformer Engine that is installed, or None.

    Ask it before ``parts``: another version may lack some.
    """
    found = importlib.metadata.version("transformer_engine")
    if found.split(".")[:2] != [str(part) for part in VERSION]:
        return f"expected Transformer Engine {VERSION[0]}.{VERSION[1]}, got {found}"
    return None


@functools.cache
def parts() -> SimpleNamespace:
    """What this project uses of Transformer Engine, by its own names; only after ``problem()`` is None."""
    where = {
        "transformer_engine.pytorch": ("Linear", "LayerNormLinear"),
        "transformer_engine.pytorch.constants": ("DType", "FP8FwdTensorIdx", "FP8BwdTensorIdx"),
        "transformer_engine.pytorch.cpu_offload": ("is_cpu_offload_enabled",),
        "transformer_engine.pytorch.distributed": (
            "is_fp8_activation_recompute_enabled",
            "in_fp8_activation_recompute_phase",
        ),
        "transformer_engine.pytorch.quantization": ("FP8GlobalStateManager",),
        "transformer_engine.debug.pytorch.debug_state": ("TEDebugState",),
        "transformer_engine.pytorch.utils": ("is_non_tn_fp8_gemm_supported",),
    }
    found = {name: getattr(importlib.import_module(module), name) for module, names in where.items() for name in names}
    return SimpleNamespace(**found)


def fp8_problem(recipe: str, capability: tuple[int, int], cuda: str | None) -> str | None:
    """Why a GPU cannot run ``--fp8-recipe``, or None; recipes that Megatron knows and we do not are its own affair.

    Args:
        recipe: ``delayed``, ``tensorwise``, ``blockwise`` or ``mxfp8``.
        capability: the GPU's compute capability.
        cuda: ``torch.version.cuda``.
    """
    wanted = _unmet(recipe, capability, cuda)
    if wanted is None:
        return None
    served = [name for name in CAPABILITIES if _unmet(name, capability, cuda) is None]
    got = f"{capability[0]}.{capability[1]} with CUDA {cuda}"
    remedy = f"use {' or '.join(served)}" if served else "remove --fp8-format"
    return f"--fp8-recipe {recipe}: expected compute capability {wanted}, got {got}: {remedy}"


def _unmet(recipe: str, capability: tuple[int, int], cuda: str | None) -> str | None:
    """The compute capability that a recipe wants, where this one is not it."""
    if recipe not in CAPABILITIES:
        return None
    first, end = CAPABILITIES[recipe]
    wanted = f"{first[0]}.{first[1]}" + (" or newer" if end is None else f" to {end[0] - 1}.x")
    if recipe == "blockwise":
        wanted += f" and CUDA {BLOCKWISE_CUDA[0]}.{BLOCKWISE_CUDA[1]} or newer"
        if cuda is not None and tuple(map(int, cuda.split(".")[:2])) < BLOCKWISE_CUDA:
            return wanted
    return wanted if capability < first or (end is not None and capability >= end) else None


def conflict(args: Any) -> str | None:
    """Why what the flags ask of Transformer Engine cannot be had here: one sentence, or None.

    Args:
        args: Megatron's parsed arguments (``fp8``, ``fp8_recipe``, ``use_transformer_engine_op_fuser``,
            ``transformer_impl``).
    """
    flags = {FP8_FLAG: args.fp8, FUSER_FLAG: args.use_transformer_engine_op_fuser}
    for flag in (flag for flag, given in flags.items() if given):
        if args.transformer_impl != "transformer_engine":
            return f"{flag}: expected --transformer-impl transformer_engine, got {args.transformer_impl}: change one"
        if why := problem():
            return f"{flag}: {why}"
    if args.transformer_impl == "transformer_engine" and (why := problem()):
        return f"--transformer-impl transformer_engine, Megatron's default: {why}, or add --transformer-impl local"
    if why := fuser_conflict(args):
        return why
    if not args.fp8 or not torch.cuda.device_count():
        return None  # a missing GPU is the entry point's to say
    device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()  # not yet the current one
    return fp8_problem(args.fp8_recipe, torch.cuda.get_device_capability(device), torch.version.cuda)


def fuser_conflict(settings: Any) -> str | None:
    """Why our operation cannot be in Transformer Engine's op fuser: one sentence, or None.

    Args:
        settings: Megatron's parsed arguments or a TransformerConfig, where Transformer Engine loads.
    """
    if not getattr(settings, "use_transformer_engine_op_fuser", False):
        return None
    if why := version_problem():
        return f"{FUSER_FLAG}: {why}: remove the flag or install that version"
    if settings.fp8 and settings.fp8_recipe == "delayed":
        return (
            f"{FUSER_FLAG} with --fp8-recipe delayed: Megatron saves no scales of its operations, and recomputes with "
            "others: remove the flag or use --fp8-recipe tensorwise, blockwise or mxfp8"
        )
    return None


def notice(args: Any) -> str | None:
    """What a run should know at its start about what it will save, or None.

    Transformer Engine 2.20 pickles delayed scaling's scales and histories into the checkpoint and unpickles them only
    where this environment variable says that checkpoints are trusted (pytorch/_extra_state.py).
    """
    if args.fp8 and args.fp8_recipe == "delayed" and args.save and os.environ.get(UNPICKLE) != "1":
        return f"checkpoints of --fp8-recipe delayed hold pickled scales: to resume from yours, set {UNPICKLE}=1"
    return None


def check_before_megatron(cpu: bool) -> None:
    """Keeps an installed Transformer Engine that does not load from ending ``import megatron.core`` in a traceback.

    Args:
        cpu: a CPU run goes on without it; ``import transformer_engine`` then raises ImportError as if it were absent.

    Raises:
        UserError: on a GPU run.
    """
    if "transformer_engine" in sys.modules or importlib.util.find_spec("transformer_engine") is None:
        return
    why = problem()
    if why is None:
        return
    if not cpu:
        raise UserError(why)
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 160 else text[:157] + "..."
