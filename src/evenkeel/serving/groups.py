"""Groups of items and the spares that cover them.

The backup is work-conserving: an idle one takes at once whatever waits, in the smallest code that holds it, and items
gather only while all backups are busy. Waiting for a full group would cost the first item s / load (s: service time),
more than the straggler it hides; without waiting, one backup at .6 of a replica's cost follows nine replicas up to a
load of .9 (systems/collage.md, 1f).
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from evenkeel.backends.backend import Backend, Reply
from evenkeel.clock import Clock
from evenkeel.coding.code import Answer, Array, Code
from evenkeel.coding.elastic import Elastic
from evenkeel.errors import CodeError
from evenkeel.serving.item import Item
from evenkeel.serving.replicas import Replica, Replicas
from evenkeel.serving.stats import Stats

__all__ = ["Backups", "CodedFleet", "Group", "Offload", "inline"]

OnAnswer = Callable[[Item, Answer, str], object]  # item, answer, name of the code it comes from
Offload = Callable[[Callable[[], Any], Callable[[Any], object]], object]

# Backup passes are pieces of work of their own; their keys lie out of the items' way.
_PASS_KEYS = 1 << 48


def inline(work: Callable[[], Any], then: Callable[[Any], object]) -> None:
    """The simplest `Offload`: does the work here and now. A server passes one that uses threads."""
    then(work())


class Group:
    """The items that one encoding covers, and the replies so far."""

    __slots__ = ("code", "items", "replies")

    def __init__(self, code: Code, items: list[Item]) -> None:
        self.code = code
        self.items = items
        self.replies: dict[int, Array] = {}

    def decode(self, stats: Stats, on_answer: OnAnswer) -> None:
        """Tell every answer that can be told so far."""
        try:
            answers = self.code.decode(len(self.items), self.replies)
        except CodeError:
            stats.bad_replies += 1
            return
        for place, answer in answers.items():
            item = self.items[place]
            if not item.done:
                on_answer(item, answer, self.code.name)


class _Backup:
    """A backup, and how many of its tasks are out."""

    __slots__ = ("backend", "open_tasks")

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.open_tasks = 0


class Backups:
    """Several backups that share the groups.

    Args:
        clock: where to wait.
        backends: the backups.
        codes: what they can run.
        group_wait_s: pause before an idle backup takes what waits; above 0 only to save backup work.
        stats: counters.
        costs: model -> cost of one pass relative to a replica's.
        offload: runs slow preparation (shrinking large images) elsewhere.
        on_answer: told every answer that a spare gives.
    """

    def __init__(
        self,
        clock: Clock,
        backends: Sequence[Backend],
        codes: Sequence[Code],
        group_wait_s: float,
        stats: Stats,
        costs: dict[str, float],
        offload: Offload,
        on_answer: OnAnswer,
    ) -> None:
        self._clock = clock
        self._backups = [_Backup(backend) for backend in backends]
        self._codes = codes
        self._elastic = Elastic(codes)
        self._group_wait_s = group_wait_s
        self._stats = stats
        self._costs = costs
        self._offload = offload
        self._on_answer = on_answer
        self._waiting: deque[Item] = deque()
        self._next_pass = 0
        self._feed_is_due = False

    def add(self, item: Item) -> None:
        """The item would like to be covered by a spare."""
        slow = [code for code in self._codes if not code.is_prepared(item.array)]
        if slow:
            self._offload(
                lambda: {code.name: code.prepare(item.array) for code in slow}, partial(self._add_prepared, item)
            )
        else:
            self._waiting.append(item)
            self._feed_soon(self._group_wait_s)

    def _add_prepared(self, item: Item, prepared: dict[str, Array]) -> None:
        if not item.done:
            item.prepared = prepared
            self._waiting.append(item)
            self._feed_soon(self._group_wait_s)

    def replica_replied(self, item: Item, outputs: Array) -> None:
        """An exact reply came for an item whose groups can use it."""
        for group, place in item.groups:
            group.replies[place] = outputs
            group.decode(self._stats, self._on_answer)

    def wake(self) -> None:
        """A backup may have become ready."""
        if self._waiting:
            self._feed_soon(0.0)

    def _feed_soon(self, wait_s: float) -> None:
        if self._feed_is_due:
            return
        for backup in self._backups:
            if not backup.open_tasks:
                self._feed_is_due = True
                if wait_s > 0:
                    self._clock.call_at(self._clock.time() + wait_s, self._feed)
                else:
                    # Not at once: items of one request, and of requests read in one turn of the loop, share a group.
                    self._clock.call_soon(self._feed)
                return

    def _feed(self) -> None:
        """Give every idle backup what waits."""
        self._feed_is_due = False
        waiting = self._waiting
        for backup in self._backups:
            if backup.open_tasks or not backup.backend.ready:
                continue
            items = [item for item in waiting if not item.done]
            waiting.clear()
            if not items:
                return
            code = self._elastic.choose(len(items))
            waiting.extend(items[code.most_items :])
            self._send(backup, Group(code, items[: code.most_items]))

    def _send(self, backup: _Backup, group: Group) -> None:
        code, items, stats = group.code, group.items, self._stats
        try:
            tasks = code.spares(
                [item.prepared[code.name] if item.prepared and code.name in item.prepared else item.array for item in items]
            )
        except CodeError:
            stats.code_errors += 1
            return
        if code.uses_primaries:
            for place, item in enumerate(items):
                item.groups.append((group, place))
        stats.passes[code.name] = stats.passes.get(code.name, 0) + 1
        stats.grouped[code.name] = stats.grouped.get(code.name, 0) + len(items)
        cost = self._costs.get(code.model, 1.0)
        backup.open_tasks = len(tasks)
        for number, task in enumerate(tasks, start=len(items)):
            stats.backup_cost += cost * len(task.inputs)
            self._next_pass += 1
            backup.backend.submit(
                code.model, task.inputs, partial(self._on_reply, backup, group, number), _PASS_KEYS + self._next_pass
            )

    def _on_reply(self, backup: _Backup, group: Group, number: int, reply: Reply) -> None:
        backup.open_tasks -= 1
        if self._waiting:
            self._feed_soon(self._group_wait_s)
        if reply.outputs is None:
            self._stats.lost_passes += 1
            return
        group.replies[number] = reply.outputs
        group.decode(self._stats, self._on_answer)


class CodedFleet:
    """Runs a code that is not systematic (ApproxIFER): every replica works on coded items, none on an item itself.

    A group is sent when it is full, or `group_wait_s` after its first item came.
    """

    def __init__(
        self, clock: Clock, model: str, replicas: Replicas, code: Code, group_wait_s: float, stats: Stats, on_answer: OnAnswer
    ) -> None:
        self._clock = clock
        self._model = model
        self._replicas = replicas
        self._code = code
        self._group_wait_s = group_wait_s
        self._stats = stats
        self._on_answer = on_answer
        self._waiting: list[Item] = []
        self._groups = 0
        self._next_task = 0

    def add(self, item: Item) -> None:
        """The item waits for its group."""
        self._waiting.append(item)
        if len(self._waiting) >= self._code.most_items:
            self._clock.call_soon(self._send, self._groups)
        elif len(self._waiting) == 1:
            self._clock.call_at(self._clock.time() + self._group_wait_s, self._send, self._groups)

    def _send(self, number: int) -> None:
        if number != self._groups:
            return  # that group was full, and left, before its wait was over
        self._groups += 1
        code = self._code
        items = [item for item in self._waiting[: code.most_items] if not item.done]
        self._waiting = self._waiting[code.most_items :]
        if self._waiting:
            self._clock.call_at(self._clock.time() + self._group_wait_s, self._send, self._groups)
        if not items:
            return
        group = Group(code, items)
        try:
            tasks = code.encode([item.array for item in items])
        except CodeError:
            self._stats.code_errors += 1
            return
        self._stats.passes[code.name] = self._stats.passes.get(code.name, 0) + len(tasks)
        self._stats.grouped[code.name] = self._stats.grouped.get(code.name, 0) + len(items)
        self._stats.backup_cost += len(tasks) - len(items)
        used: list[Replica] = []
        now = self._clock.time()
        for place, task in enumerate(tasks):
            # Two tasks of a group on one replica would be lost together.
            replica = self._replicas.choose(used) or self._replicas.choose()
            if replica is None:
                return
            used.append(replica)
            replica.sent(now)
            self._next_task += 1
            replica.backend.submit(
                self._model,
                task.inputs,
                partial(self._on_reply, replica, now, group, place),
                _PASS_KEYS + self._next_task,
            )

    def _on_reply(self, replica: Replica, sent_s: float, group: Group, place: int, reply: Reply) -> None:
        replica.back(self._clock.time(), sent_s, reply)
        if reply.outputs is None:
            self._stats.lost_attempts += 1
            return
        group.replies[place] = reply.outputs
        group.decode(self._stats, self._on_answer)
