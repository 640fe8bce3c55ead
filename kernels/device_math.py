"""Elementary functions for Triton kernels: fp32 in, fp32 out, no libdevice, the same in Triton's interpreter.

Public kernels compute ``exp(x) - 1`` and lose everything near 0; the series here keep full relative precision there.
"""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def taylor_h(q):
    """(expm1(q) - q) / q^2 = 1/2 + q/6 + ... + q^6/40320 for |q| <= 0.5; relative error below 2e-7."""
    p = q * (q * (q * (1 / 40320) + 1 / 5040) + 1 / 720) + 1 / 120
    return q * (q * (q * p + 1 / 24) + 1 / 6) + 0.5


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0 (NaN stays NaN); relative error below 3e-7, -1 at -inf."""
    q = tl.maximum(x, -0.5)  # clamp: the unused branch must not overflow
    return tl.where(x > -0.5, q + q * q * taylor_h(q), tl.exp(x) - 1.0)


@triton.jit
def log1p_unit(u):
    """log(1 + u) for 0 <= u <= 1 as 2 atanh(u / (2 + u)); relative error below 3e-7 down to u = 0."""
    s = u / (2.0 + u)
    z = s * s  # <= 1/9
    p = z * (z * (z * (z * (1 / 17) + 1 / 15) + 1 / 13) + 1 / 11) + 1 / 9
    p = z * (z * (z * (z * p + 1 / 7) + 1 / 5) + 1 / 3) + 1.0
    return 2.0 * s * p


@triton.jit
def softplus(r):
    """log(1 + e^r) without overflow, with full relative precision for r << 0."""
    return tl.maximum(r, 0.0) + log1p_unit(tl.exp(-tl.abs(r)))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); 0 and 1 at -inf and +inf."""
    return 1.0 / (1.0 + tl.exp(-x))
