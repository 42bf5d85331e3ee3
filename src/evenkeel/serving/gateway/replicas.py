"""Chooses the replica that gets the next item, and keeps track of those that are ejected."""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, Reply
from evenkeel.errors import BackendBusyError, TaskRefusedError
from evenkeel.serving.gateway.health import Health, HealthSettings
from evenkeel.serving.gateway.node import Attempt, Node
from evenkeel.serving.gateway.quantile import LiveQuantiles
from evenkeel.serving.gateway.stats import Stats, count

__all__ = ["Replica", "Replicas", "described"]

_log = logging.getLogger(__name__)

# A replica that has no room and does not say until when rests for this long, twice as long each time in a row.
_FIRST_REST_S = 0.1
_MAX_REST_S = 60.0  # whatever it says
# Silence that counts as a stall before the usual time is known: so many times the longest pass, or without any pass.
_FEW_FACTOR = 50.0
_UNKNOWN_STALL_S = 10.0


def described(error: BaseException | None) -> str:
    """Gives an error in words for the log, with what its worker added to it."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


class Replica(Node):
    """Holds one replica: its queue as the gateway knows it, and its health.

    Attributes:
        well: the last pass that it reported was a good one.
        well_at_s: when it last reported a good one, or became ready.
        rests_until_s: it said that it has no room before then.
        was_ready: its backend was ready when `joined` last looked.
    """

    __slots__ = (
        "_fleet",
        "_quiet_since_s",
        "_rests",
        "health",
        "rests_until_s",
        "was_ready",
        "well",
        "well_at_s",
    )

    def __init__(self, backend: Backend, fleet: "Replicas", limit_s: float) -> None:
        super().__init__(backend, limit_s)
        self.health = Health(fleet.settings)
        self.well = True
        self.well_at_s = float("-inf")
        self.was_ready = backend.ready
        self.rests_until_s = 0.0
        self._rests = 0
        self._fleet = fleet
        self._quiet_since_s = 0.0  # when it last replied, or last began to have work

    def submit(
        self,
        model: str,
        inputs: Array,
        key: int,
        now_s: float,
        on_reply: Callable[[Attempt, Reply], object],
        item: Any = None,
    ) -> Attempt:
        """Sends a task; whoever gets its reply hands it to `back`, or that of a probe to `probe_back`."""
        if not self.open:
            self._quiet_since_s = now_s
        return self.send(model, inputs, key, now_s, on_reply, item)

    @property
    def state(self) -> str:
        """Says how it is, in one word: `well`, `gone`, or what it was ejected for."""
        return (self.health.ejected_for or "well") if self.backend.ready else "gone"

    @property
    def outstanding(self) -> int:
        """Counts the tasks that it has."""
        return len(self.open)

    def _returned(self, now_s: float, sent_s: float, reply: Reply, expired: bool) -> float | None:
        """Notes one reply; gives the seconds of work behind it, or None if it says nothing of the replica's speed."""
        if reply.cancelled or expired:
            return None
        # A worker that takes one task at a time began this one when it replied to the last one.
        since_s = max(sent_s, self._quiet_since_s) if self.backend.serial else sent_s
        self._quiet_since_s = now_s
        if reply.outputs is None:
            return None
        self.well_at_s = now_s
        # Replies of one pass come together; what the worker says of it is the time of each.
        return max(now_s - since_s, reply.service_s or 0.0)

    def back(self, now_s: float, sent_s: float, reply: Reply, expired: bool = False) -> None:
        """Learns from a task that came back."""
        service_s = self._returned(now_s, sent_s, reply, expired)
        if service_s is not None:
            self.well = True
            self._rests = 0
            self._fleet.learn(self, service_s, now_s - sent_s - service_s, now_s)
        elif reply.cancelled:
            if reply.service_s is not None:
                self._fleet.learn_unfinished(reply.service_s)
        elif isinstance(reply.error, BackendBusyError):
            self.well = False
            self._rest(now_s, reply.error)
        elif not isinstance(reply.error, TaskRefusedError):  # which says nothing of the replica
            self.well = False
            self._fleet.learn_failure(self, now_s, reply.error)

    def _rest(self, now_s: float, error: BackendBusyError) -> None:
        self._rests += 1
        rest_s = error.retry_after_s
        if rest_s is None:
            rest_s = min(_FIRST_REST_S * 2.0 ** min(self._rests - 1, 30), self._fleet.settings.pause_s)
        until_s = now_s + min(rest_s, _MAX_REST_S)
        if until_s > self.rests_until_s:
            self.rests_until_s = until_s
            self._fleet.rest(self, now_s)

    def probe_back(self, now_s: float, sent_s: float, reply: Reply, expired: bool = False) -> None:
        """Readmits it after a good probe, or waits longer after a bad one."""
        service_s = self._returned(now_s, sent_s, reply, expired)
        self.well = service_s is not None
        self._fleet.judge_probe(self, service_s, now_s, reply.error)

    def silent_s(self, now_s: float) -> float:
        """Gives the seconds since its last reply while it has work; 0 without work."""
        return now_s - self._quiet_since_s if self.open else 0.0


class Replicas:
    """Holds all replicas, the ones in use, and the one to use next.

    Args:
        backends: that hold the classifier.
        settings: when one is ejected.
        service_times: what is usual.
        stats: counters.
        limit_s: longest time of one task, once those before it are done.
        on_rest: called with the moment until which a replica gets no work because it has no room.

    Attributes:
        all: replicas that get work, as far as they are well.
        leaving: those that only finish what they have.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        settings: HealthSettings,
        service_times: LiveQuantiles,
        stats: Stats,
        limit_s: float = float("inf"),
        on_rest: Callable[[float], object] = lambda until_s: None,
    ) -> None:
        self.settings = settings
        self._service_times = service_times
        self._stats = stats
        self._on_rest = on_rest
        self._limit_s = limit_s
        self.all = [Replica(backend, self, limit_s) for backend in backends]
        self.leaving: list[Replica] = []
        self._usable: list[Replica] = []
        self._healthy = 0
        self._turn = 0
        self.any_ejected = False
        self.any_stalled = False
        self.any_ready = False
        self._longest_s = 0.0  # of all passes; used while they are too few for a quantile
        self.sweep_every_s = max(settings.min_stall_s / 4, 0.01)
        self.refresh()

    def add(self, backend: Backend, now_s: float, tried: bool) -> None:
        """Takes in one more replica; one that was `tried` gets work at once, others after a good pass."""
        replica = Replica(backend, self, self._limit_s)
        replica.was_ready = tried
        replica.well_at_s = now_s if tried else replica.well_at_s
        self.all.append(replica)

    def retire(self, replica: Replica, now_s: float) -> None:
        """Gives a replica no more work."""
        self.all.remove(replica)
        self.leaving.append(replica)
        self.refresh(now_s)

    def remove(self, replica: Replica, now_s: float) -> None:
        """Lets go of a replica that was leaving."""
        self.leaving.remove(replica)
        self.refresh(now_s)

    def refresh(self, now_s: float = 0.0) -> None:
        """Updates which replicas are ready, which rest and which are ejected."""
        ready = [replica for replica in self.all if replica.backend.ready]
        awake = [replica for replica in ready if replica.rests_until_s <= now_s]
        healthy = [replica for replica in awake if not replica.health.ejected]
        # When every ready replica is ejected, a bad one is better than none, and a slow one than a silent one.
        self._usable = healthy or [replica for replica in awake if not replica.health.stalled] or awake
        self._healthy = len(healthy)
        self.any_ready = any(not replica.health.broken for replica in ready)
        self.any_ejected = any(replica.health.ejected for replica in self.all)
        self.any_stalled = any(replica.health.stalled for replica in (*self.all, *self.leaving))

    @property
    def any_usable(self) -> bool:
        """Tells whether a replica can be sent an item now."""
        return bool(self._usable)

    @property
    def any_connected(self) -> bool:
        """Tells whether any replica is there, however well it does."""
        return any(replica.backend.ready for replica in self.all)

    @property
    def all_stalled(self) -> bool:
        """Tells whether all that could be sent an item are silent."""
        return bool(self._usable) and all(replica.health.stalled for replica in self._usable)

    @property
    def healthy(self) -> int:
        """Counts the replicas that are ready and neither ejected nor broken."""
        return self._healthy

    @property
    def any_outstanding(self) -> bool:
        """Tells whether any replica has a task."""
        return any(replica.open for replica in (*self.all, *self.leaving))

    def rested_at_s(self) -> float | None:
        """Gives the time at which the first of those that rest has room again; None if none rests."""
        return min((one.rests_until_s for one in self.all if one.backend.ready), default=None)

    def choose(self, tried: Collection[Replica] = (), well: bool = False) -> Replica | None:
        """Gives the usable replica with the fewest outstanding tasks, not one of `tried`; ties go round in turn.

        Args:
            tried: replicas to leave out.
            well: only one whose last pass was good.
        """
        usable = self._usable
        count = len(usable)
        if not count:
            return None
        best: Replica | None = None
        least = 1 << 60
        # Start one further each time, so that an idle fleet shares the work evenly.
        self._turn = turn = (self._turn + 1) % count
        for replica in usable[turn:] + usable[:turn]:
            tasks = len(replica.open)
            if tasks < least and replica not in tried and (replica.well or not well):
                if not tasks:
                    return replica
                best, least = replica, tasks
        return best

    def room(self, limit: int) -> int:
        """Counts the tasks that the usable replicas can take until each has `limit`."""
        return sum(max(0, limit - len(replica.open)) for replica in self._usable)

    def learn(self, replica: Replica, service_s: float, queue_s: float, now_s: float) -> None:
        """Notes how long an ordinary reply took, and its wait before, and ejects the replica if it stays slow."""
        self._stats.service_times.add(service_s)
        self._stats.queue_times.add(queue_s if queue_s > 0 else 0.0)
        health = replica.health
        if health.ejected:  # left-overs from before the ejection say nothing of the fleet
            if health.ejected_for in ("stalled", "untried"):
                self._readmit(replica, now_s)
            return
        self._service_times.add(service_s)
        if service_s > self._longest_s:
            self._longest_s = service_s
        if health.replied(service_s):
            self.refresh(now_s)
        if health.is_slow(self._service_times.quantile(0.5)) and self._may_eject():
            self._eject(replica, "slow", now_s)

    def learn_failure(self, replica: Replica, now_s: float, error: Exception | None = None) -> None:
        """Notes a task that ended in an error, and ejects the replica if it gives nothing but errors."""
        health = replica.health
        if health.ejected or not replica.backend.ready or replica in self.leaving or not health.failed(now_s):
            return
        if self._may_eject():
            self._eject(replica, "failing", now_s, error)
        else:
            self.refresh(now_s)

    def rest(self, replica: Replica, now_s: float) -> None:
        """Gives a replica that has no room no work before `rests_until_s`."""
        self.refresh(now_s)
        self._on_rest(replica.rests_until_s)

    def learn_unfinished(self, service_s: float) -> None:
        """Notes a task that was stopped after `service_s`: it would have taken longer.

        Where late tasks are stopped, leaving them out would lower the quantile, which stops more tasks, and so on down.
        One that has outlasted the quantile counts the same however it would have ended; a younger one says nothing.
        """
        late_s = self._service_times.quantile(0.95)
        if late_s is not None and service_s >= late_s:
            self._service_times.add(service_s)

    @property
    def stall_after_s(self) -> float:
        """Gives the seconds of silence that count as a stall."""
        p95_s = self._service_times.quantile(0.95)
        if p95_s is not None:
            limit_s = self.settings.stall_factor * p95_s
        else:  # while little is known, be slow to suspect anybody
            limit_s = min(_FEW_FACTOR * self._longest_s, _UNKNOWN_STALL_S) if self._longest_s else _UNKNOWN_STALL_S
        return max(self.settings.min_stall_s, limit_s)

    def eject_stalled(self, now_s: float) -> list[Replica]:
        """Ejects the replicas that have been silent for too long, and gives them."""
        limit_s = self.stall_after_s
        found = [one for one in (*self.all, *self.leaving) if not one.health.stalled and one.silent_s(now_s) > limit_s]
        for replica in found:
            self._eject(replica, "stalled", now_s)
        return found

    def expire(self, now_s: float) -> None:
        """Counts the tasks as lost whose time limit has passed."""
        for replica in (*self.all, *self.leaving):
            if replica.open:
                replica.expire(now_s)

    def wanting_probe(self, now_s: float) -> list[Replica]:
        """Gives the ejected replicas whose probe is due."""
        return [replica for replica in self.all if replica.health.wants_probe(now_s) and replica.backend.ready]

    def next_probe_at(self) -> float:
        """Gives the time of the first probe of a connected replica; infinity if none is due."""
        return min((one.health.next_probe_at for one in self.all if one.backend.ready), default=float("inf"))

    def judge_probe(
        self, replica: Replica, service_s: float | None, now_s: float, error: Exception | None = None
    ) -> None:
        """Judges a replica by a probe that came back after `service_s`, or failed (None) with `error`."""
        if service_s is not None:
            self._longest_s = max(self._longest_s, service_s)
        if replica.health.probe_back(service_s, self._service_times.quantile(0.5), now_s):
            self._readmit(replica, now_s)
        elif service_s is None and (replica.health.ejected or replica.health.broken):
            name = replica.backend.name
            _log.warning("%s failed a trial pass: %s", name, described(error), extra={"backend": name})
        self.refresh(now_s)

    def joined(self, now_s: float, try_first: bool) -> None:
        """Notes which replicas have become ready since the last call; they are due for a probe if `try_first`."""
        for replica in self.all:
            if replica.backend.ready and not replica.was_ready:
                replica.well_at_s = now_s
                if replica.health.joined(now_s, try_first):
                    self._readmit(replica, now_s)
            replica.was_ready = replica.backend.ready

    def _may_eject(self) -> bool:
        out = sum(replica.health.ejected for replica in self.all)
        return out + 1 <= self.settings.max_slow_share * len(self.all)

    def _readmit(self, replica: Replica, now_s: float) -> None:
        health = replica.health
        if health.ejected_for != "untried" or health.was_stalled:
            reason = "stalled" if health.was_stalled else health.ejected_for
            name = replica.backend.name
            _log.warning("%s gets work again; it was %s", name, reason, extra={"backend": name, "reason": reason})
            self._stats.readmissions += 1
        replica.health.readmit()
        self.refresh(now_s)

    def _eject(self, replica: Replica, reason: str, now_s: float, error: Exception | None = None) -> None:
        why = f": {described(error)}" if error is not None else ""
        name = replica.backend.name
        _log.warning("%s gets no work: it is %s%s", name, reason, why, extra={"backend": name, "reason": reason})
        replica.health.eject(reason, now_s)
        count(self._stats.ejections, reason)
        self.refresh(now_s)
