"""Live quantiles of the last few thousand service times."""

from evenkeel.serving.policy import Trigger

__all__ = ["LiveQuantiles"]


class LiveQuantiles:
    """Exact quantiles of a sliding window, refreshed every few samples.

    Sorting the window costs some 50 us per 1,000 samples; doing it once per `refresh` samples makes that 1 us a sample,
    and a quantile of a thousand samples does not move in twenty.

    Args:
        window: how many samples are remembered.
        refresh: samples between two looks at them.
        enough: samples needed before any quantile is told.
    """

    def __init__(self, window: int = 1000, refresh: int = 25, enough: int = 20) -> None:
        self._samples: list[float] = []
        self._next = 0
        self._window = window
        self._refresh = refresh
        self._enough = enough
        self._since = 0
        self._sorted: list[float] = []

    def add(self, sample: float) -> None:
        """Remember one sample, seconds."""
        if len(self._samples) < self._window:
            self._samples.append(sample)
        else:
            self._samples[self._next] = sample
            self._next = (self._next + 1) % self._window
        self._since += 1
        if self._since >= self._refresh or len(self._samples) == self._enough:
            self._sorted = sorted(self._samples)
            self._since = 0

    def quantile(self, q: float) -> float | None:
        """The q-quantile, or None while too few samples are in."""
        if len(self._samples) < self._enough:
            return None
        return self._sorted[min(int(q * len(self._sorted)), len(self._sorted) - 1)]

    def after(self, trigger: Trigger) -> float:
        """Seconds after arrival at which `trigger` fires now."""
        if trigger.quantile is None:
            return trigger.fixed_s or 0.0
        seconds = self.quantile(trigger.quantile)
        if seconds is None:
            seconds = trigger.initial_s
        return min(max(seconds, trigger.floor_s), trigger.ceiling_s)
