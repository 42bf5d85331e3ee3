"""Times many waits with one timer. Nearly all end before it: a timer for each would cost more than their work."""

import asyncio
from collections.abc import Callable

from evenkeel.clock import Clock

__all__ = ["Sweeper"]


class Sweeper:
    """Calls what was added and not removed, once: not before `period_s` after it was added, nor after twice that.

    Args:
        period_s: how often it looks, while there is anything to look at.
        clock: gives the clock; by default the running event loop.
    """

    def __init__(self, period_s: float, clock: Callable[[], Clock] = asyncio.get_running_loop) -> None:
        self._period_s = period_s
        self._clock = clock
        self._young: dict[Callable[[], object], None] = {}
        self._old: dict[Callable[[], object], None] = {}
        self._armed = False

    def add(self, callback: Callable[[], object]) -> None:
        """Calls `callback` later, unless it is removed before."""
        self._young[callback] = None
        if not self._armed:
            self._arm()

    def remove(self, callback: Callable[[], object]) -> None:
        """Takes `callback` out; harmless when it was called already."""
        self._young.pop(callback, None)
        self._old.pop(callback, None)

    def _arm(self) -> None:
        self._armed = True
        clock = self._clock()
        clock.call_at(clock.time() + self._period_s, self._sweep)

    def _sweep(self) -> None:
        due, self._old, self._young = self._old, self._young, {}
        self._armed = False
        if self._old:
            self._arm()
        for callback in due:
            callback()
