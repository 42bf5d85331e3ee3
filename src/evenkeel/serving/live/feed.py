"""Tells viewers of the live page once a second what the gateways count; nobody watching, it does nothing.

A frame holds counts since the start, not changes, so that a viewer who misses some goes on with the next. All viewers
get the same bytes. What a frame costs is measured, and shown on the page.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import orjson

from evenkeel.clock import Clock, Timer
from evenkeel.errors import OverloadedError
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.gateway.histogram import BOUNDS_S
from evenkeel.serving.gateway.node import Node
from evenkeel.version import __version__

__all__ = ["FEED_HEADERS", "LiveFeed", "Viewer", "WatchedModel"]

FEED_HEADERS = (
    b"content-type: text/event-stream\r\ncache-control: no-store\r\nx-content-type-options: nosniff\r\n"
    b"x-accel-buffering: no\r\n"
)
_EVERY_S = 1.0
_MAX_VIEWERS = 16
_MAX_NODES = 256  # in a frame, of each model
_COST_FRAMES = 60  # over which the cost is averaged
_MAX_REASON = 200  # characters
_COUNTERS = (
    *("items", "shed", "failed", "abandoned", "deadlines"),
    *("hedges", "hedges_won", "budget_exhausted", "retries", "cancels"),
    *("fills_over_budget", "unsure_fills", "fills_compared", "fills_agreed", "escalated"),
)  # fmt: skip


class WatchedModel(Protocol):
    """Stands for a model that is served."""

    name: str
    version: str

    @property
    def gateway(self) -> Any:
        """Gives its gateway."""


class Viewer(Protocol):
    """Stands for an open answer, to which parts may be sent; see `Exchange`."""

    def begin(self, status: int, headers: bytes) -> None:
        """Sends the head of the answer."""

    def send(self, part: bytes) -> None:
        """Sends a part of it."""


class LiveFeed:
    """Sends frames to its viewers.

    Args:
        models: gives those that are served now.
        clock: gives the clock; by default the running event loop.
        cpu_s: gives the processor time of the whole process.
        own_cpu_s: gives that of the thread that calls.
    """

    def __init__(
        self,
        models: Callable[[], Iterable[WatchedModel]],
        clock: Callable[[], Clock] = asyncio.get_running_loop,
        cpu_s: Callable[[], float] = time.process_time,
        own_cpu_s: Callable[[], float] = time.thread_time,
    ) -> None:
        self._models = models
        self._clock = clock
        self._cpu_s, self._own_cpu_s = cpu_s, own_cpu_s
        self._viewers: dict[Viewer, None] = {}
        self._timer: Timer | None = None
        # Of each frame: when, the process's time before it, and its own.
        self._costs: deque[tuple[float, float, float]] = deque(maxlen=_COST_FRAMES)

    @property
    def viewers(self) -> int:
        """Counts those who watch."""
        return len(self._viewers)

    def join(self, viewer: Viewer) -> None:
        """Sends a frame now and every second until `leave`.

        Raises:
            OverloadedError: there are too many viewers.
        """
        if len(self._viewers) >= _MAX_VIEWERS:
            raise OverloadedError(f"{_MAX_VIEWERS} viewers watch already, which is the limit; try again later", 5.0)
        viewer.begin(200, FEED_HEADERS)
        self._viewers[viewer] = None
        viewer.send(self._event())
        if self._timer is None:
            self._timer = self._clock().call_at(self._clock().time() + _EVERY_S, self._tick)

    def leave(self, viewer: Viewer) -> None:
        """Sends no more to a viewer; ignores those who do not watch."""
        self._viewers.pop(viewer, None)
        if not self._viewers and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._costs.clear()

    def _tick(self) -> None:
        clock = self._clock()
        self._timer = clock.call_at(clock.time() + _EVERY_S, self._tick)
        before_s, began_s = self._cpu_s(), self._own_cpu_s()
        event = self._event()
        for viewer in list(self._viewers):
            viewer.send(event)
        self._costs.append((clock.time(), before_s, self._own_cpu_s() - began_s))

    def _event(self) -> bytes:
        return b"data: %b\n\n" % orjson.dumps(self.frame())

    def frame(self) -> dict[str, Any]:
        """Gives what the page shows, as JSON would have it."""
        return {
            "server": __version__,
            "time_s": self._clock().time(),
            "bounds_s": BOUNDS_S,
            "viewers": len(self._viewers),
            "cost": self._cost(),
            "models": [_model(model) for model in self._models()],
        }

    def _cost(self) -> dict[str, float] | None:
        """Gives what frames cost lately: of the process's processor time, and in seconds of it a second."""
        if len(self._costs) < 2:
            return None
        first, last = self._costs[0], self._costs[-1]
        own_s = sum(cost for _, _, cost in self._costs) - last[2]
        return {
            "share": own_s / max(last[1] - first[1], 1e-9),
            "per_second": own_s / max(last[0] - first[0], 1e-9),
        }


def _model(model: WatchedModel) -> dict[str, Any]:
    gateway: Gateway = model.gateway
    stats, policy = gateway.stats, gateway.policy
    nodes = [
        *((node, "replica") for node in gateway.replicas.all),
        *((node, "backup") for node in gateway.backups),
    ]
    return {
        "name": model.name,
        "version": model.version,
        "ready": gateway.ready,
        "draining": gateway.draining,
        "in_flight": gateway.in_flight,
        "policy": {
            "name": policy.name,
            "fill_after": None if policy.fill_after is None else str(policy.fill_after),
            "hedge_after": None if policy.hedge_after is None else str(policy.hedge_after),
            "max_extra_load": _finite(policy.max_extra_load),
            "max_approximate": policy.max_approximate,
        },
        "late_after_s": None if policy.fill_after is None else gateway.service_times.after(policy.fill_after),
        "latencies": {source: times.counts for source, times in stats.latencies.items()},
        "service": {"counts": stats.service_times.counts, "sum_s": stats.service_times.sum_s},
        "queue": {"counts": stats.queue_times.counts, "sum_s": stats.queue_times.sum_s},
        "saved": {"counts": stats.saved_times.counts, "sum_s": stats.saved_times.sum_s},
        "counts": {name: getattr(stats, name) for name in _COUNTERS},
        "fills": stats.fills,
        "passes": stats.passes,
        "grouped": stats.grouped,
        "budgets": {name: budget.saved for name, budget in gateway.budgets.items()},
        "nodes": [_node(node, kind) for node, kind in nodes[:_MAX_NODES]],
        "more_nodes": max(0, len(nodes) - _MAX_NODES),
    }


def _node(node: Node, kind: str) -> dict[str, Any]:
    backend = node.backend
    return {
        "name": backend.name,
        "kind": kind,
        "address": backend.address,
        "state": node.state,
        "why": "" if backend.ready else " ".join(backend.why_not.split())[:_MAX_REASON],
        "tasks": len(node.open),
        "done": node.done,
    }


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value
