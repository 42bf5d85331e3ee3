"""Chooses fewer levels for finished sums, so that they come down in fewer bits."""

from functools import lru_cache
from math import sqrt

import numpy as np
from numpy.typing import NDArray

__all__ = ["fewer_bits"]

_STEPS = 300
_CLIP = 2.66  # standard deviations of one coordinate from the table's middle to its ends, with THC's four bits
# Gradients have something in common, so their sums are wider than those of independent ones; and no level may lie
# where it costs the others much. By trial, over correlations from none to whole.
_WIDER = 1.2
_FLOOR = 1e-6  # weight of sums that hardly come up: they must not be far from a level all the same


@lru_cache(maxsize=16)
def fewer_bits(table: tuple[int, ...], world: int, bits: int) -> tuple[NDArray[np.uint8], bytes]:
    """Finds 2**bits of the sums of `world` numbers of a table that stand for the others with little error.

    Sums of rotated coordinates are near normal; levels are Lloyd's and Max's for that, as whole numbers.

    Returns:
        What each written number stands for, `[2**bits]`, and for each sum from 0 to 255 the number that is written.
    """
    top = table[-1] * world
    sums = np.arange(top + 1, dtype=np.float64)
    wide = _WIDER * sqrt(world) * table[-1] / 2 / _CLIP
    weight = np.exp(-(((sums - top / 2) / wide) ** 2) / 2) + _FLOOR
    count = min(1 << bits, top + 1)
    # Many levels have the density of the weight's cube root: a good place to begin.
    density = np.cumsum(np.cbrt(weight))
    levels = np.interp(np.linspace(0, 1, count + 2)[1:-1], density / density[-1], sums)
    levels[0], levels[-1] = 0, top
    for _ in range(_STEPS):
        nearest = np.abs(sums[:, None] - levels).argmin(1)
        for level in range(count):
            mine = nearest == level
            if mine.any():
                levels[level] = np.average(sums[mine], weights=weight[mine])
    whole = np.unique(np.rint(levels)).astype(np.int64)
    written = np.zeros(256, np.uint8)
    written[: top + 1] = np.abs(sums[:, None] - whole).argmin(1)
    stands_for = np.zeros(1 << bits, np.uint8)
    stands_for[: len(whole)] = whole
    return stands_for, written.tobytes()
