"""The one forward and the one backward kernel of every activation; the only file with pointers and masks.

The tensor is seen as rows of ``cols`` contiguous elements, ``stride`` apart. A program owns BLOCK columns of ROWS
consecutive rows. A contiguous tensor without bias is cut into rows of BLOCK elements, the last one incomplete, so
``n`` counts elements: row r holds ``min(cols, n - r * cols)`` of them.

Everything is computed in fp32 and rounded once, at the store. Sums over elements (parameters, bias) leave each program
as one fp32 partial in a fixed order, never by atomics: the same bits in every run.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton tuples do not unpack with *)

import triton
import triton.language as tl

from megatron_act.kernels.device_math import softplus


@triton.jit
def load_params(P, SOFTPLUS: tl.constexpr, OFFSET: tl.constexpr):
    """Effective parameters as fp32 scalars: offset + softplus(raw), or the raw value."""
    values = ()
    for j in tl.static_range(len(P)):
        raw = tl.load(P[j]).to(tl.float32)
        if SOFTPLUS[j]:
            raw = softplus(raw) + OFFSET[j]
        values = values + (raw,)
    return values


@triton.jit
def zeros(P, BLOCK: tl.constexpr):
    """One fp32 accumulator of BLOCK lanes per parameter."""
    sums = ()
    for _ in tl.static_range(len(P)):
        sums = sums + (tl.zeros([BLOCK], dtype=tl.float32),)
    return sums


@triton.jit
def add(sums, terms):
    """Adds each parameter's terms; where the mask is off they are 0 because g is."""
    totals = ()
    for j in tl.static_range(len(sums)):
        totals = totals + (sums[j] + terms[j],)
    return totals


@triton.jit
def fwd_kernel(
    X, BIAS, Y, P, cols, n, stride,
    FN: tl.constexpr, SOFTPLUS: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y[r, c] = FN(X[r, c] + BIAS[c]); Y is contiguous."""
    p = load_params(P, SOFTPLUS, OFFSET)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if HAS_BIAS:
        bias = tl.load(BIAS + col, mask=col < cols, other=0.0).to(tl.float32)
    for k in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + k
        mask = (col < cols) & (col < n - row * cols)
        x = tl.load(X + row * stride + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias
        tl.store(Y + row * cols + col, FN(x, p).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def bwd_kernel(
    X, BIAS, G, DX, P, PARTIAL, DBIAS, cols, n, stride_x, stride_g,
    FN: tl.constexpr, SOFTPLUS: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DX[r, c] = G f'(X + BIAS); PARTIAL[j, program] and DBIAS[row group, c] hold this program's sums."""
    p = load_params(P, SOFTPLUS, OFFSET)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = zeros(P, BLOCK)
    if HAS_BIAS:
        bias = tl.load(BIAS + col, mask=col < cols, other=0.0).to(tl.float32)
        dbias = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + k
        mask = (col < cols) & (col < n - row * cols)
        x = tl.load(X + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(G + row * stride_g + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias
        dx, terms = FN(x, g, p)
        tl.store(DX + row * cols + col, dx.to(DX.dtype.element_ty), mask=mask)
        sums = add(sums, terms)
        if HAS_BIAS:
            dbias += dx
    if HAS_BIAS:
        tl.store(DBIAS + tl.program_id(0).to(tl.int64) * cols + col, dbias, mask=col < cols)
    programs = tl.num_programs(0) * tl.num_programs(1)
    for j in tl.static_range(len(P)):
        slot = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(PARTIAL + j * programs + slot, tl.sum(sums[j], 0))
