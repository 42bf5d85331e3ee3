"""Decides which replicas get work: ejects those that stay slow or stop answering, and probes them back in.

Four things are kept apart. A replica that is *gone* says so itself (`Backend.ready`). A replica that is *stalled* has
tasks but has not replied for far longer than any reply takes: frozen, or cut off. A replica that is *slow* replies, but
all but one of its last replies took far longer than the fleet's median: one slow reply is what fills and hedges are
for, a row of them is a slow machine. (Not its own median: with a heavy tail four slow replies in eight are soon met
with, seven are not.) A replica that is *failing* replies with errors only; being so quick at it, it would get most of
the work. Slow and failing replicas are ejected only while most of the fleet is left, since a fleet that is slow as a
whole is not mended by leaving it.

A stalled replica is back with its next reply, of whatever task. The others are probed after a pause, with copies of
real items whose users do not wait for the probe; good probes bring a replica back, a bad one doubles the pause. Stalled
ones are probed too, for they may have nothing left to reply to.
"""

from collections import deque
from dataclasses import dataclass

__all__ = ["Health", "HealthSettings"]


@dataclass(frozen=True)
class HealthSettings:
    """When a replica is ejected, and how it comes back."""

    window: int = 8  # last replies that are looked at; up: slower to eject, fewer false alarms
    slow_factor: float = 3.0  # slow is a reply that took this many times the fleet's median
    most_failures: int = 5  # errors in a row, beyond which it is ejected
    stall_factor: float = 8.0  # stalled when silent for this many times the fleet's p95
    min_stall_s: float = 1.0  # never called stalled sooner than this
    max_slow_share: float = 0.34  # of the fleet that may be out, for whatever reason, when one more is ejected as slow
    pause_s: float = 1.0  # before the first probe
    max_pause_s: float = 30.0
    probes: int = 2  # good probes needed to come back


class Health:
    """The state of one replica. Pure: told what happened and when, asked what follows."""

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._recent: deque[float] = deque(maxlen=settings.window)
        self._pause_s = settings.pause_s
        self._good_probes = 0
        self._failures = 0
        self.ejected_for: str | None = None  # "slow", "failing" or "stalled"
        self._probe_at = 0.0
        self._probing = False

    @property
    def ejected(self) -> bool:
        """True while the replica gets no work of its own."""
        return self.ejected_for is not None

    @property
    def stalled(self) -> bool:
        """True while nothing is expected of the tasks that it has."""
        return self.ejected_for == "stalled"

    def replied(self, service_s: float) -> None:
        """An ordinary reply came."""
        self._recent.append(service_s)
        self._failures = 0

    def failed(self) -> bool:
        """A task ended in an error; True when there were too many in a row."""
        self._failures += 1
        return self._failures >= self._settings.most_failures

    def is_slow(self, fleet_median_s: float | None) -> bool:
        """True when all but one of the last replies were far slower than the fleet's."""
        if fleet_median_s is None or len(self._recent) < self._settings.window:
            return False
        # The newest reply is asked first: it is fast nearly always, and looking at all costs more.
        limit = self._settings.slow_factor * fleet_median_s
        return self._recent[-1] > limit and sum(one <= limit for one in self._recent) <= 1

    def eject(self, reason: str, now_s: float) -> None:
        """Take it out; the first probe is due after a pause."""
        self.ejected_for = reason
        self._recent.clear()
        self._failures = 0
        self._good_probes = 0
        self._probe_at = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._settings.max_pause_s)

    def wants_probe(self, now_s: float) -> bool:
        """True when a copy of an item should be sent to see whether it is well again."""
        return self.ejected and not self._probing and now_s >= self._probe_at

    def probe_sent(self) -> None:
        """A probe is on its way; no second one until it is back."""
        self._probing = True

    def probe_back(self, service_s: float | None, fleet_median_s: float | None, now_s: float) -> bool:
        """A probe came back after `service_s` (None: it failed). True when the replica is well."""
        self._probing = False
        if not self.ejected:
            return False
        if self.stalled and service_s is not None:
            return True  # it was silent, and speaks
        limit_s = float("inf") if fleet_median_s is None else self._settings.slow_factor * fleet_median_s
        if service_s is None or service_s > limit_s:
            self.eject(self.ejected_for or "slow", now_s)
            return False
        self._good_probes += 1
        return self._good_probes >= self._settings.probes

    def readmit(self) -> None:
        """Put it back to work, with a clean record."""
        self.ejected_for = None
        self._pause_s = self._settings.pause_s
