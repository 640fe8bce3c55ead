"""What is timed: activations, shapes as the ranks of real models see them, operations and the bytes each must move."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_act.errors import UserError
from megatron_act.kernels import api as kernels

GATED = {"swiglu": "silu"}  # our name of a gated form: the registry's activation of its gate
FULL = ("xielu", "crrelu", "relu2", "swiglu")  # every shape and operation; the others take the first shape
DECODE_ROWS = 64  # up to here a launch is a step of generation: forward only, next to a plain operation of torch
CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Shape:
    """The result of an activation on one rank.

    Attributes:
        rows: tokens.
        cols: the rank's share of the MLP's width.
        gated_cols: the same for a gated MLP of equal compute.
        hidden: width of the residual stream, where the two matmuls are timed too; else 0.
    """

    rows: int
    cols: int
    gated_cols: int
    hidden: int = 0

    @property
    def decode(self) -> bool:
        """Whether it is a step of generation."""
        return self.rows <= DECODE_ROWS

    def columns(self, gated: bool) -> int:
        """Columns of the result."""
        return self.gated_cols if gated else self.cols


def _model(rows: int, cols: int, hidden: int = 0) -> Shape:
    return Shape(rows, cols, cols * 2 // 3, hidden)  # a third matmul: two thirds of the width


# The first is the one of every activation. A gated MLP of equal compute is 2/3 as wide: 14336 for Apertus.
GPU_SHAPES = (
    _model(4096, 21504, 4096),  # Apertus 8B, tensor parallel 1
    _model(4096, 10752, 4096),  # tensor parallel 2
    _model(20480, 9216, 1536),  # 1.1B of the xIELU paper, micro-batch 5
    _model(20480, 6144, 2048),  # 3B, tensor parallel 2
    _model(1, 21504),
    _model(64, 21504),
)


def quickstart_shape(tensor_parallel: int) -> Shape:
    """Of ``launch/quickstart.sh``: its micro-batch, its widths over its tensor-parallel ranks."""
    from megatron_act import model_args  # needs Megatron's counting, which a GPU run does not

    gated, plain = (model_args.read(CONFIGS / f"tiny-{arm}.yaml") for arm in ("swiglu", "xielu"))
    tokens = plain["--micro-batch-size"] * plain["--seq-length"]
    cols, gated_cols = (flags["--ffn-hidden-size"] // tensor_parallel for flags in (plain, gated))
    return Shape(tokens, cols, gated_cols, plain["--hidden-size"])


def parse_shape(text: str) -> Shape:
    """``4096x21504``; gated activations take it as it is.

    Raises:
        UserError: anything else.
    """
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise UserError(f"--shapes: expected ROWSxCOLUMNS such as 4096x21504, got {text!r}; write both numbers")
    rows, cols = int(match[1]), int(match[2])
    return Shape(rows, cols, cols)


@dataclass(frozen=True)
class Case:
    """One activation at one shape: everything that shares its inputs.

    Attributes:
        activation: our name, ``swiglu`` included.
        ops: what is timed, of ``forward``, ``backward``, ``backward+value``.
    """

    activation: str
    shape: Shape
    dtype: torch.dtype
    ops: tuple[str, ...]

    @property
    def gated(self) -> bool:
        """Whether x is [gate | up]."""
        return self.activation in GATED

    @property
    def base(self) -> str:
        """The registry's name."""
        return GATED.get(self.activation, self.activation)

    @property
    def cols(self) -> int:
        """Columns of the result."""
        return self.shape.columns(self.gated)

    @property
    def label(self) -> str:
        """``4096x21504``."""
        return f"{self.shape.rows}x{self.cols}"

    @property
    def name(self) -> str:
        """As notes name it."""
        return f"{self.activation} {self.label}"

    def bytes_per_element(self, op: str) -> int:
        """What ``op`` must read and write for each element of the result, in bytes."""
        tensors = {"forward": (2, 3), "backward": (3, 5), "backward+value": (4, 6)}[op][self.gated]
        return tensors * self.dtype.itemsize

    def bytes_moved(self, op: str) -> int:
        """The same for the whole result."""
        return self.bytes_per_element(op) * self.shape.rows * self.cols


def select(activations: Sequence[str] | None, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Case]:
    """The cases of a run: every shape for `FULL`, the first for the others.

    Raises:
        UserError: an unknown name.
    """
    names = [known(name) for name in activations or (*FULL, *(n for n in kernels.names() if n not in FULL))]
    return [
        Case(name, shape, dtype, _ops(name, shape))
        for name in dict.fromkeys(names)
        for shape in (shapes if name in FULL else shapes[:1])
    ]


def known(name: str) -> str:
    """``name``, or UserError where neither the registry nor `GATED` has it."""
    if name not in GATED:
        try:
            kernels.get(name)
        except ValueError as error:
            raise UserError(f"--activations: {error}, {', '.join(GATED)}") from None
    return name


def _ops(name: str, shape: Shape) -> tuple[str, ...]:
    if shape.decode:
        return ("forward",)
    return ("forward", "backward", "backward+value") if name in FULL else ("forward", "backward")
