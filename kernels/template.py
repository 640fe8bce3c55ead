"""The one forward and the one backward kernel of every activation; the only file with pointers and masks.

A tensor is seen as rows of ``cols`` contiguous elements, ``stride`` apart. A program owns BLOCK columns of ROWS
consecutive rows; ``width`` programs stand side by side. A contiguous tensor without bias or weights is cut into rows of
BLOCK elements, the last one incomplete, so ``n`` counts elements: row r holds ``min(cols, n - r * cols)`` of them.

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
def load_params(P, SOFTPLUS: tl.constexpr):
    """Parameters as fp32 scalars: softplus(raw), or the raw value. Offsets are the formulas': a sum rounds."""
    values = ()
    for j in tl.static_range(len(P)):
        raw = tl.load(P[j]).to(tl.float32)
        if SOFTPLUS[j]:
            raw = softplus(raw)
        values = values + (raw,)
    return values


@triton.jit
def zeros(count: tl.constexpr, lanes: tl.constexpr):
    """``count`` fp32 accumulators."""
    sums = ()
    for _ in tl.static_range(count):
        sums = sums + (tl.zeros([lanes], dtype=tl.float32),)
    return sums


@triton.jit
def add(sums, terms):
    """Adds tuples of equal shapes."""
    totals = ()
    for j in tl.static_range(len(sums)):
        totals = totals + (sums[j] + terms[j],)
    return totals


@triton.jit
def pairs(terms):
    """Each tensor with neighbours added: of 16-bit tensors a thread holds both, of fp32 a warp."""
    totals = ()
    for j in tl.static_range(len(terms)):
        totals = totals + (tl.sum(tl.reshape(terms[j], [terms[j].shape[0] // 2, 2]), 1),)
    return totals


@triton.jit
def halves(t):
    return tl.split(tl.reshape(t, [t.shape[0] // 2, 2]))


@triton.jit
def quarters(t):
    """Four tensors of every fourth element. A thread holds eight neighbours of 16 bits, two of each: nothing moves."""
    even, odd = halves(t)
    return halves(even) + halves(odd)


@triton.jit
def whole(q):
    """Inverse of :func:`quarters`."""
    even, odd = tl.join(q[0], q[1]), tl.join(q[2], q[3])
    half: tl.constexpr = q[0].shape[0] * 2
    return tl.reshape(tl.join(tl.reshape(even, [half]), tl.reshape(odd, [half])), [half * 2])


@triton.jit
def load(X, mask):
    """fp32 values, 0 where the mask is off."""
    return tl.load(X, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def place(width):
    """(group of rows as int64, block of columns) of this program; the grid has one dimension, whose limit is 2^31."""
    return (tl.program_id(0) // width).to(tl.int64), tl.program_id(0) % width


@triton.jit
def fwd_kernel(
    X, BIAS, W, Y, P, cols, n, stride, width,
    FWD: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y[r, c] = y; Y is contiguous."""
    p = load_params(P, SOFTPLUS)
    group, block = place(width)
    col = block * BLOCK + tl.arange(0, BLOCK)
    if BIAS is not None:
        bias = load(BIAS + col, col < cols)
        if GATED:
            bias_up = load(BIAS + cols + col, col < cols)
    for k in range(ROWS):
        row = group * ROWS + k
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
def bwd_elements(
    x, up, g, w, p,
    FWD: tl.constexpr, BWD: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """(dx, dup, y, parameters' terms, (dweight's term,)) of some elements; placeholders for what is not wanted."""
    y = x
    dup = x
    dw = ()
    if GATED or WEIGHTED or VALUE:
        v = FWD(x, p)
        y = v * up if GATED else v
        if WEIGHTED:
            dw = (g * y,)
            y *= w
            g *= w
        if GATED:
            dup = g * v
            g *= up
    dx, terms = BWD(x, g, p)
    return dx, dup, y, pairs(terms), pairs(dw)


@triton.jit
def bwd_kernel(
    X, BIAS, W, G, DX, Y, P, PARTIAL, DBIAS, DW, cols, n, stride_x, stride_g, width,
    FWD: tl.constexpr, BWD: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DX = dL/dx; PARTIAL[j, program], DBIAS[row group, c], DW[r, column block]: sums; Y: the forward value again.

    The columns are worked off in quarters, one after the other: a quarter's intermediate values die before the next,
    which takes two thirds of the registers.
    """
    p = load_params(P, SOFTPLUS)
    WIDE: tl.constexpr = 2 if GATED else 1  # width of DX and DBIAS in cols
    group, block = place(width)
    col = block * BLOCK + tl.arange(0, BLOCK)
    sums = zeros(len(P), BLOCK // 8)
    dbias = zeros(0 if BIAS is None else 4, BLOCK // 4)
    dbias_up = zeros(4 if BIAS is not None and GATED else 0, BLOCK // 4)
    for k in range(ROWS):
        row = group * ROWS + k
        here = tl.minimum(n - row * cols, cols).to(tl.int32)
        mask = col < here
        x = load(X + row * stride_x + col, mask)
        g = load(G + row * stride_g + col, mask)
        up = load(X + row * stride_x + cols + col, mask) if GATED else x
        if BIAS is not None:  # read again for every row, from L1: held for all of them it would cost eight registers
            x += load(BIAS + col, mask)
            up = up + load(BIAS + cols + col, mask) if GATED else x
        w = tl.load(W + row, mask=here > 0, other=0.0).to(tl.float32) if W is not None else 1.0
        xs, ups, gs = quarters(x), quarters(up), quarters(g)
        dx, dup, y = (), (), ()
        terms, dw = zeros(len(P), BLOCK // 8), zeros(0 if W is None else 1, BLOCK // 8)
        for j in tl.static_range(4):
            one = bwd_elements(xs[j], ups[j], gs[j], w, p, FWD, BWD, GATED, W is not None, Y is not None)
            dx, dup, y = dx + (one[0],), dup + (one[1],), y + (one[2],)
            terms, dw = add(terms, one[3]), add(dw, one[4])
        sums, dbias, dbias_up = add(sums, terms), add(dbias, dx), add(dbias_up, dup)
        tl.store(DX + row * cols * WIDE + col, whole(dx).to(DX.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(DX + row * cols * 2 + cols + col, whole(dup).to(DX.dtype.element_ty), mask=mask)
        if Y is not None:
            tl.store(Y + row * cols + col, whole(y).to(Y.dtype.element_ty), mask=mask)
        if W is not None:
            tl.store(DW + row * width + block, tl.sum(dw[0], 0), mask=here > 0)
    if BIAS is not None:
        tl.store(DBIAS + group * cols * WIDE + col, whole(dbias), mask=col < cols)
        if GATED:
            tl.store(DBIAS + group * cols * 2 + cols + col, whole(dbias_up), mask=col < cols)
    for j in tl.static_range(len(P)):
        tl.store(PARTIAL + j * tl.num_programs(0) + tl.program_id(0), tl.sum(sums[j], 0))


@triton.jit(do_not_specialize=["count"])  # it grows with the tokens
def sum_kernel(PARTIAL, P, OUT, count, SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr):
    """OUT[j] = dL/draw of parameter j: the fp64 sum of PARTIAL[j, :], times the derivative of its constraint."""
    lane = tl.arange(0, BLOCK)
    for j in tl.static_range(len(P)):
        total = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, count, BLOCK):
            total += tl.load(PARTIAL + j * count + start + lane, mask=start + lane < count, other=0.0).to(tl.float64)
        value = tl.sum(total, 0)
        if SOFTPLUS[j]:
            value /= 1.0 + tl.exp(-tl.load(P[j]).to(tl.float64))
        tl.store(OUT[j], value.to(tl.float32).to(OUT[j].dtype.element_ty))
