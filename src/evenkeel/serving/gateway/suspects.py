"""Tries items once more, with care, whose worker died or stopped answering while it worked on them.

One such item may well be what broke the worker, and then breaks every worker that it is sent to. So a suspect goes only
to a replica without another suspect, and only while a further replica is healthy, so that a fleet of two or more keeps
one that serves everybody else. A suspect waits for that, but not for long.

It also goes only to a replica that has done a pass since the loss, if need be a pass of a blank item, or has become
ready since: where the whole fleet is frozen no second worker can be lost with it, and an item is never blamed for that.
A backup that is still at work on it has its say first.
"""

from collections.abc import Callable
from functools import partial

from evenkeel.clock import Clock
from evenkeel.serving.gateway.item import Item
from evenkeel.serving.gateway.node import Attempt
from evenkeel.serving.gateway.replicas import Replica, Replicas

__all__ = ["Suspects"]

_PATIENCE_S = 3.0  # a lost worker is usually back by then


class Suspects:
    """Holds the items that wait for their second attempt, and those that have it.

    Args:
        clock: where to wait.
        replicas: where they are tried.
        send: makes the attempt.
        check: has a replica do a pass of a blank item like this one, and says then if that succeeded.
    """

    def __init__(
        self,
        clock: Clock,
        replicas: Replicas,
        send: Callable[[Item, Replica, float], Attempt],
        check: Callable[[Item, Replica, Callable[[bool], object]], object],
    ) -> None:
        self._clock = clock
        self._replicas = replicas
        self._send = send
        self._check = check
        self._checked: set[Replica] = set()  # that do a blank pass now
        self._waiting: dict[int, Item] = {}
        self._trials: dict[Attempt, None] = {}

    def add(self, item: Item, now_s: float) -> None:
        """Tries the item as soon as that is safe, until `forget`."""
        if item.number not in self._waiting:
            self._waiting[item.number] = item
            if not item.patient_until_s:
                # With half of its time gone, an answer matters more than care.
                item.patient_until_s = now_s + min(_PATIENCE_S, (item.deadline_at - now_s) / 2)
                self._clock.call_at(item.patient_until_s, self.go_on)
        self.go_on()

    def forget(self, item: Item) -> None:
        """Removes an item that is answered or gone."""
        self._waiting.pop(item.number, None)

    def over(self, attempt: Attempt) -> None:
        """Notes an attempt that ended, or whose replica stopped answering: if it was a trial, the next may follow."""
        if attempt in self._trials:
            del self._trials[attempt]
            self.go_on()

    def go_on(self) -> None:
        """Tries those that wait, as far as that is safe now."""
        now = self._clock.time()
        for item in list(self._waiting.values()):
            if item.passes and now < item.patient_until_s:
                continue
            at_risk = [attempt.node for attempt in self._trials if not attempt.node.health.stalled]
            busy = [attempt.node for attempt in item.open_attempts]
            replica = self._well(item, [*item.tried, *at_risk]) or self._well(item, [*busy, *at_risk])
            if replica is None:
                continue
            alone = len(self._replicas.all) == 1 or now >= item.patient_until_s
            if self._replicas.healthy < len(at_risk) + 2 and (at_risk or not alone):
                continue
            # When all fall silent the fleet is slow, and copies would make it slower.
            if busy and replica.silent_s(now) > self._replicas.stall_after_s / 2:
                continue
            del self._waiting[item.number]
            item.tried_again = True
            self._trials[self._send(item, replica, now)] = None

    def _well(self, item: Item, left_out: list[Replica]) -> Replica | None:
        """Gives a replica that has shown since the item's loss that it is well; has one show it if none has."""
        unknown = [replica for replica in self._replicas.all if replica.well_at_s <= item.blamed_at_s]
        replica = self._replicas.choose([*left_out, *unknown])
        if replica is not None and replica.health.stalled:  # there are no others
            return None
        if replica is None:
            candidate = self._replicas.choose(left_out)
            if candidate is not None and candidate not in self._checked and not candidate.health.stalled:
                self._checked.add(candidate)
                self._check(item, candidate, partial(self._on_checked, candidate))
        return replica

    def _on_checked(self, replica: Replica, well: bool) -> None:
        self._checked.discard(replica)
        if well:
            self.go_on()
