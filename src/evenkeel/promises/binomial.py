"""Computes binomial tails and exact confidence bounds of a share, without scipy."""

from functools import lru_cache
from math import exp, log

import numpy as np

from evenkeel.arrays import FloatArray

__all__ = ["cdf", "cdfs", "lower_bound", "max_errors", "upper_bound"]

_STEPS = 60  # of a bisection, to the last bit that matters


@lru_cache(maxsize=8)
def _log_factorials(n: int) -> FloatArray:
    # Extended precision: the error of a sum of n logarithms would else be the largest one here.
    sums = np.cumsum(np.log(np.arange(1, n + 1, dtype=np.longdouble)))
    table: FloatArray = np.concatenate([np.zeros(1), sums.astype(np.float64)])
    return table


def cdfs(n: int, p: float) -> FloatArray:
    """Gives P(X <= k) of X ~ Binomial(n, p) for k = 0..n, [n + 1].

    The relative error is about 1e-10 for n up to 100,000: small probabilities are summed from the small end.
    """
    if not 0 < p < 1:
        return np.ones(n + 1) if p <= 0 else np.append(np.zeros(n), 1.0)
    places = np.arange(n + 1)
    table = _log_factorials(n)
    logs = table[n] - table - table[::-1] + places * log(p) + (n - places) * np.log1p(-p)
    sums: FloatArray = np.minimum(np.cumsum(np.exp(logs)), 1.0)
    return sums


@lru_cache(maxsize=64)
def _kept(n: int, p: float) -> FloatArray:
    return cdfs(n, p)


def cdf(k: int, n: int, p: float) -> float:
    """Gives P(X <= k) of X ~ Binomial(n, p)."""
    if k < 0:
        return 0.0
    if k >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    table = _log_factorials(n)
    places = np.arange(k + 1)
    logs = table[n] - table[: k + 1] - table[n - k : n + 1][::-1] + places * log(p) + (n - places) * log(1 - p)
    largest = float(logs.max())
    return min(1.0, exp(largest) * float(np.exp(logs - largest).sum()))


def max_errors(n: int, rate: float, delta: float) -> int:
    """Gives the largest k with P(X <= k) <= delta, X ~ Binomial(n, rate); -1 where there is none.

    So few errors among n show, at level `delta`, that the true rate is below `rate`.
    """
    return int(np.searchsorted(_kept(n, rate), delta, side="right")) - 1


def upper_bound(k: int, n: int, delta: float) -> float:
    """Gives what the true rate exceeds with probability `delta` at most, after k hits in n (Clopper and Pearson)."""
    if k >= n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(k, n, middle) > delta else (low, middle)
    return high


def lower_bound(k: int, n: int, delta: float) -> float:
    """Gives the rate that the true one is below with probability `delta` at most, after k hits in n."""
    return 1.0 - upper_bound(n - k, n, delta)
