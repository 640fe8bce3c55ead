"""TensorBoard and Weights & Biases: both optional, both Megatron's, and both get the same figures of ours.

Megatron opens them on the last rank, where ``--tensorboard-dir`` and ``--wandb-project`` ask for it. Its own figures
(loss, learning rate, gradient norm, evaluations) reach wandb only where there is a TensorBoard too; without one they
are written here, under Megatron's names.
"""

import importlib.util
from argparse import Namespace

import numpy as np
from megatron.training import get_tensorboard_writer, get_wandb_writer

PACKAGES = {"tensorboard_dir": "tensorboard", "wandb_project": "wandb"}


OFF = [word for name in PACKAGES for word in ("--" + name.replace("_", "-"), "")]  # words after which neither is opened


def wanted(args: Namespace) -> bool:
    """Whether the flags ask for either."""
    return any(getattr(args, name) for name in PACKAGES)


def conflict(args: Namespace) -> str | None:
    """Why a board cannot be served: one sentence with what to change, or None."""
    for name, package in PACKAGES.items():
        flag = "--" + name.replace("_", "-")
        if getattr(args, name) and not _installed(package):
            return f"{flag}: expected the package {package}, got none: pip install {package}, or remove the flag"
    if args.wandb_project and not (args.wandb_save_dir or args.save):
        return "--wandb-project: expected --wandb-save-dir DIR or --save DIR with it, got neither: add one"
    if args.wandb_project and not args.wandb_exp_name:
        return "--wandb-project: expected --wandb-exp-name NAME with it, got none: add it"
    return None


def _installed(package: str) -> bool:
    """A folder of that name in the working directory, as wandb makes one, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def write(ours: dict[str, float], megatrons: dict[str, float | None], iteration: int) -> None:
    """Writes one step's figures.

    Args:
        ours: tag to value, for both boards.
        megatrons: what Megatron writes itself wherever there is a TensorBoard; None is left out.
    """
    board, wandb = get_tensorboard_writer(), get_wandb_writer()
    for tag, value in ours.items() if board else ():
        board.add_scalar(tag, value, iteration)
    if wandb:
        others = {} if board else {tag: value for tag, value in megatrons.items() if value is not None}
        wandb.log({**ours, **others}, iteration)


def picture(tag: str, image: np.ndarray, iteration: int) -> None:
    """Shows an image, uint8 (height, width, 3)."""
    if board := get_tensorboard_writer():
        board.add_image(tag, image, iteration, dataformats="HWC")
    if wandb := get_wandb_writer():
        wandb.log({tag: wandb.Image(image)}, iteration)


def present() -> bool:
    """Whether this rank writes to either."""
    return bool(get_tensorboard_writer() or get_wandb_writer())
