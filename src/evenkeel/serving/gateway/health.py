"""Decides which replicas get work: ejects those that stay slow or stop answering, and probes them back in.

Four things are kept apart. A replica that is *gone* says so itself (`Backend.ready`). A replica that is *stalled* has
tasks but has not replied for far longer than any reply takes: frozen, or cut off. A replica that is *slow* replies, but
all but one of its last replies took far longer than the fleet's median: one slow reply is what fills and hedges are
for, a row of them is a slow machine. (Not its own median: with a heavy tail four slow replies in eight are soon met
with, seven are not.) A replica that is *failing* replies with errors only; being so quick at it, it would get most of
the work. Slow and failing replicas are ejected only while most of the fleet is left, since a fleet that is slow as a
whole is not mended by leaving it.

A stalled replica is back with its next reply, of whatever task. The others are probed after a pause, with copies of
real items whose users do not wait for the probe; good probes bring a replica back, a bad one doubles the pause.
Stalled ones are probed too, for they may have nothing left to reply to. An *untried* replica has just become ready:
until a pass of it has succeeded, nothing shows that its model works.
"""

from collections import deque
from dataclasses import dataclass

from evenkeel.settings import FieldError, Seconds, setting

__all__ = ["Health", "HealthSettings"]


@dataclass(frozen=True)
class HealthSettings:
    """Says when a replica is ejected, and how it comes back."""

    window: int = setting(
        8, "Last replies that are looked at; more: slower to eject, fewer false alarms.", low=1, high=10_000
    )
    slow_factor: float = setting(
        3.0,
        "Slow is a reply that took this many times the fleet's median; ejected when nearly all are.",
        low=1,
        high=1e6,
    )
    max_failures: int = setting(5, "Errors in a row, beyond which a replica is ejected.", low=1, high=10_000)
    stall_factor: float = setting(
        8.0, "Stalled is a replica that is silent for this many times the fleet's p95.", low=1, high=1e6
    )
    min_stall_s: Seconds = setting(1.0, "Never called stalled sooner than this.", low=0)
    max_slow_share: float = setting(
        0.34,
        "Share of the fleet that may be out, for whatever reason, when one more is ejected as slow.",
        low=0,
        high=1,
    )
    pause_s: Seconds = setting(
        1.0, "Time before an ejected replica is probed; it doubles with each bad probe, up to max_pause.", low=0
    )
    max_pause_s: Seconds = setting(30.0, "Longest time between two probes.", low=0)
    probes: int = setting(2, "Good probes that an ejected replica needs to come back.", low=1, high=10_000)

    def __post_init__(self) -> None:
        """Refuses limits that contradict each other."""
        if self.max_pause_s < self.pause_s:
            raise FieldError(
                "max_pause", f"must be at least health.pause, {self.pause_s:g}s, found {self.max_pause_s:g}s"
            )


class Health:
    """Keeps the state of one replica, from calls that say what happened and when; it has no clock and no I/O."""

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._recent: deque[float] = deque(maxlen=settings.window)
        self._pause_s = settings.pause_s
        self._good_probes = 0
        self._failures = 0
        self.ejected_for: str | None = None  # "slow", "failing", "stalled" or "untried"
        self.was_stalled = False  # before it became untried
        self._probe_at = 0.0
        self._probing = False

    @property
    def ejected(self) -> bool:
        """Tells whether the replica is ejected: it gets no work but probes."""
        return self.ejected_for is not None

    @property
    def stalled(self) -> bool:
        """Tells whether the replica was ejected for silence: no replies to its tasks are expected."""
        return self.ejected_for == "stalled"

    @property
    def broken(self) -> bool:
        """Tells whether its passes keep failing, or none has succeeded yet."""
        return self.ejected_for in ("failing", "untried") or self._failures >= self._settings.max_failures

    def replied(self, service_s: float) -> bool:
        """Notes an ordinary reply; True if the replica counted as broken until now."""
        mended = self.broken
        self._recent.append(service_s)
        self._failures = 0
        return mended

    def failed(self, now_s: float = 0.0) -> bool:
        """Notes a task that ended in an error; True if there were too many in a row."""
        self._failures += 1
        if self._failures == self._settings.max_failures:
            self._probe_at = now_s + self._pause_s
        return self._failures >= self._settings.max_failures

    def is_slow(self, fleet_median_s: float | None) -> bool:
        """Tells whether all but one of the last replies were far slower than the fleet's."""
        if fleet_median_s is None or len(self._recent) < self._settings.window:
            return False
        # The newest reply is checked first: it is nearly always fast, and checking all costs more.
        limit = self._settings.slow_factor * fleet_median_s
        return self._recent[-1] > limit and sum(one <= limit for one in self._recent) <= 1

    def eject(self, reason: str, now_s: float) -> None:
        """Ejects it; the first probe is due after a pause."""
        self.ejected_for = reason
        self._recent.clear()
        self._failures = 0
        self._good_probes = 0
        self._probe_at = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._settings.max_pause_s)

    def joined(self, now_s: float, try_first: bool) -> bool:
        """Notes that its backend has become ready, so that its silence is over; True if it is back with that.

        With `try_first` a probe is due, and it counts as untried without a good one.
        """
        self._recent.clear()
        self._failures = 0
        if self.stalled or not self.ejected:
            self._probe_at = now_s
            if not try_first:
                return self.stalled
            self.was_stalled = self.stalled
            self.ejected_for = "untried"
        else:
            # The pause holds: who is lost at every probe, and comes back at once, is not to be probed all the time.
            self._probe_at = max(self._probe_at, now_s)
        return False

    @property
    def next_probe_at(self) -> float:
        """Gives the time at which a probe is due; infinity while one is on its way, or none is needed."""
        return self._probe_at if (self.ejected or self.broken) and not self._probing else float("inf")

    def wants_probe(self, now_s: float) -> bool:
        """Tells whether to send it a copy of an item, or a sample, to see whether it is well again."""
        return now_s >= self.next_probe_at

    def probe_sent(self) -> None:
        """Notes that a probe is on its way; no second one is sent until it is back."""
        self._probing = True

    def probe_back(self, service_s: float | None, fleet_median_s: float | None, now_s: float) -> bool:
        """Notes a probe that came back after `service_s` (None: it failed). True if the replica is well."""
        self._probing = False
        if not self.ejected:
            if service_s is not None:
                self._failures = 0
            elif self.broken:
                self._probe_at = now_s + self._pause_s
            return False
        if self.ejected_for in ("stalled", "untried") and service_s is not None:
            return True  # it was silent, and speaks; or it shows for the first time what it can do, however slowly
        limit_s = float("inf") if fleet_median_s is None else self._settings.slow_factor * fleet_median_s
        if service_s is None or service_s > limit_s:
            self.eject(self.ejected_for or "slow", now_s)
            return False
        self._good_probes += 1
        return self._good_probes >= self._settings.probes

    def readmit(self) -> None:
        """Puts it back to work, with a clean record."""
        self.ejected_for = None
        self.was_stalled = False
        self._pause_s = self._settings.pause_s
