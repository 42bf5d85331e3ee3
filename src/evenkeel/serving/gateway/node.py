"""Keeps the tasks that a worker has: each gets one reply, and has a time limit of its own.

A backend replies to every task sooner or later, but a worker that loses one reply and goes on answering pings would
keep it for ever, and the worker's slot with it. So each task has a limit, beyond which it counts as lost.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, Reply
from evenkeel.errors import BackendError, BackendLostError

__all__ = ["Attempt", "Node"]


class Attempt:
    """Holds one task at one node, from when it is sent until its reply, or its time limit.

    Attributes:
        node: where it was sent.
        item: that it is for; None for probes and coded tasks.
        since_s: when it was sent.
        blamed: it was at work when its node stopped replying, which counts once.
        expired: its time limit passed, so that its reply is no sign of life.
    """

    __slots__ = ("_given_up", "_on_reply", "blamed", "expired", "item", "limit_at", "node", "since_s", "ticket")

    def __init__(
        self,
        node: Any,  # a Node; the code that sent it knows which kind
        on_reply: "Callable[[Attempt, Reply], object]",
        item: Any,  # an Item, which knows its attempts; nothing here looks into it
        since_s: float,
        limit_at: float,
    ) -> None:
        self.node = node
        self.item = item
        self.since_s = since_s
        self.limit_at = limit_at
        self.blamed = False
        self.expired = False
        self._on_reply: Callable[[Attempt, Reply], object] | None = on_reply
        self._given_up = False
        self.ticket = 0

    def cancel(self) -> None:
        """Tells the node that nobody waits for it any more; its reply comes all the same."""
        self._given_up = True
        self.node.backend.cancel(self.ticket)

    def reply(self, reply: Reply) -> None:
        """Takes the backend's reply; drops one that comes after the time limit."""
        on_reply, self._on_reply = self._on_reply, None
        if on_reply is None:
            return
        del self.node.open[self]
        if reply.cancelled and not self._given_up:
            error = BackendError(f"{self.node.backend.name} gave up a task that nobody had cancelled")
            reply = Reply(error=error)
        self.node.done += reply.outputs is not None
        on_reply(self, reply)

    def expire(self, limit_s: float) -> None:
        """Counts it as lost: its time limit has passed."""
        self.expired = True
        self.cancel()
        # A node that lost a task which was given up has nothing to explain.
        error = BackendLostError(f"{self.node.backend.name} gave no reply to a task within {limit_s:g} s")
        self.reply(Reply(error=error))


class Node:
    """Holds a backend and the tasks that it has, oldest first.

    Args:
        backend: does the tasks.
        limit_s: longest time of one task, once those before it are done.

    Attributes:
        done: tasks that it did.
        open: tasks that it has.
    """

    __slots__ = ("_limit_s", "backend", "done", "open")

    def __init__(self, backend: Backend, limit_s: float) -> None:
        self.backend = backend
        self.done = 0
        self.open: dict[Attempt, None] = {}
        self._limit_s = limit_s

    @property
    def state(self) -> str:
        """Says how it is, in one word: `well`, or what keeps work from it."""
        return "well" if self.backend.ready else "gone"

    @property
    def at_work(self) -> list[Attempt]:
        """Gives the tasks that may be in its pass now."""
        return list(islice(self.open, self.backend.batch))

    @property
    def occupied(self) -> bool:
        """Tells whether it has work, or will have some soon."""
        return bool(self.open)

    def abandon(self) -> int:
        """Takes its tasks from it, as if none of them had begun, so that nothing is blamed; gives their number."""
        error = BackendLostError(f"{self.backend.name} leaves, and did not finish its tasks in time")
        tasks = list(self.open)
        for attempt in tasks:
            attempt.cancel()
            attempt.reply(Reply(error=error, began=False))
        return len(tasks)

    def send(
        self,
        model: str,
        inputs: Array,
        key: int,
        now_s: float,
        on_reply: Callable[[Attempt, Reply], object],
        item: Any = None,
    ) -> Attempt:
        """Sends a task and calls `on_reply` once, later."""
        limit_at = now_s + self._limit_s * (1 + len(self.open))
        attempt = Attempt(self, on_reply, item, now_s, limit_at)
        self.open[attempt] = None
        attempt.ticket = self.backend.submit(model, inputs, attempt.reply, key)
        return attempt

    def expire(self, now_s: float) -> None:
        """Counts the tasks as lost whose time limit has passed."""
        for attempt in [attempt for attempt in self.open if now_s > attempt.limit_at]:
            attempt.expire(attempt.limit_at - attempt.since_s)
