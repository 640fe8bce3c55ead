"""Forward and backward passes that write FP8: what the next GEMM reads, both of its halves, in one pass over x.

    forward   q = store(f(x + bias))                            current scaling: ``amax`` first, then ``tensor``
    backward  q = store(g f'(x + bias)), and the parameters' and the bias' gradients as in ``template.py``

A program owns a tile of TILE x TILE elements. One of 128 x 128, which holds whole blocks both ways, is large for a
thread: up to 255 registers, where 64 x 64 takes about 100. Recipes and layouts: ``fp8.py``; stores: ``stores.py``.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from megatron_act.kernels.stores import bf16_of, e4m3_value, magnitude
from megatron_act.kernels.template import load_params


@triton.jit
def tile_of(X, row, col, rows, cols, stride):
    """fp32 values of a tile, 0 outside."""
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    return tl.load(X + row[:, None].to(tl.int64) * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def place(TILE: tl.constexpr):
    """(rows, columns) of this program's tile."""
    lane = tl.arange(0, TILE)
    return tl.program_id(0) * TILE + lane, tl.program_id(1) * TILE + lane


@triton.jit
def input_of(X, BIAS, row, col, rows, cols, stride):
    """x + bias of a tile."""
    x = tile_of(X, row, col, rows, cols, stride)
    if BIAS is not None:
        x += tl.load(BIAS + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def result_of(y, row, col, rows, cols, ROUND: tl.constexpr, EXACT: tl.constexpr):
    """What is stored: rounded to bf16 if wanted, 0 outside of the tensor."""
    if ROUND:
        y = bf16_of(y, EXACT)
    return tl.where((row[:, None] < rows) & (col[None, :] < cols), y, 0.0)


@triton.jit
def forward_kernel(
    X, BIAS, P, OUT, rows, cols, stride,
    FWD: tl.constexpr, STORE: tl.constexpr, SOFTPLUS: tl.constexpr, ROUND: tl.constexpr, EXACT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """OUT, a recipe's pointers, from X."""
    row, col = place(TILE)
    y = FWD(input_of(X, BIAS, row, col, rows, cols, stride), load_params(P, SOFTPLUS))
    STORE(result_of(y, row, col, rows, cols, ROUND, EXACT), OUT, row, col, rows, cols, EXACT)


@triton.jit
def amax_kernel(
    X, BIAS, P, AMAX, rows, cols, stride,
    FWD: tl.constexpr, SOFTPLUS: tl.constexpr, ROUND: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """AMAX = max(AMAX, |f(x + bias)|): the first of current scaling's two passes; nothing else is written."""
    row, col = place(TILE)
    y = FWD(input_of(X, BIAS, row, col, rows, cols, stride), load_params(P, SOFTPLUS))
    size = magnitude(result_of(y, row, col, rows, cols, ROUND, EXACT))
    tl.atomic_max(AMAX, tl.max(tl.max(size, 1), 0))


@triton.jit
def backward_kernel(
    X, BIAS, G, G_SCALE_INV, P, OUT, PARTIAL, DBIAS, rows, cols, stride_x, stride_g,
    BWD: tl.constexpr, STORE: tl.constexpr, SOFTPLUS: tl.constexpr, ROUND: tl.constexpr, EXACT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """OUT from dx; PARTIAL[j, program] and DBIAS[tile of rows, c] as in ``template.bwd_kernel``.

    G is a float tensor, or e4m3 bits with one inverse scale.
    """
    row, col = place(TILE)
    x = input_of(X, BIAS, row, col, rows, cols, stride_x)
    if G_SCALE_INV is None:
        g = tile_of(G, row, col, rows, cols, stride_g)
    else:
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        code = tl.load(G + row[:, None].to(tl.int64) * stride_g + col[None, :], mask=inside, other=0)
        g = e4m3_value(code, EXACT) * tl.load(G_SCALE_INV)
    dx, terms = BWD(x, g, load_params(P, SOFTPLUS))
    if DBIAS is not None:
        tl.store(DBIAS + tl.program_id(0).to(tl.int64) * cols + col, tl.sum(dx, 0), mask=col < cols)
    slot = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for j in tl.static_range(len(P)):
        tl.store(PARTIAL + j * tl.num_programs(0) * tl.num_programs(1) + slot, tl.sum(tl.sum(terms[j], 1), 0))
    STORE(result_of(dx, row, col, rows, cols, ROUND, EXACT), OUT, row, col, rows, cols, EXACT)
