"""Gives live quantiles of the last thousand service times."""

from bisect import bisect_left, insort
from collections import deque

from evenkeel.serving.gateway.policy import Trigger

__all__ = ["LiveQuantiles"]

_NEVER = float("inf")
_REFRESH = 32  # samples for which a point that takes a search is kept
_CLEARLY = 1.25  # of the median: what is nearer to it is not late, however little times differ


class LiveQuantiles:
    """Keeps a sliding window in order, for exact quantiles: a sample costs about a microsecond, reading one nothing.

    Args:
        window: how many samples are remembered.
        enough: samples needed before any quantile is given.
    """

    def __init__(self, window: int = 1000, enough: int = 20) -> None:
        self._samples: deque[float] = deque()  # oldest first
        self._sorted: list[float] = []
        self._window = window
        self._enough = enough
        self._paying_s: float | None = None  # of the hedges' trigger, and for how many samples it still holds
        self._stale = 0

    def add(self, sample: float) -> None:
        """Adds one sample, seconds."""
        self._stale -= 1
        self._samples.append(sample)
        insort(self._sorted, sample)
        if len(self._samples) > self._window:
            del self._sorted[bisect_left(self._sorted, self._samples.popleft())]

    def quantile(self, q: float) -> float | None:
        """Gives the q-quantile, or None while there are too few samples."""
        count = len(self._sorted)
        if count < self._enough:
            return None
        return self._sorted[min(int(q * count), count - 1)]

    def after(self, trigger: Trigger) -> float:
        """Gives the seconds after arrival at which `trigger` fires now."""
        if trigger.spreads is not None:
            seconds = self._pays_s(trigger.spreads) if trigger.pays else self._late_s(trigger.spreads)
        elif trigger.quantile is not None:
            seconds = self.quantile(trigger.quantile)
        else:
            return trigger.fixed_s or 0.0
        if seconds is None:
            seconds = trigger.initial_s
        return min(max(seconds, trigger.floor_s), trigger.ceiling_s)

    def _late_s(self, spreads: float) -> float | None:
        """Gives the time that is `spreads` spreads above the median, and clearly above it, but not beyond p95.

        Where even the slowest are within that many spreads, as of a uniform law, p95 hides queueing at least.
        """
        count = len(self._sorted)
        if count < self._enough:
            return None
        median = self._sorted[count // 2]
        late_s = max(median + spreads * (self._sorted[count * 3 // 4] - median), _CLEARLY * median)
        return min(late_s, self._sorted[count * 19 // 20])

    def _pays_s(self, spreads: float) -> float | None:
        """Gives the first time from there on at which asking again is expected to be no slower than waiting on.

        What is left of a time beyond t is, in the mean, what the samples beyond t exceed it by; another attempt takes
        the median. Where no samples are far beyond the others, as of a fleet without a slow mode, it never pays.
        """
        if self._stale <= 0 or self._paying_s is None:
            self._stale = _REFRESH
            self._paying_s = self._find_paying(spreads)
        return self._paying_s

    def _find_paying(self, spreads: float) -> float | None:
        first_s = self._late_s(spreads)
        if first_s is None:
            return None
        ordered = self._sorted
        fresh_s = ordered[len(ordered) // 2]
        paying_s = _NEVER
        total_s = 0.0
        for rank in range(len(ordered)):
            sample = ordered[-1 - rank]
            beyond_s = sample if sample > first_s else first_s
            if rank and total_s / rank - beyond_s >= fresh_s:
                paying_s = beyond_s
            if sample <= first_s:
                break
            total_s += sample
        return paying_s
