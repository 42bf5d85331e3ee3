"""Estimates figures from samples, with their 95 % intervals.

All intervals take the samples as independent. Latencies of neighbouring requests under load are not quite, so under
heavy load the true intervals are somewhat wider; repeat with other seeds where it matters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from evenkeel.arrays import FloatArray
from evenkeel.errors import EvenkeelError

__all__ = [
    "Estimate",
    "exact_share",
    "grouped_share",
    "mean",
    "quantile",
    "quantile_place",
    "quantile_ratio",
    "rate",
    "sd",
    "sd_ratio",
    "share",
]

_Z = 1.959963984540054  # 97.5 % quantile of the normal law
_T = {1: 12.706204736, 2: 4.302652730, 3: 3.182446305, 4: 2.776445105}  # the same of Student's t, degrees 1 to 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """Holds a figure and its 95 % interval. NaN says that the sample is too small to know."""

    value: float
    low: float
    high: float


_UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def mean(samples: ArrayLike) -> Estimate:
    """Estimates the mean, with Student's interval."""
    values = _floats(samples)
    if values.size < 2:
        return Estimate(float(values[0]), math.nan, math.nan) if values.size else _UNKNOWN
    value = float(values.mean())
    half = _student(values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Estimate(value, value - half, value + half)


def sd(samples: ArrayLike) -> Estimate:
    """Estimates the standard deviation, with the large-sample interval of the fourth moment (normality not assumed)."""
    values = _floats(samples)
    count = values.size
    if count < 2:
        return _UNKNOWN
    value = float(values.std(ddof=1))
    if value == 0 or count < 4:
        return Estimate(value, math.nan, math.nan)
    fourth = float(((values - values.mean()) ** 4).mean())
    variance_of_variance = max((fourth - value**4 * (count - 3) / (count - 1)) / count, 0.0)
    # On the logarithm's scale, so that the interval cannot reach below zero.
    stretch = math.exp(_Z * math.sqrt(variance_of_variance) / (2 * value**2))
    return Estimate(value, value / stretch, value * stretch)


def quantile(samples: ArrayLike, level: float) -> Estimate:
    """Estimates the `level` quantile (0..1), with the distribution-free interval between two order statistics.

    The value is an order statistic too, the smallest sample that at least a share `level` does not exceed, so that it
    always lies between its bounds. A bound is NaN where no sample is far enough out: the upper bound of a p99 needs
    368 samples, that of a p99.9 needs 3,688.
    """
    if not 0 < level < 1:
        raise EvenkeelError(f"a quantile needs a level between 0 and 1, found {level}")
    values = np.sort(_floats(samples))
    count = values.size
    if not count:
        return _UNKNOWN
    below, cumulative = _binomial(count, level)
    # At most k samples lie below the quantile with probability cumulative[k - first].
    low = below + int(np.searchsorted(cumulative, 0.025, side="right"))  # so many order statistics are surely below
    high = below + int(np.searchsorted(cumulative, 0.975, side="left")) + 1
    return Estimate(
        float(values[quantile_place(count, level)]),
        float(values[low - 1]) if low >= 1 else math.nan,
        float(values[high - 1]) if high <= count else math.nan,
    )


def quantile_place(count: int, level: float) -> int:
    """Gives the place of the `level` quantile among `count` sorted samples, from 0."""
    return min(count, max(1, math.ceil(count * level - 1e-9))) - 1  # .99 of 100 is 99, whatever rounding says


def share(hits: int, count: int) -> Estimate:
    """Estimates the share hits / count, with Wilson's interval."""
    if count == 0:
        return _UNKNOWN
    if not 0 <= hits <= count:
        raise EvenkeelError(f"a share needs 0 to {count} hits, found {hits}")
    return _wilson(hits / count, count)


def exact_share(hits: int, count: int) -> Estimate:
    """Estimates the share hits / count, with Clopper and Pearson's interval: it never holds less than it says."""
    if count == 0:
        return _UNKNOWN
    if not 0 <= hits <= count:
        raise EvenkeelError(f"a share needs 0 to {count} hits, found {hits}")
    numbers = np.arange(1, count + 1, dtype=np.float64)
    ways = np.concatenate(([0.0], np.cumsum(np.log((count - numbers + 1) / numbers))))  # log of count choose 0, 1, ...

    def at_least(share: float, least: int) -> float:
        """Gives P(as many hits or more)."""
        places = np.arange(least, count + 1)
        return float(np.exp(ways[least:] + places * math.log(share) + (count - places) * math.log1p(-share)).sum())

    def solve(least: int, level: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(middle, least) < level else (low, middle)
        return (low + high) / 2

    value = hits / count
    return Estimate(value, solve(hits, 0.025) if hits else 0.0, solve(hits + 1, 0.975) if hits < count else 1.0)


def grouped_share(hits: ArrayLike, counts: ArrayLike) -> Estimate:
    """Estimates the share sum(hits) / sum(counts), where the trials of a group are not independent but groups are.

    Wilson's interval at the effective sample size, which is the number of independent trials whose share would vary as
    much as this one does between groups. With one trial in each group it is `share`.

    Args:
        hits: of each group.
        counts: trials of each group; groups without any are left out.
    """
    found, trials = _floats(hits), _floats(counts)
    found, trials = found[trials > 0], trials[trials > 0]
    if not trials.size:
        return _UNKNOWN
    total = float(trials.sum())
    value = min(max(float(found.sum()) / total, 0.0), 1.0)
    # Of a ratio, to the first order.
    variance = float(((found - value * trials) ** 2).sum()) / total**2
    # A share of 0 or 1 shows no variance; then each group counts as one trial.
    return _wilson(value, value * (1 - value) / variance if variance > 0 else float(trials.size))


def _wilson(value: float, count: float) -> Estimate:
    middle = value + _Z**2 / (2 * count)
    half = _Z * math.sqrt(value * (1 - value) / count + _Z**2 / (4 * count**2))
    below = 1 + _Z**2 / count
    # Rounding must not push a bound past the value where it is 0 or 1.
    return Estimate(value, min(max((middle - half) / below, 0.0), value), max(min((middle + half) / below, 1.0), value))


def rate(events: float, exposure: float) -> Estimate:
    """Estimates the ratio events / exposure of a count that may exceed it, with a Poisson count's score interval."""
    if exposure <= 0:
        return _UNKNOWN
    half = _Z * math.sqrt(events + _Z**2 / 4)
    middle = events + _Z**2 / 2
    return Estimate(events / exposure, min(max(middle - half, 0.0), events) / exposure, (middle + half) / exposure)


def quantile_ratio(
    first: ArrayLike, second: ArrayLike, level: float, *, paired: bool, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Estimates the quantile of `first` over that of `second`, with a percentile bootstrap interval.

    Args:
        first: samples above the line.
        second: samples below it.
        level: which quantile, 0..1.
        paired: sample i of both is the same piece of work (common random numbers): both are resampled together, which
            makes the interval as narrow as the comparison is sharp.
        resamples: how many bootstrap samples.
        seed: of the resampling.

    Raises:
        EvenkeelError: paired samples of different number.
    """

    def statistic(rows: FloatArray) -> FloatArray:
        place = quantile_place(rows.shape[1], level)
        return np.partition(rows, place, axis=1)[:, place]

    return _ratio(first, second, statistic, paired, resamples, seed)


def sd_ratio(first: ArrayLike, second: ArrayLike, *, paired: bool, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Estimates the standard deviation of `first` over that of `second`; the rest is as for `quantile_ratio`."""
    return _ratio(first, second, lambda rows: rows.std(axis=1, ddof=1), paired, resamples, seed)


def _ratio(
    first: ArrayLike,
    second: ArrayLike,
    statistic: Callable[[FloatArray], FloatArray],
    paired: bool,
    resamples: int,
    seed: int,
) -> Estimate:
    above, below = _floats(first), _floats(second)
    if paired and above.size != below.size:
        raise EvenkeelError(f"paired samples must be of one number, found {above.size} and {below.size}")
    if above.size < 2 or below.size < 2:
        return _UNKNOWN
    value = float(statistic(above[None])[0] / statistic(below[None])[0])
    random = np.random.default_rng(seed)
    step = max(1, 2_000_000 // max(above.size, below.size))  # rows at a time, to bound memory
    ratios = []
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        picks = random.integers(0, above.size, (rows, above.size))
        others = picks if paired else random.integers(0, below.size, (rows, below.size))
        ratios.append(statistic(above[picks]) / statistic(below[others]))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _floats(samples: ArrayLike) -> FloatArray:
    return np.asarray(samples, dtype=np.float64).ravel()


def _student(degrees: int) -> float:
    """Gives the 97.5 % quantile of Student's t: a table, then the expansion of Abramowitz and Stegun 26.7.5."""
    if degrees in _T:
        return _T[degrees]
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / float(degrees) ** power for power, term in enumerate(terms))


def _binomial(count: int, level: float) -> tuple[int, FloatArray]:
    """Gives P(at most k of `count`) for k = first, first + 1, ... as (first, probabilities): those not 0 or 1."""
    reach = 12 * math.sqrt(count * level * (1 - level)) + 24
    first = max(0, math.floor(count * level - reach))
    last = min(count, math.ceil(count * level + reach))
    hits = np.arange(first, last + 1, dtype=np.float64)
    at_first = (
        math.lgamma(count + 1)
        - math.lgamma(first + 1)
        - math.lgamma(count - first + 1)
        + first * math.log(level)
        + (count - first) * math.log1p(-level)
    )
    steps = np.log((count - hits[1:] + 1) / hits[1:]) + math.log(level) - math.log1p(-level)
    return first, np.cumsum(np.exp(at_first + np.concatenate(([0.0], np.cumsum(steps)))))
