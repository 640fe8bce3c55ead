"""The one forward and the one backward kernel of every activation; the only file with pointers and masks.

A tensor is seen as rows of ``cols`` contiguous elements, ``stride`` apart. A program owns BLOCK columns of ROWS
consecutive rows. A contiguous tensor without bias or weights is cut into rows of BLOCK elements, the last one
incomplete, so ``n`` counts elements: row r holds ``min(cols, n - r * cols)`` of them.

    v = f(x + bias)                                y = v * w          w: one weight per row, 1 without W
    gated: rows of x are [gate | up], each cols    y = f(gate) * up * w

Everything is computed in fp32 and rounded once, at the store. Sums over elements (parameters, bias, weights) leave each
program as fp32 partials in a fixed order, never by atomics: the same bits in every run. A pointer that is None is left
out of the compiled kernel.
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
    """One fp32 accumulator of BLOCK / 4 lanes per parameter."""
    sums = ()
    for _ in tl.static_range(len(P)):
        sums = sums + (tl.zeros([BLOCK // 4], dtype=tl.float32),)
    return sums


@triton.jit
def add(sums, terms):
    """Adds each parameter's terms, four neighbours first: a thread holds them, and a fourth of the accumulators.

    Where the mask is off they are 0 because g is.
    """
    totals = ()
    for j in tl.static_range(len(sums)):
        totals = totals + (sums[j] + tl.sum(tl.reshape(terms[j], [terms[j].shape[0] // 4, 4]), 1),)
    return totals


@triton.jit
def load(X, mask):
    """fp32 values, 0 where the mask is off."""
    return tl.load(X, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def fwd_kernel(
    X, BIAS, W, Y, P, cols, n, stride,
    FWD: tl.constexpr, SOFTPLUS: tl.constexpr, OFFSET: tl.constexpr, GATED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y[r, c] = y; Y is contiguous."""
    p = load_params(P, SOFTPLUS, OFFSET)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if BIAS is not None:
        bias = load(BIAS + col, col < cols)
        if GATED:
            bias_up = load(BIAS + cols + col, col < cols)
    for k in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + k
        here = tl.minimum(n - row * cols, cols).to(tl.int32)
        mask = col < here
        x = load(X + row * stride + col, mask)
        if BIAS is not None:
            x += bias
        y = FWD(x, p)
        if GATED:
            up = load(X + row * stride + cols + col, mask)
            if BIAS is not None:
                up += bias_up
            y *= up
        if W is not None:
            y *= tl.load(W + row, mask=here > 0, other=0.0).to(tl.float32)
        tl.store(Y + row * cols + col, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def bwd_kernel(
    X, BIAS, W, G, DX, Y, P, PARTIAL, DBIAS, DW, cols, n, stride_x, stride_g,
    FWD: tl.constexpr, BWD: tl.constexpr, SOFTPLUS: tl.constexpr, OFFSET: tl.constexpr, GATED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DX = dL/dx; PARTIAL[j, program], DBIAS[row group, c], DW[column block, r]: sums; Y: the forward value again."""
    p = load_params(P, SOFTPLUS, OFFSET)
    WIDE: tl.constexpr = 2 if GATED else 1  # width of DX and DBIAS in cols
    group = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = zeros(P, BLOCK)
    if BIAS is not None:
        bias = load(BIAS + col, col < cols)
        dbias = tl.zeros([BLOCK], dtype=tl.float32)
        if GATED:
            bias_up = load(BIAS + cols + col, col < cols)
            dbias_up = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(ROWS):
        row = group * ROWS + k
        here = tl.minimum(n - row * cols, cols).to(tl.int32)
        mask = col < here
        x = load(X + row * stride_x + col, mask)
        g = load(G + row * stride_g + col, mask)
        if GATED:
            up = load(X + row * stride_x + cols + col, mask)
        if BIAS is not None:
            x += bias
            if GATED:
                up += bias_up
        if GATED or W is not None or Y is not None:
            v = FWD(x, p)
        if W is not None:
            w = tl.load(W + row, mask=here > 0, other=0.0).to(tl.float32)
            dw = tl.sum(g * (v * up if GATED else v), 0)
            tl.store(DW + tl.program_id(1).to(tl.int64) * (n // cols) + row, dw, mask=here > 0)
            g *= w
        if Y is not None:
            y = v * up if GATED else v
            y = y * w if W is not None else y
            tl.store(Y + row * cols + col, y.to(Y.dtype.element_ty), mask=mask)
        dx, terms = BWD(x, g * up if GATED else g, p)
        tl.store(DX + row * cols * WIDE + col, dx.to(DX.dtype.element_ty), mask=mask)
        sums = add(sums, terms)
        if GATED:
            tl.store(DX + row * cols * 2 + cols + col, (g * v).to(DX.dtype.element_ty), mask=mask)
        if BIAS is not None:
            dbias += dx
            if GATED:
                dbias_up += g * v
    if BIAS is not None:
        tl.store(DBIAS + group * cols * WIDE + col, dbias, mask=col < cols)
        if GATED:
            tl.store(DBIAS + group * cols * 2 + cols + col, dbias_up, mask=col < cols)
    slot = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for j in tl.static_range(len(P)):
        tl.store(PARTIAL + j * tl.num_programs(0) * tl.num_programs(1) + slot, tl.sum(sums[j], 0))
