"""Gives time as the gateway sees it: by an asyncio loop in production, virtual in the simulator and in tests.

Both have the same three methods, so the gateway is the same code under both. On the virtual clock nothing waits:
`run` jumps from event to event, and equal times run in the order in which they were scheduled.
"""

import asyncio
import heapq
import time
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Clock", "LoopClock", "Timer", "VirtualClock"]


class Timer(Protocol):
    """Holds a scheduled call, which may still be cancelled."""

    def cancel(self) -> None:
        """Prevents the call, if it was not made yet."""


class Clock(Protocol):
    """Tells the time and calls back later."""

    def time(self) -> float:
        """Gives seconds since some fixed moment; never goes back."""

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Calls `callback(*args)` at `when` (soon, if that is past)."""

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Timer:
        """Calls `callback(*args)` now, but not from inside this call."""


class LoopClock:
    """Uses an event loop's timers with a finer clock: uvloop's own counts whole milliseconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._call_later = loop.call_later
        self.call_soon = loop.call_soon

    def time(self) -> float:
        """Gives monotonic seconds."""
        return time.monotonic()

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Calls `callback(*args)` at `when`, within the loop's own resolution."""
        return self._call_later(max(0.0, when - time.monotonic()), callback, *args)


class _ScheduledCall:
    """Holds one entry of the virtual clock's queue."""

    __slots__ = ("args", "callback", "cancelled", "number", "when")

    def __init__(self, when: float, number: int, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.when, self.number, self.callback, self.args, self.cancelled = when, number, callback, args, False

    def __lt__(self, other: "_ScheduledCall") -> bool:
        return (self.when, self.number) < (other.when, other.number)

    def cancel(self) -> None:
        self.cancelled = True
        self.args = ()  # a cancelled timer may stay queued for long; let go of what it holds


class VirtualClock:
    """Jumps to the next event. Not thread-safe, and need not be."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s
        self._queue: list[_ScheduledCall] = []
        self._number = 0

    def time(self) -> float:
        """Gives virtual seconds."""
        return self._now

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Calls `callback(*args)` when the clock reaches `when`."""
        self._number += 1
        call = _ScheduledCall(max(when, self._now), self._number, callback, args)
        heapq.heappush(self._queue, call)
        return call

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Timer:
        """Calls `callback(*args)` before time moves on."""
        return self.call_at(self._now, callback, *args)

    def run(self, until_s: float = float("inf")) -> None:
        """Runs every call due up to `until_s`; ends early when nothing is left to do."""
        while self._queue and self._queue[0].when <= until_s:
            call = heapq.heappop(self._queue)
            if not call.cancelled:
                self._now = call.when
                call.callback(*call.args)
        if until_s != float("inf"):
            self._now = max(self._now, until_s)
