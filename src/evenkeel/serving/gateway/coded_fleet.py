"""A fleet on which a code that is not systematic runs: every replica works on coded items, none on an item itself."""

from collections.abc import Callable
from functools import partial

from evenkeel.arrays import Array
from evenkeel.backends.backend import Reply
from evenkeel.clock import Clock
from evenkeel.coding.code import Code, Task
from evenkeel.errors import CodeError, EvenkeelError
from evenkeel.serving.gateway.groups import PASS_KEYS, Group, OnAnswer, Waiting
from evenkeel.serving.gateway.item import Item
from evenkeel.serving.gateway.replicas import Replica, Replicas
from evenkeel.serving.gateway.spares import Spares
from evenkeel.serving.gateway.stats import Stats, count

__all__ = ["CodedFleet", "OnLost"]

_NEVER = float("inf")
OnLost = Callable[[Item, EvenkeelError], object]


class CodedFleet(Spares):
    """Runs a code that is not systematic (ApproxIFER): every replica works on coded items, none on an item itself.

    A group is sent when it is full, or `group_wait_s` after its first item came. A lost task goes to another replica;
    once every item of a group has its answer, the tasks still open are cancelled.
    """

    sends_items = False

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
        self._waiting = Waiting(clock, group_wait_s, code.max_items, self._take)
        self._unsent: list[_CodedTask] = []  # for want of a ready replica
        self._next_key = PASS_KEYS

    def cover(self, item: Item, now_s: float) -> None:
        """Have the item wait for its group. It is not hedged: the code is the hedge."""
        item.hedge_at = _NEVER
        self._waiting.add(item)
        self._waiting.wake()

    def forget(self, item: Item) -> None:
        """Have the item wait no longer."""
        self._waiting.forget(item)

    def wake(self) -> None:
        """Send the tasks for which no replica was ready."""
        unsent, self._unsent = self._unsent, []
        for task in unsent:
            self._send(task)

    def item_is_late(self, item: Item) -> None:
        """Do nothing more: the item was covered when it came."""

    def replica_replied(self, item: Item, outputs: Array) -> None:
        """Need no reply to the item itself: only coded tasks are decoded."""

    def suspect_stalled(self, now_s: float, limit_s: float) -> None:
        """Leave stalled workers to the gateway: they are its replicas."""

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
