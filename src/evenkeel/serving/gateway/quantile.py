"""Gives live quantiles of the last thousand service times."""

from bisect import bisect_left, insort
from collections import deque

from evenkeel.serving.gateway.policy import Trigger
from evenkeel.serving.gateway.remaining import Remaining

__all__ = ["LiveQuantiles"]

_NEVER = float("inf")
_REFRESH = 32  # samples for which what takes a search is kept
# Spreads above the median. From 2.5 on lie 5 % of a symmetrical law and 9 % of an exponential one. A hedge is looked at
# earlier, because its answer takes a service time more.
_FILL_SPREADS = 2.5
_HEDGE_SPREADS = 1.5
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
        self._stale = 0  # samples for which these still hold
        self._remaining: Remaining | None = None
        self._pays_s = self._gains_most_s = _NEVER  # ages at which a hedge begins to pay, and at which it gains most

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

    def after(self, trigger: Trigger, scarce: bool = False) -> float:
        """Gives the seconds after arrival at which `trigger` fires now; `scarce`: where not all can have a hedge."""
        seconds: float | None
        if trigger.auto == "fill":
            seconds = self._late_s(_FILL_SPREADS)
        elif trigger.auto == "hedge":
            self._learn()
            seconds = self._gains_most_s if scarce else self._pays_s
        elif trigger.quantile is not None:
            seconds = self.quantile(trigger.quantile)
        else:
            return trigger.fixed_s or 0.0
        if seconds is None or len(self._sorted) < self._enough:
            seconds = trigger.initial_s
        return min(max(seconds, trigger.floor_s), trigger.ceiling_s)

    def _late_s(self, spreads: float) -> float:
        """Gives the time that is `spreads` spreads above the median, and clearly above it, but not beyond p95.

        A spread is the distance from the median to the upper quartile. Up to a fifth of stragglers hardly move either,
        so the point stays below the slow mode, where p95 lies inside it; a heavy tail moves the quartile, so that not
        too much of it counts as late. Where even the slowest are within that many spreads, as of a uniform law, p95
        hides queueing at least.
        """
        count = len(self._sorted)
        if not count:
            return 0.0
        median = self._sorted[count // 2]
        late_s = max(median + spreads * (self._sorted[count * 3 // 4] - median), _CLEARLY * median)
        return min(late_s, self._sorted[count * 19 // 20])

    def left_s(self, age_s: float) -> float:
        """Gives the seconds that an item of this age is expected to go on; see `Remaining`."""
        self._learn()
        return self._remaining.left_s(age_s) if self._remaining is not None else age_s

    def _learn(self) -> None:
        """Looks at the samples again when enough are new."""
        if self._stale > 0 or len(self._sorted) < self._enough:
            return
        self._stale = _REFRESH
        self._remaining = Remaining(self._sorted)
        self._pays_s = self._remaining.first_paying_s(self._late_s(_HEDGE_SPREADS))
        self._gains_most_s = self._remaining.most_s(self._pays_s) if self._pays_s < _NEVER else _NEVER
