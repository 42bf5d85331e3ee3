"""Measures requests from their first byte to their answer, by the status that it has."""

from time import monotonic

from evenkeel.serving.gateway.histogram import Histogram

__all__ = ["CLIENT_GONE", "RequestTimes"]

CLIENT_GONE = 499  # stands for a status where nobody waited for one


class RequestTimes:
    """Holds the times of one model's requests.

    Attributes:
        by_status: HTTP status, or what it would be, -> the times.
        last_s: when the last one was answered, by `time.monotonic`; 0 before the first.
    """

    def __init__(self) -> None:
        self.by_status: dict[int, Histogram] = {}
        self.last_s = 0.0

    def add(self, status: int, since_s: float) -> None:
        """Measures a request that is answered now, and whose first byte came at `since_s`."""
        self.last_s = now = monotonic()
        times = self.by_status.get(status)
        if times is None:
            times = self.by_status[status] = Histogram()
        times.add(now - since_s)
