"""Groups of items and the spares that cover them.

The backup is work-conserving: an idle one takes at once whatever waits, in the smallest code that holds it, and items
gather only while all backups are busy. Waiting for a full group would cost the first item s / load (s: service time),
more than the straggler it hides; without waiting, one backup at .6 of a replica's cost follows nine replicas up to a
load of .9 (systems/collage.md, 1f).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from evenkeel.backends.backend import Backend, Reply
from evenkeel.clock import Clock, Timer
from evenkeel.coding.code import Answer, Array, Code, Task
from evenkeel.coding.elastic import Elastic
from evenkeel.errors import CodeError, EvenkeelError
from evenkeel.serving.item import Item
from evenkeel.serving.replicas import Replica, Replicas
from evenkeel.serving.stats import Stats

__all__ = ["Backups", "CodedFleet", "Group", "Offload", "Waiting", "inline"]

OnAnswer = Callable[[Item, Answer, str], object]  # item, answer, name of the code it comes from
OnLost = Callable[[Item, EvenkeelError], object]
Offload = Callable[[Callable[[], Any], Callable[[Any], object]], object]

# Passes for groups are pieces of work of their own; their keys lie out of the items' way.
_PASS_KEYS = 1 << 48
_NEVER = float("inf")
_AT_ONCE = -_NEVER


def inline(work: Callable[[], Any], then: Callable[[Any], object]) -> None:
    """The simplest `Offload`: does the work here and now. A server passes one that uses threads."""
    then(work())


class Waiting:
    """Items without a group, oldest first, and the call that takes them.

    An item whose user has an answer leaves through `forget`, so no more wait here than are in flight.

    Args:
        clock: where to wait.
        wait_s: how long the oldest item waits for others; a full group never waits.
        full: how many items are a full group.
        on_due: called, never from inside a method of this class, when a group should be taken.
    """

    def __init__(self, clock: Clock, wait_s: float, full: int, on_due: Callable[[], object]) -> None:
        self._clock = clock
        self._wait_s = wait_s
        self._full = full
        self._on_due = on_due
        self._items: dict[int, Item] = {}
        self._due_at = _NEVER
        self._timer: Timer | None = None

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Item) -> None:
        """One more item waits."""
        self._items[item.number] = item

    def forget(self, item: Item) -> None:
        """The item, if it waits, need not any more."""
        self._items.pop(item.number, None)

    def take(self, count: int) -> list[Item]:
        """Up to `count` items, the oldest; they wait no more."""
        items = list(self._items.values())[:count]
        for item in items:
            del self._items[item.number]
        return items

    def wake(self) -> None:
        """Somebody could take a group: have `on_due` called as soon as one is due."""
        if not self._items:
            return
        if self._wait_s <= 0 or len(self._items) >= self._full:
            due_at = _AT_ONCE
        else:
            due_at = next(iter(self._items.values())).since_s + self._wait_s
        if due_at >= self._due_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due_at = due_at
        if due_at <= self._clock.time():
            # Soon, not now: items of one request, and of requests read in one turn of the loop, share a group.
            self._timer = self._clock.call_soon(self._due)
        else:
            self._timer = self._clock.call_at(due_at, self._due)

    def _due(self) -> None:
        self._timer = None
        self._due_at = _NEVER
        self._on_due()


class Group:
    """The items that one encoding covers, and the replies so far."""

    __slots__ = ("code", "items", "replies")

    def __init__(self, code: Code, items: list[Item]) -> None:
        self.code = code
        self.items = items
        self.replies: dict[int, Array] = {}

    @property
    def done(self) -> bool:
        """True when nobody waits for it any more."""
        return all(item.done for item in self.items)

    def replied(self, number: int, outputs: Array, stats: Stats, on_answer: OnAnswer) -> None:
        """Task `number` gave `outputs`: tell every answer that can be told now. What is no reply is dropped."""
        self.replies[number] = outputs
        try:
            answers = self.code.decode(len(self.items), self.replies)
        except CodeError:
            del self.replies[number]
            stats.bad_replies += 1
            return
        for place, answer in answers.items():
            item = self.items[place]
            if not item.done:
                on_answer(item, answer, self.code.name)


class _Backup:
    """A backup, and how many of its tasks are out."""

    __slots__ = ("backend", "busy_since_s", "open_tasks", "suspected")

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.open_tasks = 0
        self.busy_since_s = 0.0
        self.suspected = False

    @property
    def idle(self) -> bool:
        return not self.open_tasks and self.backend.ready

    def reserve(self, now_s: float) -> None:
        """It is given a group: busy from now on, also while the group is still made ready."""
        self.open_tasks = 1
        self.busy_since_s = now_s
        self.suspected = False


def _prepared(work: Sequence[tuple[Item, Code]]) -> None:
    """Make items ready for codes. Runs in a thread: each item's entry is written whole, and by nobody else then."""
    for item, code in work:
        try:
            item.prepared[code.form] = code.prepare(item.array)
        except CodeError:
            continue  # found missing, and counted, when its group is sent


class Backups:
    """Several backups that share the groups.

    Args:
        clock: where to wait.
        backends: the backups.
        codes: what they can run.
        group_wait_s: how long an item waits for others although a backup is idle; above 0 only to save backup work.
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
        self._elastic = Elastic(codes)
        self._stats = stats
        self._costs = costs
        self._offload = offload
        self._on_answer = on_answer
        self._waiting = Waiting(clock, group_wait_s, self._elastic.most_items, self._feed)
        self._next_pass = _PASS_KEYS
        # Finished items tell Waiting directly: it is asked once an item.
        self.forget = self._waiting.forget

    def add(self, item: Item) -> None:
        """The item would like to be covered by a spare, until `forget`."""
        self._waiting.add(item)
        if any(backup.idle for backup in self._backups):
            # Taken at once, and if alone by the smallest code, which may need no preparation.
            self._waiting.wake()
        else:
            self._prepare([item], self._elastic.codes, lambda: None)

    def wake(self) -> None:
        """A backup may have become idle or ready."""
        for backup in self._backups:
            if backup.idle:
                self._waiting.wake()
                return

    def replica_replied(self, item: Item, outputs: Array) -> None:
        """A replica's reply came for an item; its group may be able to use it."""
        if item.group is not None:
            group, place = item.group
            item.group = None
            group.replied(place, outputs, self._stats, self._on_answer)

    def suspect_stalled(self, now_s: float, limit_s: float) -> None:
        """Have every backup looked after that has worked on one group for longer than `limit_s`."""
        for backup in self._backups:
            if backup.open_tasks and not backup.suspected and now_s - backup.busy_since_s > limit_s:
                backup.suspected = True
                backup.backend.suspect()

    def _prepare(self, items: Sequence[Item], codes: Sequence[Code], then: Callable[[], object]) -> None:
        """Have the items made ready for the codes, away from here if that is work, and go on with `then`."""
        work = [
            (item, code)
            for item in items
            for code in {code.form: code for code in codes}.values()
            if code.form not in item.prepared and not code.is_prepared(item.array)
        ]
        if work:
            self._offload(partial(_prepared, work), lambda _: then())
        else:
            then()

    def _feed(self) -> None:
        """Give every idle backup what waits."""
        for backup in self._backups:
            while backup.idle and self._waiting:
                code = self._elastic.choose(len(self._waiting))
                items = self._waiting.take(code.most_items)
                backup.reserve(self._clock.time())
                self._prepare(items, [code], partial(self._send, backup, code, items))

    def _send(self, backup: _Backup, code: Code, taken: Sequence[Item]) -> None:
        stats = self._stats
        # What could not be made ready goes without a spare, and so does what was answered in the meantime.
        items = [
            item for item in taken if not item.done and (code.form in item.prepared or code.is_prepared(item.array))
        ]
        stats.code_errors += sum(not item.done for item in taken) - len(items)
        backup.open_tasks = 0
        try:
            tasks = code.spares([item.prepared.get(code.form, item.array) for item in items]) if items else []
        except CodeError:
            stats.code_errors += 1
            tasks = []
        if not tasks:
            self.wake()
            return
        group = Group(code, items)
        if code.uses_primaries:
            for place, item in enumerate(items):
                item.group = (group, place)
        _count(stats.passes, code.name, len(tasks))
        _count(stats.grouped, code.name, len(items))
        cost = self._costs.get(code.model, 1.0)
        backup.open_tasks = len(tasks)
        for number, task in enumerate(tasks, start=len(items)):
            stats.backup_cost += cost * len(task.inputs)
            self._next_pass += 1
            backup.backend.submit(
                code.model, task.inputs, partial(self._on_reply, backup, group, number), self._next_pass
            )

    def _on_reply(self, backup: _Backup, group: Group, number: int, reply: Reply) -> None:
        backup.open_tasks -= 1
        if reply.outputs is None:
            self._stats.lost_passes += 1
        else:
            group.replied(number, reply.outputs, self._stats, self._on_answer)
        self.wake()


class CodedFleet:
    """Runs a code that is not systematic (ApproxIFER): every replica works on coded items, none on an item itself.

    A group is sent when it is full, or `group_wait_s` after its first item came. A lost task goes to another replica;
    once every item of a group has its answer, the tasks still open are cancelled.
    """

    def __init__(
        self,
        clock: Clock,
        model: str,
        replicas: Replicas,
        code: Code,
        group_wait_s: float,
        stats: Stats,
        on_answer: OnAnswer,
        on_lost: OnLost,
    ) -> None:
        self._clock = clock
        self._model = model
        self._replicas = replicas
        self._code = code
        self._stats = stats
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._waiting = Waiting(clock, group_wait_s, code.most_items, self._take)
        self._unsent: list[_CodedTask] = []  # for want of a ready replica
        self._next_key = _PASS_KEYS
        self.forget = self._waiting.forget

    def add(self, item: Item) -> None:
        """The item waits for its group."""
        self._waiting.add(item)
        self._waiting.wake()

    def wake(self) -> None:
        """A replica may have become ready."""
        unsent, self._unsent = self._unsent, []
        for task in unsent:
            self._send(task)

    def _take(self) -> None:
        items = self._waiting.take(self._code.most_items)
        self._waiting.wake()
        if not items:
            return
        group, stats, name = Group(self._code, items), self._stats, self._code.name
        try:
            tasks = self._code.encode([item.array for item in items])
        except CodeError as error:
            stats.code_errors += 1
            for item in items:
                self._on_lost(item, error)
            return
        _count(stats.passes, name, len(tasks))
        _count(stats.grouped, name, len(items))
        stats.backup_cost += len(tasks) - len(items)
        sent: list[_CodedTask] = []
        for number, task in enumerate(tasks):
            coded = _CodedTask(group, number, task, sent)
            sent.append(coded)
            self._send(coded)

    def _send(self, task: "_CodedTask") -> None:
        if task.group.done:
            return
        # Two tasks of a group on one replica would be lost together.
        used = [other.replica for other in task.siblings if other.replica is not None]
        replica = self._replicas.choose(used) or self._replicas.choose()
        if replica is None:
            self._unsent.append(task)
            return
        now = self._clock.time()
        replica.sent(now)
        self._next_key += 1
        task.replica = replica
        task.ticket = replica.backend.submit(
            self._model, task.task.inputs, partial(self._on_reply, task, replica, now), self._next_key
        )

    def _on_reply(self, task: "_CodedTask", replica: Replica, sent_s: float, reply: Reply) -> None:
        replica.back(self._clock.time(), sent_s, reply)
        task.replica = None
        if reply.outputs is not None:
            task.group.replied(task.number, reply.outputs, self._stats, self._on_answer)
            if task.group.done:
                for other in task.siblings:
                    if other.replica is not None:
                        self._stats.cancels += 1
                        other.replica.backend.cancel(other.ticket)
        elif not reply.cancelled:
            self._stats.lost_attempts += 1
            task.losses += 1
            if task.losses <= _MOST_LOSSES:
                self._send(task)


# A task that is lost more often than this is not worth another replica.
_MOST_LOSSES = 5


class _CodedTask:
    """One coded task: its group, and the replica that works on it."""

    __slots__ = ("group", "losses", "number", "replica", "siblings", "task", "ticket")

    def __init__(self, group: Group, number: int, task: Task, siblings: list["_CodedTask"]) -> None:
        self.group = group
        self.number = number
        self.task = task
        self.siblings = siblings
        self.replica: Replica | None = None
        self.ticket = 0
        self.losses = 0


def _count(counts: dict[str, int], name: str, number: int) -> None:
    counts[name] = counts.get(name, 0) + number
