"""Elementary functions for Triton kernels: fp32 in, fp32 out, no libdevice, the same in Triton's interpreter.

Polynomials are weighted minimax fits of this project (Lawson's iteration in float64); each docstring states its range
and error before rounding. Public kernels compute ``exp(x) - 1`` and lose everything near 0: ``h_series`` does not.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def h_series(x):
    """(e^x - 1 - x) / x^2 for -1 <= x <= 0; relative error 2.2e-8, 1/2 at 0."""
    p = x * (x * 0.0001379299210384488 + 0.0013263130094856024) + 0.008302794769406319
    return x * (x * (x * p + 0.04166003689169884) + 0.1666661947965622) + 0.5


@triton.jit
def exp_of(x):
    """e^x for x <= 0: one multiplication and one ex2, whose relative error is |x| 6e-8 + 2 ulp."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def exp_half(z):
    """e^(-z/2) for z >= 0, likewise."""
    return tl.exp2(z * -0.7213475204444817)


@triton.jit
def clip_low(x):
    """max(x, 0) in one instruction; NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reciprocal(x):
    """1 / x for 1 <= x <= 2 within 1 ulp: a Newton step after a squared rsqrt costs no more than a division."""
    root = tl.rsqrt(x)
    r = root * root
    return r * (2.0 - x * r)


@triton.jit
def exp_closely(x):
    """e^x for -87 <= x <= 0 within 1 ulp, without ex2: for scalars, whose error would be everyone's."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    y = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6  # ln 2 in two parts, the first of 15 bits
    p = y * (y * (y * (y * (1 / 5040) + 1 / 720) + 1 / 120) + 1 / 24) + 1 / 6
    p = y * (y * (y * p + 0.5) + 1.0) + 1.0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log1p_unit(u):
    """log(1 + u) for 0 <= u <= 1 as 2 atanh(u / (2 + u)); relative error below 2e-7 down to u = 0."""
    s = tl.div_rn(u, 2.0 + u)
    z = s * s  # <= 1/9
    p = z * (z * (z * (z * (1 / 17) + 1 / 15) + 1 / 13) + 1 / 11) + 1 / 9
    p = z * (z * (z * (z * p + 1 / 7) + 1 / 5) + 1 / 3) + 1.0
    return 2.0 * s * p


@triton.jit
def softplus(r):
    """log(1 + e^r) without overflow, with full relative precision for r << 0."""
    return tl.maximum(r, 0.0) + log1p_unit(exp_closely(tl.maximum(-tl.abs(r), -87.0)))


@triton.jit
def normal_tail(a):
    """Phi(-a) for 0 <= a <= 40 as 2^P(a), P of degree 8: absolute error 7.5e-9 and 2 ulp of ex2; 0 for large a."""
    p = a * (a * -2.7720490387532458e-06 + 3.8620745899494486e-05) + -0.00018254759536147705
    p = a * (a * p + -0.00014587015256755634) + 0.007075471802245062
    p = a * (a * p + -0.05250502871997298) + -0.4592049072476593
    return tl.exp2(a * (a * p + -1.1511057235272535) + -0.9999999782823457)


@triton.jit
def mills(a):
    """e^(a^2/2) Phi(-a) for 0 <= a <= 6; times e^(-a^2/2) its error is below 6e-8, beyond a = 0.5 below 2.6e-8.

    Beyond 6 the factor e^(-a^2/2) < 2e-8 outweighs the polynomial's growth.
    """
    p = a * (a * (a * -2.7823256232295535e-07 + 6.946621397219133e-06) + -7.814905256964266e-05) + 0.0005316330934874713
    p = a * (a * p + -0.0024954373948276043) + 0.008826997131109238
    p = a * (a * p + -0.025263365358114243) + 0.06177409738302231
    p = a * (a * p + -0.13274505734443665) + 0.24996086955070496
    return a * (a * p + -0.39893996715545654) + 0.5


@triton.jit
def erf_series(z):
    """erf(a / sqrt 2) / a for z = a^2 <= 0.5; relative error 1.3e-7."""
    return z * (z * (z * -0.002155730966478586 + 0.019879652187228203) + -0.1329740285873413) + 0.797884464263916


@triton.jit
def tanh_series(z):
    """tanh(a / 2) / a for z = a^2 <= 0.5; relative error 3.8e-8."""
    return z * (z * (z * -0.00038174065412022173 + 0.0041544754058122635) + -0.0416654609143734) + 0.4999999701976776


@triton.jit
def atan_series(z):
    """atan(m) / (pi m) for z = m^2 <= 1; relative error 1.5e-8."""
    p = z * (z * 0.0009071472464571757 + -0.005114800203728088) + 0.013589127371855613
    p = z * (z * p + -0.023886907533948634) + 0.03387114288184595
    p = z * (z * p + -0.04521160241000085) + 0.06363848518056284
    return z * (z * p + -0.10610246375582295) + 0.3183098861837907


@triton.jit
def power(u, r):
    """(u^r, r log2 u) for u >= 0, r > 0: 2^(r e + r l), u = 2^(e + l), |l| <= 1/2; absolute error of l 7e-9.

    r e + r l is rounded once, so the relative error of u^r grows with the result: 4e-8 |r log2 u| and 2 ulp of ex2.
    u = 0 counts as 2^-127.
    """
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) & -8388608  # e 2^23; sqrt(1/2) = 0x3F3504F3: the mantissa lands in [sqrt(1/2), sqrt(2))
    f = (bits - e).to(tl.float32, bitcast=True) - 1.0
    p = f * (f * 0.12541243433952332 + -0.21030333638191223) + 0.2173793762922287
    p = f * (f * p + -0.23851943016052246) + 0.28765666484832764
    p = f * (f * p + -0.3607212007045746) + 0.48092252016067505
    p = f * (f * p + -0.7213471531867981) + 1.442694902420044
    exponent = (r * 1.1920928955078125e-07) * e.to(tl.float32) + (r * f) * p  # 2^-23: e counts from bit 23
    return tl.exp2(exponent), exponent
