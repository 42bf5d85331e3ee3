"""Finds the levels to which THC rounds a standard normal number, and what they cost: exactly, by dynamic programming.

A table T of 2**bits rising whole numbers, T[0] = 0 and T[-1] = g (the granularity), stands for the levels
q_k = -t + (2 t / g) T[k]. Only whole T can be added without being decoded first. Rounding z in q_k..q_{k+1} to either
end without bias has the variance (z - q_k)(q_{k+1} - z); the best T has the least expected variance over N(0, 1).

No torch here, and nothing that differs between machines: near ties go to the smaller number, and ranks compare `repr`.
"""

from functools import lru_cache
from itertools import pairwise
from math import erf, erfc, exp, pi, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError

__all__ = ["clamp_error", "clip", "rounding_error", "table"]

_FINEST = 1024
# Costs closer than this are ties: their difference is rounding, which may differ between machines.
_TIE = 1e-13


def clip(p: float) -> float:
    """Says where to clip: at t with P(|z| > t) = p for z of N(0, 1).

    Raises:
        ConfigurationError: `p` is not between 0 and 1.
    """
    if not 1e-12 <= p < 1:
        raise ConfigurationError(f"p: the share of clipped coordinates must be from 1e-12 to below 1, found {p}")
    return -NormalDist().inv_cdf(p / 2)


@lru_cache(maxsize=64)
def table(bits: int, granularity: int, p: float) -> tuple[int, ...]:
    """Finds the best table of 2**bits numbers from 0 to `granularity`, for levels in -clip(p)..clip(p).

    O(2**bits * granularity**2): a millisecond for 4 bits, under a second for 8.

    Raises:
        ConfigurationError: bits not 1 to 8, or a granularity below 2**bits - 1 or above 1024.
    """
    if not 1 <= bits <= 8:
        raise ConfigurationError(f"bits: must be 1 to 8, found {bits}")
    if not 2**bits - 1 <= granularity <= _FINEST:
        raise ConfigurationError(
            f"granularity: must be {2**bits - 1} to {_FINEST} for {bits} bits, found {granularity}"
        )
    cost = _costs(granularity, clip(p))
    best = np.full(granularity + 1, np.inf)
    best[0] = 0.0
    choices: list[NDArray[np.intp]] = []
    for _ in range(2**bits - 1):
        through = best[:, None] + cost
        least = through.min(axis=0)
        choices.append((through <= least + _TIE).argmax(axis=0))
        best = least
    numbers = [granularity]
    for choice in reversed(choices):
        numbers.append(int(choice[numbers[-1]]))
    return tuple(reversed(numbers))


def rounding_error(numbers: tuple[int, ...], p: float) -> float:
    """Gives the expected variance of unbiased rounding of z in -t..t to these levels (z beyond counts nothing)."""
    cost = _costs(numbers[-1], clip(p))
    return float(sum(cost[low, high] for low, high in pairwise(numbers)))


def clamp_error(p: float) -> float:
    """Gives z's expected squared distance from -t..t: 2 ((1 + t^2) Q(t) - t phi(t)), Q the upper tail of N(0, 1)."""
    t = clip(p)
    return 2 * ((1 + t * t) * erfc(t / sqrt(2)) / 2 - t * exp(-t * t / 2) / sqrt(2 * pi))


def _costs(granularity: int, t: float) -> NDArray[np.float64]:
    """Gives cost[a, c]: the expected variance between neighbouring levels a and c (infinite unless a < c).

    Int_a^c (z - a)(c - z) phi(z) dz = -I2 + (a + c) I1 - a c I0, with I_k = Int_a^c z^k phi(z) dz.
    """
    grid = np.linspace(-t, t, granularity + 1)
    cumulative = np.array([erf(z / sqrt(2)) / 2 for z in grid])
    density = np.exp(-grid * grid / 2) / sqrt(2 * pi)
    a, c = grid[:, None], grid[None, :]
    zeroth = cumulative[None, :] - cumulative[:, None]
    first = density[:, None] - density[None, :]
    second = zeroth + (grid * density)[:, None] - (grid * density)[None, :]
    cost: NDArray[np.float64] = np.where(a < c, -second + (a + c) * first - a * c * zeroth, np.inf)
    return cost
