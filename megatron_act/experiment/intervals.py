"""Student's t: intervals of means, paired tests, and the smallest difference that a study could have seen.

    interval of a mean       mean +- t(0.975, n-1) * sd / sqrt(n)
    paired test of A and B   the same for the n differences B - A of runs with the same seed and data order
    detectable difference    (t(0.975, n-1) + t(0.8, n-1)) * sd / sqrt(n): seen in 80 % of such studies if it is real

The sample's own standard deviation stands for the true one. Several pairs at once are judged by Holm's correction
(S. Holm, "A simple sequentially rejective multiple test procedure", 1979), which keeps the chance of any wrong claim
below 5 %. No SciPy: the distribution is the regularized incomplete beta function (DLMF 8.17).
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
POWER = 0.8
_TINY = 1e-300
_TERMS = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over n values with its standard deviation and 95 % interval; the last three None for one value."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """B - A over n pairs.

    Attributes:
        interval: of the mean difference.
        p: two-sided p-value of "no difference"; None for one pair.
        detectable: the smallest true difference that such a study sees in 80 % of cases; None for one pair.
    """

    interval: Interval
    p: float | None
    detectable: float | None


def mean_interval(values: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of independent values (at least one)."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(n, mean, None, None, None)
    sd = statistics.stdev(values)
    half = t_quantile(0.5 + CONFIDENCE / 2, n - 1) * sd / math.sqrt(n)
    return Interval(n, mean, sd, mean - half, mean + half)


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compares two arms run by run: ``second - first``, both in the order of the same seeds."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    interval = mean_interval(differences)
    if interval.sd is None:
        return Paired(interval, None, None)
    error = interval.sd / math.sqrt(interval.n)
    return Paired(interval, _p_value(interval.mean, error, interval.n - 1), detectable(interval.sd, interval.n))


def _p_value(mean: float, error: float, df: int) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * t_cdf(-abs(mean / error), df)


def detectable(sd: float, n: int) -> float:
    """The smallest difference that n pairs whose differences deviate by ``sd`` see with 80 % power at the 5 % level."""
    return (t_quantile(0.5 + CONFIDENCE / 2, n - 1) + t_quantile(POWER, n - 1)) * sd / math.sqrt(n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values in the given order: each may be read against 0.05 by itself."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) for Student's t with ``df`` degrees of freedom."""
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return tail if t < 0 else 1.0 - tail


@functools.cache
def t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, for p in (0.5, 1): by bisection to the last bit."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularized I_x(a, b); the continued fraction converges fast below the mean, its mirror image above."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) * _continued_fraction(a, b, x) / a


def _continued_fraction(a: float, b: float, x: float) -> float:
    """1 / (1 + d1 / (1 + d2 / (1 + ...))), DLMF 8.17.22, by the modified Lentz method."""
    value, c, d = 1.0, 1.0, 0.0
    for n in range(1, _TERMS):
        m = n // 2
        if n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / (1.0 + term * d or _TINY)
        c = 1.0 + term / c or _TINY
        value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return 1.0 / value
