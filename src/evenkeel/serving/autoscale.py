"""Decides how many replicas a gateway needs, by what it sees itself, and has its fleet resized.

The load of a replica is the share of the time that it is at work: arrivals a second times the seconds of a pass, by the
number of replicas. What waits counts as arrivals, too, so that it is worked off. A moment's number of replicas is what
brings the load to the target. The fleet grows to the least of these numbers in the last seconds, and shrinks to the
largest of the last minutes, so what comes and goes moves nothing:

- after it grew it does not shrink for `down_after`, because what it grew for is still in that time;
- numbers that go up and down within `up_after` change it once at most.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from evenkeel.errors import EvenkeelError
from evenkeel.serving.fleet import LiveFleet
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.settings import FieldError, Seconds, check_fields, setting

__all__ = ["AutoscaleSettings", "Autoscaler", "Demand", "ReplicaCount"]

_log = logging.getLogger(__name__)
_EVERY_S = 1.0  # between two looks
_PAUSE_S = 30.0  # after a resize that failed, such as because the cluster has no room


@dataclass(frozen=True)
class AutoscaleSettings:
    """Says between which bounds the number of replicas follows the load, and how quickly."""

    max: int = setting(..., "Largest number of replicas; those elsewhere count, and stay.", low=1, high=4096)
    min: int = setting(1, "Least number of them.", low=1, high=4096)
    target: float = setting(0.5, "Load to aim at: the share of the time a replica is at work.", low=0.01, high=0.99)
    up_after_s: Seconds = setting(5.0, "Time for which more must be needed before the fleet grows.", low=1, high=3600)
    down_after_s: Seconds = setting(300.0, "Time for which fewer must do before it shrinks.", low=1, high=86400)

    def __post_init__(self) -> None:
        """Refuses bounds and times that contradict each other."""
        check_fields(self, "autoscale")
        if self.min > self.max:
            raise FieldError("min", f"must be at most max, {self.max}, found {self.min}")
        if self.down_after_s < self.up_after_s:
            wanted = f"must be at least up_after, {self.up_after_s:g}s"
            raise FieldError("down_after", f"{wanted}, found {self.down_after_s:g}s")


@dataclass(frozen=True)
class Demand:
    """Holds what a gateway saw in one stretch of time.

    Attributes:
        arrivals_per_s: items that came, also those that were refused for want of room.
        service_s: of one pass, on average.
        busy: replicas that were at work, on average; more than the arrivals explain where there are hedges.
        waiting: items that no replica is at.
    """

    arrivals_per_s: float
    service_s: float
    busy: float = 0.0
    waiting: int = 0

    def replicas(self, settings: AutoscaleSettings) -> int:
        """Gives the number of replicas that this alone asks for."""
        arriving = (self.arrivals_per_s + self.waiting / settings.up_after_s) * self.service_s
        wanted = math.ceil(max(arriving, self.busy) / settings.target - 1e-9)
        return min(max(wanted, settings.min), settings.max)


class ReplicaCount:
    """Decides the number of replicas from what was asked for so far; see the module's laws. Knows no clock.

    Args:
        settings: bounds and times.
    """

    def __init__(self, settings: AutoscaleSettings) -> None:
        self._settings = settings
        self._asked: deque[tuple[float, int]] = deque()
        self._since_s = math.inf

    def decide(self, now_s: float, demand: Demand, current: int) -> int:
        """Gives the number of replicas that there should be now, where `current` are; times never go back."""
        settings, asked = self._settings, self._asked
        self._since_s = min(self._since_s, now_s)
        asked.append((now_s, demand.replicas(settings)))
        while asked[0][0] < now_s - settings.down_after_s:
            asked.popleft()
        known_s = now_s - self._since_s
        lately = [number for at_s, number in asked if at_s >= now_s - settings.up_after_s]
        if known_s >= settings.up_after_s and min(lately) > current:
            return min(lately)
        if known_s >= settings.down_after_s and (most := max(number for _, number in asked)) < current:
            return most
        return min(max(current, settings.min), settings.max)


class Autoscaler:
    """Looks at a gateway every second, and resizes its fleet.

    Args:
        gateway: whose arrivals, passes and queue count.
        fleet: that is resized.
        settings: bounds and times.
        time_s: tells the time, in seconds.
        at_once: workers that are started at a time.
    """

    def __init__(
        self,
        gateway: Gateway,
        fleet: LiveFleet,
        settings: AutoscaleSettings,
        time_s: Callable[[], float],
        at_once: int = 1,
    ) -> None:
        self._gateway, self._fleet, self._settings, self._time_s = gateway, fleet, settings, time_s
        self._count, self._at_once = ReplicaCount(settings), at_once
        self._last = self._seen()
        self._service_s = 0.0

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            replicas = [member for member in self._fleet.members if member.kind == "replica"]
            wanted = self.step(len(replicas))
            own = sum(member.own for member in replicas)
            new = max(0, own + wanted - len(replicas))
            if new == own:
                continue
            _log.warning("the number of replicas goes from %d to %d", len(replicas), wanted)
            try:
                await self._fleet.resize("replica", new, at_once=self._at_once)
            except EvenkeelError as error:
                _log.error("the number of replicas is looked at again in %g s: %s", _PAUSE_S, error)
                await asyncio.sleep(_PAUSE_S)

    def step(self, current: int) -> int:
        """Gives the number of replicas that there should be now, where `current` are."""
        return self._count.decide(self._time_s(), self.look(), current)

    def look(self) -> Demand:
        """Gives what the gateway saw since the last look."""
        before, self._last = self._last, self._seen()
        seconds, came, busy_s, passes = (now - then for now, then in zip(self._last, before, strict=True))
        if passes:
            self._service_s = busy_s / passes
        seconds = max(seconds, 1e-9)
        replicas = self._gateway.replicas
        waiting = sum(max(0, replica.outstanding - 1) for replica in replicas.all)
        return Demand(came / seconds, self._service_s, busy_s / seconds, waiting)

    def _seen(self) -> tuple[float, float, float, float]:
        stats = self._gateway.stats
        passes = stats.service_times
        return self._time_s(), stats.items + stats.shed, passes.sum_s, passes.count
