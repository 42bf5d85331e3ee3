"""Gives live quantiles of the last thousand service times."""

from bisect import bisect_left, insort
from collections import deque

from evenkeel.serving.gateway.policy import Trigger

__all__ = ["LiveQuantiles"]


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

    def add(self, sample: float) -> None:
        """Adds one sample, seconds."""
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
        if trigger.quantile is None:
            return trigger.fixed_s or 0.0
        seconds = self.quantile(trigger.quantile)
        if seconds is None:
            seconds = trigger.initial_s
        return min(max(seconds, trigger.floor_s), trigger.ceiling_s)
