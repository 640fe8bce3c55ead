"""The forward and the backward kernel whose results and operands may be FP8, in one pass over x.

    forward   out = store(f(z)), z = x + bias; amax = max |f(z)|; kept = z in 1.03 bytes per element
    backward  out = store(g f'(z)), and the parameters' and the bias' gradients as in ``template.py``; x is float, with
              its bias, or kept; g is float or FP8

A program works off 128 x 128 elements, whole blocks both ways, in tiles of BM x BN: HELD of them are made one after the
other before they are stored, LOOPS times. Blockwise scales need all 128 rows at once, those of mxfp8 32; they are held
as bf16. A loop, not straight code, makes them, so that the intermediate values of one tile die before the next:
unrolled, some activations spill.
Recipes and layouts: ``fp8.py``; loads: ``operands.py``; stores: ``stores.py``.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton tuples do not unpack with *)

import triton
import triton.language as tl

from megatron_act.kernels.fp8_device import bf16_of, magnitude
from megatron_act.kernels.operands import lanes
from megatron_act.kernels.stores import keep
from megatron_act.kernels.template import load_params

ACROSS = tl.constexpr(8)  # neighbours that a thread holds of a tile: 16 bytes of bf16


@triton.jit
def across(t):
    """[BM, BN] to [BM, BN / ACROSS, ACROSS]: the last axis is one thread's."""
    return tl.reshape(t, [t.shape[0], t.shape[1] // ACROSS, ACROSS])


@triton.jit
def with_bias(x, BIAS, col, cols):
    """x + bias of a tile."""
    if BIAS is not None:
        c = col + tl.arange(0, x.shape[1])
        x += tl.load(BIAS + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def result_of(y, row, col, rows, cols, ROUND: tl.constexpr, WHOLE: tl.constexpr, CASTS: tl.constexpr):
    """What is stored: 0 outside of the tensor (WHOLE: there is no outside), rounded to bf16 if wanted."""
    if not WHOLE:
        r, c = lanes(row, col, y.shape[0], y.shape[1])
        y = tl.where((r < rows) & (c < cols), y, 0.0)
    if ROUND:
        y = bf16_of(y, CASTS)
    return y


@triton.jit
def blank(count: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROUND: tl.constexpr):
    """``count`` tiles of zeros, as :func:`result_of` makes them."""
    tiles = ()
    for _ in tl.static_range(count):
        tiles = tiles + (tl.zeros([BM, BN], tl.bfloat16 if ROUND else tl.float32),)
    return tiles


@triton.jit
def pushed(tiles, y):
    """The tiles but the first, and y."""
    rest = ()
    for s in tl.static_range(1, len(tiles)):
        rest = rest + (tiles[s],)
    return rest + (y,)


@triton.jit
def forward_kernel(
    X, BIAS, P, OUT, AMAX, KEPT, rows, cols, width,
    FWD: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr, FORMAT: tl.constexpr, SWIZZLED: tl.constexpr,
    SOFTPLUS: tl.constexpr, ROUND: tl.constexpr, WHOLE: tl.constexpr, CASTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LOOPS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """OUT, a recipe's pointers, by STORE; AMAX = max(AMAX, |y|); KEPT from z. None leaves one out."""
    p = load_params(P, SOFTPLUS)
    col = tl.program_id(0) % width * BN
    start = tl.program_id(0) // width * (LOOPS * HELD * BM)
    amax = tl.zeros([BM, BN // ACROSS], tl.float32)
    for k in range(LOOPS):
        first = start + k * (HELD * BM)
        tiles = blank(HELD, BM, BN, ROUND)
        for s in range(HELD):
            row = first + s * BM
            z = with_bias(LOAD(X, row, col, rows, cols, BM, BN, FORMAT, SWIZZLED, CASTS), BIAS, col, cols)
            if KEPT is not None:
                keep(z, KEPT, row, col, rows, cols, CASTS)
            y = result_of(FWD(z, p), row, col, rows, cols, ROUND, WHOLE, CASTS)
            if AMAX is not None:
                amax = tl.maximum(amax, tl.max(across(magnitude(y.to(tl.float32), CASTS)), 2))
            tiles = pushed(tiles, y)
        if STORE is not None:
            STORE(tiles, OUT, first, col, rows, cols, FORMAT, SWIZZLED, CASTS)
    if AMAX is not None:
        tl.atomic_max(AMAX, tl.max(tl.max(amax, 1), 0), sem="relaxed")  # a maximum: any order gives the same bits


@triton.jit
def backward_kernel(
    X, BIAS, G, P, OUT, AMAX, PARTIAL, DBIAS, rows, cols, width,
    BWD: tl.constexpr, LOAD: tl.constexpr, LOAD_G: tl.constexpr, FORMAT_G: tl.constexpr, SWIZZLED_G: tl.constexpr,
    STORE: tl.constexpr, FORMAT: tl.constexpr, SWIZZLED: tl.constexpr,
    SOFTPLUS: tl.constexpr, ROUND: tl.constexpr, WHOLE: tl.constexpr, CASTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LOOPS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """OUT from dx; PARTIAL[j, program] and DBIAS[group of rows, c] as in ``template.bwd_kernel``."""
    p = load_params(P, SOFTPLUS)
    col = tl.program_id(0) % width * BN
    start = tl.program_id(0) // width * (LOOPS * HELD * BM)
    amax = tl.zeros([BM, BN // ACROSS], tl.float32)
    sums = ()
    for _ in tl.static_range(len(P)):
        sums = sums + (tl.zeros([BM, BN // ACROSS], tl.float32),)
    dbias = tl.zeros([BM, BN], tl.float32)
    for k in range(LOOPS):
        first = start + k * (HELD * BM)
        tiles = blank(HELD, BM, BN, ROUND)
        for s in range(HELD):
            row = first + s * BM
            z = with_bias(LOAD(X, row, col, rows, cols, BM, BN, "e4m3", False, CASTS), BIAS, col, cols)
            g = LOAD_G(G, row, col, rows, cols, BM, BN, FORMAT_G, SWIZZLED_G, CASTS)
            dx, terms = BWD(z, g, p)
            totals = ()
            for j in tl.static_range(len(P)):
                totals = totals + (sums[j] + tl.sum(across(terms[j]), 2),)
            sums = totals
            if DBIAS is not None:
                dbias += dx
            y = result_of(dx, row, col, rows, cols, ROUND, WHOLE, CASTS)
            if AMAX is not None:
                amax = tl.maximum(amax, tl.max(across(magnitude(y.to(tl.float32), CASTS)), 2))
            tiles = pushed(tiles, y)
        STORE(tiles, OUT, first, col, rows, cols, FORMAT, SWIZZLED, CASTS)
    if AMAX is not None:
        tl.atomic_max(AMAX, tl.max(tl.max(amax, 1), 0), sem="relaxed")
    if DBIAS is not None:
        c = col + tl.arange(0, BN)
        tl.store(DBIAS + (tl.program_id(0) // width).to(tl.int64) * cols + c, tl.sum(dbias, 0), mask=c < cols)
    for j in tl.static_range(len(P)):
        tl.store(PARTIAL + j * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(sums[j], 1), 0))
