"""Chooses fewer levels for finished sums, so that they come down in fewer bits."""

from functools import lru_cache
from math import exp

import numpy as np
from numpy.typing import NDArray

__all__ = ["fewer_bits"]

_STEPS = 200


@lru_cache(maxsize=16)
def fewer_bits(table: tuple[int, ...], world: int, bits: int) -> tuple[NDArray[np.uint8], bytes]:
    """Finds 2**bits of the sums of `world` numbers of a table that stand for the others with little error.

    Sums of many workers' numbers are near normal. What the workers have in common decides how wide: from independent
    ones (narrow) to the same ones (wide), so levels are chosen for the middle of the two, and the ends are kept.

    Returns:
        What each written number stands for, `[2**bits]`, and for each sum from 0 to 255 the number that is written.
    """
    top = table[-1] * world
    sums = np.arange(top + 1, dtype=np.float64)
    # One rotated, scaled coordinate is near N(0, 1) with the table's ends at t, about 2.66 for four bits.
    one = table[-1] / 2 / 2.66
    wide = one * (world * (1 + world) / 2) ** 0.5
    weight = np.array([exp(-(((each - top / 2) / wide) ** 2) / 2) for each in sums]) + 1e-6
    count = min(1 << bits, top + 1)
    levels = np.linspace(0, top, count)
    for _ in range(_STEPS):  # Lloyd and Max: the mean of those that a level stands for
        nearest = np.abs(sums[:, None] - levels[None, :]).argmin(1)
        for level in range(count):
            mine = nearest == level
            if mine.any():
                levels[level] = np.average(sums[mine], weights=weight[mine])
    whole = np.unique(np.rint(levels)).astype(np.int64)
    nearest = np.abs(sums[:, None] - whole[None, :]).argmin(1)
    written = np.zeros(256, np.uint8)
    written[: top + 1] = nearest
    stands_for = np.zeros(1 << bits, np.uint8)
    stands_for[: len(whole)] = whole
    return stands_for, written.tobytes()
