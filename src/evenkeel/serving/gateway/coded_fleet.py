"""Runs a code that is not systematic: every replica works on coded items, none on an item itself."""

from collections.abc import Callable
from functools import partial

from evenkeel.arrays import Array
from evenkeel.backends.backend import Reply
from evenkeel.clock import Clock
from evenkeel.coding.code import Code, Task
from evenkeel.errors import BackendLostError, CodeError, EvenkeelError, TaskRefusedError
from evenkeel.serving.gateway.backups import OnPassOver
from evenkeel.serving.gateway.groups import PASS_KEYS, Group, OnAnswer, Waiting
from evenkeel.serving.gateway.item import Item
from evenkeel.serving.gateway.node import Attempt
from evenkeel.serving.gateway.replicas import Replica, Replicas
from evenkeel.serving.gateway.spares import Spares
from evenkeel.serving.gateway.stats import Stats, count

__all__ = ["CodedFleet", "OnLost"]

_NEVER = float("inf")
OnLost = Callable[[Item, EvenkeelError], object]


class CodedFleet(Spares):
    """Runs a code that is not systematic (ApproxIFER): every replica works on coded items, none on an item itself.

    A group is sent when it is full, or `group_wait_s` after its first item came. A lost task goes to another replica,
    but one on which two passes failed is given up, and the items of its group are done one by one (`on_pass_over`).
    Once every item of a group has its answer, the tasks still open are cancelled.
    """

    sends_items = False
    busy = False  # it has no workers of its own

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
        on_pass_over: OnPassOver,
    ) -> None:
        self._clock = clock
        self._model = model
        self._replicas = replicas
        self._code = code
        self._stats = stats
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._on_pass_over = on_pass_over
        self._waiting = Waiting(clock, code.max_items, self._take, group_wait_s)
        self._unsent: list[_CodedTask] = []  # for want of a ready replica
        self._next_key = PASS_KEYS

    def cover(self, item: Item, now_s: float) -> None:
        """Puts the item among those that wait for a group. It is not hedged: the code is the hedge."""
        if item.exact:
            return
        item.hedge_at = _NEVER
        self._waiting.add(item)
        self._waiting.wake()

    def forget(self, item: Item) -> None:
        """Takes the item from those that wait."""
        self._waiting.forget(item)

    def wake(self) -> None:
        """Sends the tasks for which no replica was ready."""
        unsent, self._unsent = self._unsent, []
        for task in unsent:
            self._send(task)

    def item_is_late(self, item: Item) -> None:
        """Does nothing more: the item was covered when it came."""

    def replica_replied(self, item: Item, outputs: Array) -> None:
        """Needs no reply to the item itself: only coded tasks are decoded."""

    def sweep(self, now_s: float, stall_s: float) -> None:
        """Leaves workers to the gateway: they are its replicas."""

    def may_answer(self, item: Item) -> bool:
        """Says no: the gateway asks only about items that were given up here."""
        return False

    def room(self, limit: int) -> int:
        """Gives 0: there are no workers but the replicas."""
        return 0

    def stand_in(self, item: Item) -> None:
        """Does nothing: there are no workers but the replicas."""

    def _take(self) -> None:
        items = self._waiting.take(self._code.max_items)
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
        count(stats.passes, name, len(tasks))
        count(stats.grouped, name, len(items))
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
        self._next_key += 1
        task.replica = replica
        task.attempt = replica.submit(
            self._model, task.task.inputs, self._next_key, self._clock.time(), partial(self._on_reply, task)
        )

    def _on_reply(self, task: "_CodedTask", attempt: Attempt, reply: Reply) -> None:
        attempt.node.back(self._clock.time(), attempt.since_s, reply, attempt.expired)
        task.replica = task.attempt = None
        if reply.outputs is not None:
            task.group.replied(task.number, reply.outputs, self._stats, self._on_answer)
            if task.group.done:
                for other in task.siblings:
                    if other.attempt is not None:
                        self._stats.cancels += 1
                        other.attempt.cancel()
        elif not reply.cancelled:
            self._stats.lost_attempts += 1
            if isinstance(reply.error, TaskRefusedError):
                task.failures = _MAX_FAILURES
            elif reply.began or not isinstance(reply.error, BackendLostError):
                task.failures += 1
            task.losses += 1
            if task.failures < _MAX_FAILURES and task.losses < _MAX_LOSSES:
                self._send(task)
                return
            for item in task.group.items:
                if not item.done:
                    # What broke this task may be in any of its items.
                    item.suspect = item.suspect or isinstance(reply.error, BackendLostError)
                    item.failures = max(item.failures, 1)
                    item.error = reply.error
                    self._on_pass_over(item)


_MAX_FAILURES = 2  # passes on one task
_MAX_LOSSES = 20  # of one task, also where it only waited


class _CodedTask:
    """Holds one coded task: its group, and the replica that works on it."""

    __slots__ = ("attempt", "failures", "group", "losses", "number", "replica", "siblings", "task")

    def __init__(self, group: Group, number: int, task: Task, siblings: list["_CodedTask"]) -> None:
        self.group = group
        self.number = number
        self.task = task
        self.siblings = siblings
        self.replica: Replica | None = None
        self.attempt: Attempt | None = None
        self.failures = 0
        self.losses = 0
