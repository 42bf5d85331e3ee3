"""Computes the levels that represent a standard normal number with the least squared error."""

from functools import lru_cache
from itertools import pairwise
from math import erf, exp, pi, sqrt
from statistics import NormalDist

__all__ = ["lloyd_max"]

_ENOUGH = 1e-10
_ROUNDS = 3000


@lru_cache
def lloyd_max(bits: int) -> tuple[tuple[float, ...], float]:
    """Gives 2**bits rising levels, and the mean squared error D of rounding N(0, 1) to the nearest of them.

    Source: Lloyd (1957) and Max (1960): each level is the mean of what is rounded to it, borders are half-way.
    """
    count = 2**bits
    # Near the best already: levels as dense as the cube root of the density (Panter and Dite).
    wide = NormalDist(0.0, sqrt(3.0))
    levels = [wide.inv_cdf((place + 0.5) / count) for place in range(count)]
    shares: list[float] = []
    for _ in range(_ROUNDS):
        borders = [(low + high) / 2 for low, high in pairwise(levels)]
        below = [0.0, *((1 + erf(border / sqrt(2))) / 2 for border in borders), 1.0]
        density = [0.0, *(exp(-border * border / 2) / sqrt(2 * pi) for border in borders), 0.0]
        shares = [below[place + 1] - below[place] for place in range(count)]
        means = [(density[place] - density[place + 1]) / shares[place] for place in range(count)]
        moved = max(abs(mean - level) for mean, level in zip(means, levels, strict=True))
        levels = means
        if moved < _ENOUGH:
            break
    return tuple(levels), 1 - sum(share * level * level for share, level in zip(shares, levels, strict=True))
