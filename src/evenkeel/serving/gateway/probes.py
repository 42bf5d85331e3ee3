"""Sends passes that answer nobody: probes of replicas that are out, and checks whether a replica is well."""

from collections.abc import Callable
from functools import partial

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.backend import Reply
from evenkeel.clock import Clock, Timer
from evenkeel.delays.laws import attempt_key
from evenkeel.serving.gateway.item import Item
from evenkeel.serving.gateway.node import Attempt
from evenkeel.serving.gateway.replicas import Replica, Replicas
from evenkeel.serving.gateway.stats import Stats

__all__ = ["Probes"]

# Probes are attempts too, for injected delays, but of no item's own.
_PROBE_ATTEMPT = 1 << 16
_NEVER = float("inf")


class Probes:
    """Probes replicas that are out, with items that come or, once there is a `sample`, without.

    Args:
        clock: of the gateway.
        model: the model that replicas run.
        replicas: to probe.
        stats: in which probes are counted.
        checked: gives a reply, or an error in its place where its outputs are no scores.
        next_key: gives the number of a probe that no item came with.
        on_due: called when a probe is due that needs no item.
        on_back: called with the time when a replica is back in service.
    """

    def __init__(
        self,
        clock: Clock,
        model: str,
        replicas: Replicas,
        stats: Stats,
        checked: Callable[[Replica, Reply], Reply],
        next_key: Callable[[], int],
        on_due: Callable[[], object],
        on_back: Callable[[float], object],
    ) -> None:
        self.sample: Array | None = None
        self._clock, self._model, self._replicas, self._stats = clock, model, replicas, stats
        self._checked, self._next_key, self._on_due, self._on_back = checked, next_key, on_due, on_back
        self._timer: Timer | None = None
        self._due_at = _NEVER

    def send(self, array: Array, key: int, now: float) -> None:
        """Sends the sample, or else a copy of an item, to ejected replicas whose probe is due."""
        blank = array if self.sample is None else self.sample
        for replica in self._replicas.wanting_probe(now):
            self._stats.probes += 1
            replica.health.probe_sent()
            replica.submit(self._model, blank[None], attempt_key(key, _PROBE_ATTEMPT), now, self._on_reply)

    def check(self, item: Item, replica: Replica, then: Callable[[bool], object]) -> None:
        """Has a replica do a pass of a blank item like this one, and calls `then` with whether it could."""
        self._stats.probes += 1
        blank = np.zeros_like(item.array) if self.sample is None else self.sample
        key = attempt_key(item.key, _PROBE_ATTEMPT)
        replica.submit(self._model, blank[None], key, self._clock.time(), partial(self._on_check_reply, then))

    def plan(self) -> None:
        """Sets the timer for the next probe that needs no item."""
        if self.sample is None:
            return
        due_at = self._replicas.next_probe_at()
        if self._timer is not None:
            if self._due_at <= due_at:
                return
            self._timer.cancel()
            self._timer = None
        if due_at < _NEVER:
            self._due_at = due_at
            self._timer = self._clock.call_at(due_at, self._due)

    def _due(self) -> None:
        self._timer = None
        if self.sample is not None:
            self.send(self.sample, self._next_key(), self._clock.time())
        self._on_due()
        self.plan()

    def _on_reply(self, attempt: Attempt, reply: Reply) -> None:
        replica: Replica = attempt.node
        now = self._clock.time()
        replica.probe_back(now, attempt.since_s, self._checked(replica, reply), attempt.expired)
        self.plan()
        if not replica.health.ejected:
            self._on_back(now)

    def _on_check_reply(self, then: Callable[[bool], object], attempt: Attempt, reply: Reply) -> None:
        replica: Replica = attempt.node
        reply = self._checked(replica, reply)
        replica.back(self._clock.time(), attempt.since_s, reply, attempt.expired)
        then(reply.outputs is not None)
