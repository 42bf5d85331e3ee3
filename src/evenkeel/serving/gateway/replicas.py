"""The fleet of replicas: who gets the next item, and who is out."""

from collections.abc import Collection, Sequence

from evenkeel.backends.backend import Backend, Reply
from evenkeel.serving.gateway.health import Health, HealthSettings
from evenkeel.serving.gateway.quantile import LiveQuantiles
from evenkeel.serving.gateway.stats import Stats, count

__all__ = ["Replica", "Replicas"]


class Replica:
    """One replica: its queue as the gateway knows it, and its health."""

    __slots__ = ("_fleet", "_quiet_since_s", "backend", "health", "outstanding")

    def __init__(self, backend: Backend, fleet: "Replicas") -> None:
        self.backend = backend
        self.health = Health(fleet.settings)
        self.outstanding = 0
        self._fleet = fleet
        self._quiet_since_s = 0.0  # when it last replied, or last began to have work

    def sent(self, now_s: float) -> None:
        """A task is on its way to it."""
        if not self.outstanding:
            self._quiet_since_s = now_s
        self.outstanding += 1

    def _returned(self, now_s: float, sent_s: float, reply: Reply) -> float | None:
        """Book one reply; seconds of work behind it, or None when it tells nothing of the replica's speed."""
        self.outstanding -= 1
        if reply.cancelled:
            return None
        # A worker that takes one task at a time began this one when it replied to the last one.
        since_s = max(sent_s, self._quiet_since_s) if self.backend.serial else sent_s
        self._quiet_since_s = now_s
        return None if reply.outputs is None else now_s - since_s

    def back(self, now_s: float, sent_s: float, reply: Reply) -> None:
        """A task came back: learn from it."""
        service_s = self._returned(now_s, sent_s, reply)
        if service_s is not None:
            self._fleet.learn(self, service_s, now_s)
        elif not reply.cancelled:
            self._fleet.learn_failure(self, now_s)
        elif reply.service_s is not None:
            self._fleet.learn_unfinished(reply.service_s)

    def probe_sent(self, now_s: float) -> None:
        """A probe is on its way to it."""
        self.health.probe_sent()
        self.sent(now_s)

    def probe_back(self, now_s: float, sent_s: float, reply: Reply) -> None:
        """A probe came back: readmit it, or wait longer."""
        self._fleet.judge_probe(self, self._returned(now_s, sent_s, reply), now_s)

    def silent_s(self, now_s: float) -> float:
        """Seconds since it last showed life while it had work; 0 without work."""
        return now_s - self._quiet_since_s if self.outstanding else 0.0


class Replicas:
    """All replicas, the ones in use, and the one to use next."""

    def __init__(
        self, backends: Sequence[Backend], settings: HealthSettings, service_times: LiveQuantiles, stats: Stats
    ) -> None:
        self.settings = settings
        self._service_times = service_times
        self._stats = stats
        self.all = [Replica(backend, self) for backend in backends]
        self._usable: list[Replica] = []
        self._turn = 0
        self.any_ejected = False
        self.any_stalled = False
        self.any_ready = False
        self.sweep_every_s = max(settings.min_stall_s / 4, 0.01)
        self.refresh()

    def refresh(self) -> None:
        """Look again at who is ready and who is ejected."""
        ready = [replica for replica in self.all if replica.backend.ready]
        healthy = [replica for replica in ready if not replica.health.ejected]
        # When every ready replica is ejected, a bad one is better than none, and a slow one than a silent one.
        self._usable = healthy or [replica for replica in ready if not replica.health.stalled] or ready
        self.any_ready = bool(ready)
        self.any_ejected = any(replica.health.ejected for replica in self.all)
        self.any_stalled = any(replica.health.stalled for replica in self.all)

    def choose(self, tried: Collection[Replica] = ()) -> Replica | None:
        """The usable replica with the fewest outstanding tasks, not one of `tried`; ties go round in turn."""
        usable = self._usable
        count = len(usable)
        if not count:
            return None
        best: Replica | None = None
        least = 1 << 60
        # Start one further each time, so that an idle fleet shares the work evenly.
        self._turn = turn = (self._turn + 1) % count
        for replica in usable[turn:] + usable[:turn]:
            if replica.outstanding < least and replica not in tried:
                if not replica.outstanding:
                    return replica
                best, least = replica, replica.outstanding
        return best

    def room(self, most: int) -> int:
        """Tasks that the usable replicas can take until each has `most`."""
        return sum(max(0, most - replica.outstanding) for replica in self._usable)

    def learn(self, replica: Replica, service_s: float, now_s: float) -> None:
        """One ordinary reply: remember how long it took, and eject the replica when it stays slow."""
        health = replica.health
        if health.ejected:  # left-overs from before the ejection say nothing of the fleet
            if health.stalled:
                self._readmit(replica)
            return
        self._service_times.add(service_s)
        health.replied(service_s)
        if health.is_slow(self._service_times.quantile(0.5)) and self._may_eject():
            self._eject(replica, "slow", now_s)

    def learn_failure(self, replica: Replica, now_s: float) -> None:
        """A task ended in an error: eject the replica when it gives nothing else."""
        health = replica.health
        if not health.ejected and replica.backend.ready and health.failed() and self._may_eject():
            self._eject(replica, "failing", now_s)

    def learn_unfinished(self, service_s: float) -> None:
        """A task was stopped after `service_s`: it would have taken longer.

        Where late tasks are stopped, leaving them out would lower the quantile, which stops more tasks, and so on down.
        One that has outlasted the quantile counts the same whatever it had come to; a younger one tells nothing.
        """
        late_s = self._service_times.quantile(0.95)
        if late_s is not None and service_s >= late_s:
            self._service_times.add(service_s)

    @property
    def stall_after_s(self) -> float:
        """Silence that counts as a stall."""
        p95_s = self._service_times.quantile(0.95)
        # While nothing is known, be slow to suspect anybody.
        return max(self.settings.min_stall_s, 10.0 if p95_s is None else self.settings.stall_factor * p95_s)

    def eject_stalled(self, now_s: float) -> list[Replica]:
        """Eject the replicas that have been silent for too long, and tell which."""
        limit_s = self.stall_after_s
        found = [one for one in self.all if not one.health.stalled and one.silent_s(now_s) > limit_s]
        for replica in found:
            self._eject(replica, "stalled", now_s)
        return found

    def wanting_probe(self, now_s: float) -> list[Replica]:
        """Ejected replicas that are due a look."""
        return [replica for replica in self.all if replica.health.wants_probe(now_s) and replica.backend.ready]

    def judge_probe(self, replica: Replica, service_s: float | None, now_s: float) -> None:
        """A probe came back after `service_s`, or failed (None)."""
        if replica.health.probe_back(service_s, self._service_times.quantile(0.5), now_s):
            self._readmit(replica)

    def _may_eject(self) -> bool:
        out = sum(replica.health.ejected for replica in self.all)
        return out + 1 <= self.settings.max_slow_share * len(self.all)

    def _readmit(self, replica: Replica) -> None:
        replica.health.readmit()
        self._stats.readmissions += 1
        self.refresh()

    def _eject(self, replica: Replica, reason: str, now_s: float) -> None:
        replica.health.eject(reason, now_s)
        count(self._stats.ejections, reason)
        self.refresh()
