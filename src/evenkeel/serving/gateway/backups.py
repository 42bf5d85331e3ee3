"""Runs backups: workers that take groups of waiting items as soon as they are idle.

An idle backup takes what waits in the smallest code that holds it, just in time: so that its reply is there when the
oldest item would be late. Nothing is gained by an earlier one, since no fill is used before, and later items share the
pass. Where no other item is expected by then it goes at once, alone: the replicas' own pass on a backup is exact, and
may be first. Waiting longer, for a full group, would cost the first item s / load (s: service time), more than the
straggler it hides.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, Reply
from evenkeel.clock import Clock
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.elastic import Elastic
from evenkeel.errors import BackendLostError, CodeError
from evenkeel.serving.gateway.budget import Budget
from evenkeel.serving.gateway.groups import PASS_KEYS, Group, OnAnswer, Waiting
from evenkeel.serving.gateway.item import Item
from evenkeel.serving.gateway.node import Attempt, Node
from evenkeel.serving.gateway.policy import Trigger
from evenkeel.serving.gateway.quantile import LiveQuantiles
from evenkeel.serving.gateway.replicas import described
from evenkeel.serving.gateway.spares import Spares
from evenkeel.serving.gateway.stats import Stats, count

__all__ = ["Backups", "Offload", "OnPassOver", "inline"]

_log = logging.getLogger(__name__)
_LARGE = 3  # backups, from which on a late item is given to a second one
_MEMORY = 32  # replies, and items, over which times are averaged
_LONGEST_GAP = 2.0  # times after which an item is late
_FEW = 0.09  # of the answers; where more are approximate, backups rather make exact passes, which go at once
_MAX_WAIT = 0.75  # of the median service time; after a longer wait an exact pass would often have answered already

OnPassOver = Callable[[Item], object]
Offload = Callable[[Callable[[], Any], Callable[[Any], object]], object]


def inline(work: Callable[[], Any], then: Callable[[Any], object]) -> None:
    """Does the work here and now: the simplest `Offload`. A server passes one that uses threads."""
    then(work())


class _Backup(Node):
    """Holds one backup and its tasks, which are those of one group."""

    __slots__ = ("busy_since_s", "group", "reserved", "suspected")

    def __init__(self, backend: Backend, limit_s: float) -> None:
        super().__init__(backend, limit_s)
        self.reserved = False  # for a group that is still made ready
        self.busy_since_s = 0.0
        self.suspected = False
        self.group: Group | None = None  # that it was last given

    @property
    def state(self) -> str:
        """Says how it is, in one word: `well`, `gone`, or `stalled` where its pass takes far too long."""
        if not self.backend.ready:
            return "gone"
        return "stalled" if self.open and self.suspected else "well"

    @property
    def idle(self) -> bool:
        return not self.open and not self.reserved and self.backend.ready

    @property
    def occupied(self) -> bool:
        """Tells whether it has a group, or one is made ready for it."""
        return self.reserved or bool(self.open)

    def reserve(self, now_s: float) -> None:
        """Marks it as busy with a group from now on, also while the group is still being prepared."""
        self.reserved = True
        self.busy_since_s = now_s
        self.suspected = False


def _prepared(work: Sequence[tuple[Item, BackupCode]]) -> None:
    """Prepares items for codes. Runs in a thread: it writes each item's entry whole, and nobody else writes it then."""
    for item, code in work:
        try:
            item.prepared[code.form] = code.prepare(item.array)
        except CodeError:
            continue  # found missing, and counted, when its group is sent
        except Exception:  # whatever it is, the backup that waits for its group must go on
            _log.exception("an item could not be prepared for %s", code.name)


def _usable(item: Item, code: BackupCode) -> Array | None:
    """Gives what the code takes of the item; None where that has still to be prepared."""
    if item.prepared and (prepared := item.prepared.get(code.form)) is not None:
        return prepared
    return item.array if code.is_prepared(item.array) else None


def _mark_lost(group: Group) -> None:
    """Notes of a group's items that a worker was lost with them, or fell silent: any of them may be the reason."""
    for item in group.items:
        item.lost_a_pass = True
        item.lost_alone = item.lost_alone or len(group.items) == 1


class Backups(Spares):
    """Gives groups of items to several backups.

    Args:
        clock: where to wait.
        backends: the backups.
        codes: what they can run.
        fill_after: when an item counts as late.
        service_times: from which `fill_after` is computed.
        group_wait_s: how long an item waits for others although a backup is idle; None: just in time.
        stats: counters.
        costs: model -> cost of one pass relative to a replica's.
        offload: runs slow preparation (shrinking large images) elsewhere.
        on_answer: called with every answer that a spare gives.
        on_pass_over: called with every item that has no answer although the last pass for it is back.
        model: that replicas run; a code that runs it too lets backups stand in for replicas.
        pass_limit_s: longest time of one pass; beyond, it counts as lost.
        may_add_worker: tells whether one more worker may have an item.
        approximate: of answers that are not exact; while it is spent, only exact passes are made.
    """

    def __init__(
        self,
        clock: Clock,
        backends: Sequence[Backend],
        codes: Sequence[BackupCode],
        fill_after: Trigger,
        service_times: LiveQuantiles,
        group_wait_s: float | None,
        stats: Stats,
        costs: dict[str, float],
        offload: Offload,
        on_answer: OnAnswer,
        on_pass_over: OnPassOver,
        model: str,
        pass_limit_s: float,
        may_add_worker: Callable[[Item], bool],
        approximate: Budget,
    ) -> None:
        self._clock = clock
        self._limit_s = pass_limit_s
        self._backups = [_Backup(backend, pass_limit_s) for backend in backends]
        self._leaving: list[_Backup] = []  # which only finish what they have
        self._elastic = Elastic(codes)
        self._forms = list({code.form: code for code in codes}.values())  # one code of each
        self._exact = next((code for code in codes if code.model == model), None)
        self._alone: dict[int, Item] = {}  # for which a backup does the replicas' own pass, oldest first
        self._fill_after = fill_after
        self._service_times = service_times
        self._stats = stats
        self._costs = costs
        self._offload = offload
        self._on_answer = on_answer
        self._on_pass_over = on_pass_over
        self._may_add_worker = may_add_worker
        self._approximate = approximate
        self._just_in_time = group_wait_s is None
        sizes = [code.max_items for code in self._elastic.codes]
        # More than the smallest real group need not wait: small ones give better answers.
        full = next((size for size in sizes if size > 1), 1) if self._just_in_time else sizes[-1]
        self._waiting = Waiting(clock, full, self._feed, group_wait_s or 0.0)
        self._pass_s = 0.0  # of a group, from its dispatch to its reply; a moving average
        self._gap_s: float | None = None  # between two items; a moving average
        self._covered_at_s = 0.0  # when the last item came
        self._next_pass = PASS_KEYS

    def cover(self, item: Item, now_s: float) -> None:
        """Covers the item by a spare, at once or as soon as it is late, until `forget`."""
        late_s = self._service_times.after(self._fill_after)
        item.late_at = now_s + late_s
        if self._just_in_time:
            self._set_wait(now_s, late_s)
        # Where replicas are faster than the floor, nothing is late before it, and a spare may wait until then. So does
        # an item that may not share a pass.
        item.uncovered = item.exact or late_s <= self._fill_after.floor_s
        if not item.uncovered:
            self._add(item)

    def _set_wait(self, now_s: float, late_s: float) -> None:
        """Learns how often items come, and has the oldest wait as long as it can, if others are expected by then."""
        # That a gap is too long to wait for the next item is enough to know: an hour without traffic counts no more.
        gap_s = min(now_s - self._covered_at_s, _LONGEST_GAP * late_s * len(self._backups))
        self._covered_at_s = now_s
        self._gap_s = gap_s if self._gap_s is None else self._gap_s + (gap_s - self._gap_s) / _MEMORY
        if not self._pass_s:
            return
        wait_s = min(late_s - self._pass_s, _MAX_WAIT * (self._service_times.quantile(0.5) or 0.0))
        others_come = wait_s > self._gap_s * len(self._backups)
        few_are_approximate = self._approximate.has_token and self._approximate.spent < _FEW
        self._waiting.wait_s = wait_s if others_come and few_are_approximate else 0.0
        self._waiting.gap_s = self._gap_s if others_come else 0.0

    def item_is_late(self, item: Item) -> None:
        """Covers the item now if it was not worth a spare before, or once more if its backup is late as well."""
        if item.suspect:
            return
        if item.uncovered:
            if item.exact:
                self.stand_in(item)
            else:
                self._add(item)
        # An item that hangs its workers would take one more with it, which a small fleet cannot spare.
        elif item.passes == 1 and item.fill is None and len(self._backups) >= _LARGE and item not in self._waiting:
            self._add(item)

    def forget(self, item: Item) -> None:
        """Takes the item from those that wait."""
        self._waiting.forget(item)
        self._alone.pop(item.number, None)

    def may_answer(self, item: Item) -> bool:
        """Tells whether a pass for it is under way, or it waits for a backup that is connected."""
        if item.passes:
            return True
        waits = item.number in self._alone or item in self._waiting
        return waits and any(backup.backend.ready for backup in self._backups)

    def room(self, limit: int) -> int:
        """Counts the items that the backups can take in the replicas' place until `limit` wait for each."""
        if self._exact is None:
            return 0
        return max(0, limit * sum(backup.backend.ready for backup in self._backups) - len(self._alone))

    def stand_in(self, item: Item) -> None:
        """Has a backup do the replicas' own pass, which is exact; not for items that may have broken a worker."""
        may_break = item.lost_a_pass or (item.suspect and not item.cleared)
        if self._exact is None or item.passes or may_break or item in self._waiting:
            return
        self._alone[item.number] = item
        self._clock.call_soon(self.wake)

    @property
    def nodes(self) -> Sequence[Node]:
        """Gives the backups that get work."""
        return self._backups

    def check_add(self, name: str) -> None:
        """Takes any."""

    def add(self, backend: Backend) -> None:
        """Takes in one more backup."""
        self._backups.append(_Backup(backend, self._limit_s))

    def retire(self, node: Node) -> None:
        """Gives a backup no more groups."""
        self._leaving += [backup for backup in self._backups if backup is node]
        self._backups = [backup for backup in self._backups if backup is not node]

    def remove(self, node: Node) -> None:
        """Lets go of a backup that was retired."""
        self._leaving = [backup for backup in self._leaving if backup is not node]

    @property
    def busy(self) -> bool:
        """Tells whether any backup has a task."""
        return any(backup.open for backup in (*self._backups, *self._leaving))

    @property
    def any_ready(self) -> bool:
        """Tells whether any backup is connected."""
        return any(backup.backend.ready for backup in self._backups)

    def waiting_room(self, limit: int) -> int:
        """Counts the items that may still wait, if `limit` may for each backup that is connected."""
        return max(0, limit * sum(backup.backend.ready for backup in self._backups) - len(self._waiting))

    def take(self, item: Item) -> None:
        """Covers the item now."""
        if item not in self._waiting:
            self._add(item)

    def _add(self, item: Item) -> None:
        self._waiting.add(item)
        idle = self._any_idle()
        if idle:
            self._waiting.wake()
        # What is taken at once, and alone, is taken by the smallest code, which may need no preparation.
        if not idle or self._waiting.wait_s > 0:
            self._prepare([item], self._forms, lambda: None)

    def wake(self) -> None:
        """Gives waiting items to backups that have become idle or ready."""
        if self._alone:
            self._feed_alone()
        if self._waiting and self._any_idle():
            self._waiting.wake()

    def _any_idle(self) -> bool:
        return any(backup.idle for backup in self._backups)

    def replica_replied(self, item: Item, outputs: Array) -> None:
        """Gives a replica's reply to the item's group, if that can use it."""
        if item.on_own_reply is not None:
            use, item.on_own_reply = item.on_own_reply, None
            use(outputs)

    def sweep(self, now_s: float, stall_s: float) -> None:
        """Handles backups that have worked on one group for longer than `stall_s`, and drops lost passes."""
        for backup in (*self._backups, *self._leaving):
            if backup.open and not backup.suspected and now_s - backup.busy_since_s > stall_s:
                name = backup.backend.name
                _log.warning(
                    "%s has been silent for %.3g s", name, now_s - backup.busy_since_s, extra={"backend": name}
                )
                backup.suspected = True
                backup.backend.suspect()
                if backup.group is not None:
                    _mark_lost(backup.group)
            backup.expire(now_s)

    def _prepare(self, items: Sequence[Item], codes: Sequence[BackupCode], then: Callable[[], object]) -> None:
        """Prepares items for codes of different forms, in another thread if that takes long; then goes on."""
        work = [(item, code) for item in items for code in codes if _usable(item, code) is None]
        if work:
            self._offload(partial(_prepared, work), lambda _: then())
        else:
            then()

    def _feed_alone(self) -> None:
        """Gives every idle backup items for an exact pass, as long as no group waits longer than they."""
        for backup in self._backups:
            while backup.idle and self._alone and self._exact is not None:
                if self._waiting.is_due_before(self._alone):
                    return
                items = list(self._alone.values())[: self._exact.max_items]
                for item in items:
                    del self._alone[item.number]
                backup.reserve(self._clock.time())
                self._send(backup, self._exact, items)

    def _feed(self) -> None:
        """Gives every idle backup the items that wait."""
        self._feed_alone()
        for backup in self._backups:
            while backup.idle and self._waiting:
                code = self._elastic.choose(len(self._waiting))
                if self._exact is not None and not self._approximate.has_token:
                    code = self._exact  # what others give could not be used
                items = self._waiting.take(code.max_items)
                backup.reserve(self._clock.time())
                self._prepare(items, [code], partial(self._send, backup, code, items))

    def _send(self, backup: _Backup, code: BackupCode, taken: Sequence[Item]) -> None:
        stats = self._stats
        # What could not be made ready goes without a spare, and so does what was answered or sent on in the meantime.
        items, arrays = [], []
        for item in taken:
            if not item.done and self._may_add_worker(item):
                array = _usable(item, code)
                if array is None:
                    stats.code_errors += 1
                else:
                    items.append(item)
                    arrays.append(array)
        backup.reserved = False
        try:
            tasks = code.spares(arrays) if items else []
        except CodeError:
            stats.code_errors += 1
            tasks = []
        if not tasks:
            self.wake()
            return
        group = backup.group = Group(code, items)
        if code.uses_primaries:
            for place, item in enumerate(items):
                item.on_own_reply = partial(self._use_primary, group, place)
        count(stats.passes, code.name, len(tasks))
        count(stats.grouped, code.name, len(items))
        group.open_spares = len(tasks)
        for item in items:
            item.passes += 1
        cost = self._costs.get(code.model, 1.0)
        for number, task in enumerate(tasks, start=len(items)):
            stats.backup_cost += cost * len(task.inputs)
            self._next_pass += 1
            on_reply = partial(self._on_reply, group, number)
            backup.send(code.model, task.inputs, self._next_pass, self._clock.time(), on_reply)

    def _use_primary(self, group: Group, place: int, outputs: Array) -> None:
        group.replied(place, outputs, self._stats, self._on_answer)

    def _on_reply(self, group: Group, number: int, attempt: Attempt, reply: Reply) -> None:
        if reply.outputs is not None and self._just_in_time:
            took_s = self._clock.time() - attempt.since_s
            self._pass_s += (took_s - self._pass_s) / (_MEMORY if self._pass_s else 1)
        group.open_spares -= 1
        if not group.open_spares:
            for item in group.items:
                item.passes -= 1
        if isinstance(reply.error, BackendLostError) and reply.began:
            _mark_lost(group)
        try:
            if reply.outputs is None:
                self._stats.lost_passes += 1
                name = attempt.node.backend.name
                _log.warning("%s could not do a pass: %s", name, described(reply.error), extra={"backend": name})
            else:
                self._stats.pass_times.add(self._clock.time() - attempt.since_s)
                group.replied(number, reply.outputs, self._stats, self._on_answer)
        finally:  # whatever a reply holds, the backup is idle again
            self.wake()
        for item in group.items:
            if not item.done and not item.passes:
                self._on_pass_over(item)
