"""What an installed megatron-core 0.19 lacks, supplied before or at start-up."""

import importlib.util
import typing
from pathlib import Path

# What Megatron must be told where Transformer Engine and apex, whose fused kernels it takes by default, are absent.
LOCAL_LAYER_FLAGS = (
    *("--transformer-impl", "local"),
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
)


def install_typing_override() -> None:
    """Make ``from typing import override`` work on Python 3.11: megatron-core >= 0.17 needs it, 3.12 has it.

    Idempotent; does nothing on Python >= 3.12. Call it before the first ``import megatron.core``.
    """
    if not hasattr(typing, "override"):
        import typing_extensions

        typing.override = typing_extensions.override  # type: ignore[attr-defined]


def use_built_helpers() -> None:
    """Keep Megatron from running ``make`` for its dataset helpers where the package has them built already.

    Megatron compiles ``helpers_cpp`` at every start (``megatron/training/initialize.py``) with a Makefile that only its
    repository has: with an installed package ``make`` fails and the program exits. Idempotent.
    """
    import megatron.core.datasets.utils as utils

    makefile = Path(utils.__file__).with_name("Makefile")
    if not makefile.exists() and importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        utils.compile_helpers = _built_already


def _built_already() -> None:
    return None
