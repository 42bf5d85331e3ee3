"""Tests a drop of accuracy on pairs, exactly for every sample size.

The difference D of a pair is 1 where only the accurate model is right, -1 where only the other answer is, else 0. Most
are 0, so the test must use how rare the others are: that is one number nobody knows, q = P(D is not 0). It is bounded
by what was seen, at a small part of the level, and the tail of the sum of all D is the largest one within that bound
(Berger and Boos, P values maximized over a confidence set). The tail itself is computed from its Fourier transform.
"""

from functools import lru_cache
from math import ceil, log2, sqrt

import numpy as np

from evenkeel.arrays import Array, FloatArray, IntegerArray
from evenkeel.promises.binomial import lower_bound, upper_bound

__all__ = ["drop_shown", "max_worse"]

_FOR_SPREAD = 0.05  # share of the level that goes into the bounds of q
_GUESSES = 7  # values of q within them
_DEVIATIONS = 13.0  # half of the window in which the tail is computed


def drop_shown(worse: IntegerArray, better: IntegerArray, n: int, drop: float, delta: float) -> Array:
    """Tells for each threshold whether its pairs show, at level `delta`, that accuracy drops by less than `drop`, [t].

    Args:
        worse: pairs with D = 1, [t].
        better: pairs with D = -1, [t].
        n: all pairs.
        drop: above 0.
        delta: probability to say so although it drops by `drop` or more.
    """
    limits = [max_worse(n, int(apart), drop, delta) for apart in worse + better]
    shown: Array = worse - better <= np.array(limits)
    return shown


@lru_cache(maxsize=1 << 16)
def max_worse(n: int, apart: int, drop: float, delta: float) -> int:
    """Gives the largest sum of D, of which `apart` are not 0, that shows a drop below `drop`; -n - 1: none does."""
    for_spread = delta * _FOR_SPREAD
    low = lower_bound(apart, n, for_spread / 2)
    high = upper_bound(apart, n, for_spread / 2)
    if high <= drop:  # fewer pairs differ than would have to
        return apart
    tails = [_tail(n, float(q), drop) for q in np.linspace(max(low, drop), high, _GUESSES)]
    limit = n
    for begin, sums in tails:
        limit = min(limit, begin + int(np.searchsorted(sums, delta - for_spread, side="right")) - 1)
    return max(limit, -n - 1)


def _tail(n: int, q: float, drop: float) -> tuple[int, FloatArray]:
    """Gives P(sum of D <= s) for s = begin, begin + 1, ..., where D is not 0 with probability q and has mean `drop`."""
    size = 1 << ceil(log2(max(64.0, 2 * _DEVIATIONS * sqrt(n * q) + 64)))
    begin = round(n * drop) - size // 2
    angles = 2 * np.pi * np.arange(size // 2 + 1) / size
    one = (1 - q) + (q + drop) / 2 * np.exp(-1j * angles) + (q - drop) / 2 * np.exp(1j * angles)
    whole = np.exp(n * np.log(one) + 1j * angles * begin)
    chances = np.fft.irfft(whole, size)
    sums: FloatArray = np.cumsum(np.maximum(chances, 0.0))
    return begin, sums
