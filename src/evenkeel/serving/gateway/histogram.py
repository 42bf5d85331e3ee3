"""Counts durations in fixed buckets, so that the counts of several gateways add up to those of all.

A quantile of each gateway says nothing of the quantile of all; sums of buckets do, within the width of one bucket. All
histograms have the same bounds for that reason.
"""

from bisect import bisect_left
from collections.abc import Iterable

__all__ = ["BOUNDS_S", "Histogram", "total"]

# Each at most twice the one before it: where a sum says that the p99 is, it is off by less than that.
BOUNDS_S = (
    *(0.000125, 0.00025, 0.0005, 0.00075),
    *(0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 10.0),
)  # fmt: skip


class Histogram:
    """Counts durations by bucket.

    Attributes:
        counts: bucket i holds what is above bound i - 1 and at most bound i; one more bucket holds the rest.
        sum_s: of all durations.
    """

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """Gives the number of durations."""
        return sum(self.counts)

    def quantile(self, q: float) -> tuple[float, float] | None:
        """Gives the bounds of the bucket in which the quantile lies; None while there are no durations."""
        rank = q * self.count
        seen = 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                upper = BOUNDS_S[bucket] if bucket < len(BOUNDS_S) else float("inf")
                return (BOUNDS_S[bucket - 1] if bucket else 0.0), upper
        return None


def total(histograms: Iterable[Histogram]) -> Histogram:
    """Adds histograms up."""
    added = Histogram()
    for one in histograms:
        added.counts = [mine + its for mine, its in zip(added.counts, one.counts, strict=True)]
        added.sum_s += one.sum_s
    return added
