"""Bytes per element that an activation and the quantization of its result move, counted from the passes over memory.

    python -m megatron_act.fp8_bytes     (prints the table)

An element is one of fc1's output. A pass reads and writes whole tensors: bf16 takes 2 bytes, FP8 1, a block's scale its
bytes over the block's length; GEMMs are not counted. Three ways to the same FP8 tensor:

    unfused              the activation writes bf16, then Transformer Engine's quantizer reads it
    Transformer Engine   its own ``tex.*`` activation, given the quantizer
    ours                 ``kernels/fp8_ops.py``

What each of them launches: transformer_engine/common/activation, common/cast and pytorch/csrc/extensions/{activation,
cast}.cpp (2.20). Exact numbers (Fraction), so that a ratio is what it is.
"""

from dataclasses import dataclass
from fractions import Fraction

from megatron_act import te
from megatron_act.experiment.table import markdown
from megatron_act.kernels.fp8 import BLOCK, MX_BLOCK

UNFUSED, ENGINE, OURS = "unfused", "Transformer Engine", "ours"
WAYS = (UNFUSED, ENGINE, OURS)
OPS = ("forward", "backward")
BF16, FP8 = Fraction(2), Fraction(1)
# Scales, by recipe as --fp8-recipe names it: fp32 for 128 elements, 8 bits for 32; one for a tensor is nothing.
SCALE = {
    "delayed": Fraction(0),
    "tensorwise": Fraction(0),
    "blockwise": Fraction(4, BLOCK),
    "mxfp8": Fraction(1, MX_BLOCK),
}
STORED = FP8 + Fraction(1, MX_BLOCK)  # the pre-activation in FP8 (--activation-fp8-input-store)
FUSED_BY_ENGINE = ("delayed", "mxfp8")
GPUS = {"8.9": (8, 9), "9.0": (9, 0), "10.x": (10, 0), "12.x": (12, 0)}  # compute capabilities with FP8


@dataclass(frozen=True)
class Pass:
    """One kernel over the tensor; bytes per element."""

    name: str
    reads: Fraction
    writes: Fraction


def transposes(capability: tuple[int, int]) -> bool:
    """Whether FP8 GEMMs of this GPU need a transposed copy for the gradient of a weight.

    Source: is_non_tn_fp8_gemm_supported, transformer_engine/pytorch/utils.py.
    """
    return not ((10, 0) <= capability < (12, 0) or capability >= (13, 0))


def quantized(recipe: str, transposed: bool = True) -> Fraction:
    """A tensor in FP8 as its two GEMMs read it: two halves, or one, where a scale per tensor needs no copy."""
    halves = 1 if SCALE[recipe] == 0 and not transposed else 2
    return halves * (FP8 + SCALE[recipe])


def passes(recipe: str, way: str, op: str, *, transposed: bool = True, stored: bool = False) -> tuple[Pass, ...]:
    """The kernels between fc1's and fc2's GEMMs.

    Args:
        recipe: as ``--fp8-recipe``.
        way: one of `WAYS`.
        op: ``forward`` (x to y) or ``backward`` (dy and x to dx).
        transposed: whether a scale per tensor comes with a transposed copy (:func:`transposes`).
        stored: ours only: forward also writes x in FP8, which backward reads in place of bf16.
    """
    if stored and way != OURS:
        raise ValueError(f"stored: expected way {OURS!r}, got {way!r}; only our kernels keep x in FP8")
    source = BF16 if op == "forward" else BF16 + (STORED if stored else BF16)
    result = quantized(recipe, transposed)
    amax = recipe == "tensorwise"  # current scaling: the scale follows from all of the result
    if way == OURS:
        kept = STORED if stored and op == "forward" else Fraction(0)
        scan = (Pass("largest value of the result", source, Fraction(0)),) if amax else ()
        return (*scan, Pass("activation", source, result + kept))
    if way == ENGINE and recipe in FUSED_BY_ENGINE:
        return (Pass("activation", source, result),)
    alone = amax and way == UNFUSED  # Transformer Engine's activation takes the largest value on its way
    scan = (Pass("largest value", BF16, Fraction(0)),) if alone else ()
    return (Pass("activation", source, BF16), *scan, Pass("quantize", BF16, result))


def moved(recipe: str, way: str, op: str, *, transposed: bool = True, stored: bool = False) -> Fraction:
    """Bytes per element of all passes."""
    return sum((p.reads + p.writes for p in passes(recipe, way, op, transposed=transposed, stored=stored)), Fraction(0))


def ratio(recipe: str, op: str, transposed: bool = True) -> Fraction:
    """The byte ratio: unfused over ours, the most that fusing can gain where memory is the limit."""
    unfused, ours = (moved(recipe, way, op, transposed=transposed) for way in (UNFUSED, OURS))
    return unfused / ours


def kept(recipe: str | None, handed_over: bool = False, *, transposed: bool = True, stored: bool = False) -> Fraction:
    """Bytes per element that stay for the backward pass: x, and y as fc2 keeps it.

    Args:
        recipe: as ``--fp8-recipe``; None is training in bf16.
        handed_over: y is quantized by the activation and fc2 keeps all of it; what fc2 (or an operation of te.ops)
            quantizes itself it reduces to the half that its backward pass reads.
        transposed: as for :func:`passes`.
        stored: x is kept in FP8.
    """
    x = STORED if stored else BF16
    if recipe is None:
        return x + BF16
    return x + (quantized(recipe, transposed) if handed_over else FP8 + SCALE[recipe])


HEADINGS = (
    "recipe, compute capability",
    *(f"{op}: {column}" for op in OPS for column in ("unfused", "TE's own", "ours", "ratio")),
    "kept: TE's own", "kept: handed over", "the same, x in FP8",
)  # fmt: skip


def table() -> str:
    """Markdown: one row for each recipe and kind of GPU that differ."""
    return markdown(HEADINGS, [row for recipe in SCALE for row in _rows(recipe)])


def _rows(recipe: str) -> list[list[str]]:
    kinds: dict[bool, list[str]] = {}
    for name, capability in GPUS.items():
        if te.fp8_problem(recipe, capability, None) is None:
            by_copy = SCALE[recipe] > 0 or transposes(capability)  # blocks take two halves on every GPU
            kinds.setdefault(by_copy, []).append(name)
    return [_cells(f"{recipe}, {' '.join(names)}", recipe, transposed) for transposed, names in kinds.items()]


def _cells(label: str, recipe: str, transposed: bool) -> list[str]:
    cells = [label]
    for op in OPS:
        cells += [_number(moved(recipe, way, op, transposed=transposed)) for way in WAYS]
        cells.append(f"{float(ratio(recipe, op, transposed)):.2f}x")
    ways: tuple[dict[str, bool], ...] = ({}, {"handed_over": True}, {"handed_over": True, "stored": True})
    return cells + [_number(kept(recipe, transposed=transposed, **way)) for way in ways]


def _number(value: Fraction) -> str:
    return f"{float(value):.2f}".removesuffix(".00")


if __name__ == "__main__":
    print(table())
