"""Delays a backend on purpose: wraps it and makes it a single worker with a law of delays."""

from collections.abc import Mapping

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, OnReply, Reply
from evenkeel.clock import Clock, Timer
from evenkeel.delays.laws import Delay
from evenkeel.errors import BackendError, BackendLostError

__all__ = ["Delayed"]


class _DelayedTask:
    __slots__ = ("begun", "held", "inputs", "key", "model", "on_reply", "until_s")

    def __init__(self, model: str, inputs: Array, on_reply: OnReply, key: int) -> None:
        self.model, self.inputs, self.on_reply, self.key = model, inputs, on_reply, key
        self.begun = False
        self.until_s = 0.0
        self.held: Timer | None = None  # set while a reply is held back


class Delayed(Backend):
    """Runs one task at a time, first in first out; each takes at least as long as the law says, from when it began.

    A task that has begun cannot be stopped, as with a real pass; one that waits can. When the wrapped backend
    is lost, so is the task at work, although its reply may be in already and only held back.

    Args:
        inner: does the tasks.
        clock: where to wait.
        delay: how long tasks take.
        worker: this worker's number, for laws in which workers differ.
        costs: model -> its cost relative to what the law speaks of.
    """

    serial = True

    def __init__(
        self, inner: Backend, clock: Clock, delay: Delay, worker: int = 0, costs: Mapping[str, float] | None = None
    ) -> None:
        self.name = inner.name
        self._inner = inner
        self._clock = clock
        self._delay = delay
        self._worker = worker
        self._costs = costs or {}
        self._tasks: dict[int, _DelayedTask] = {}  # in order of arrival; the first is the one at work
        self._next_ticket = 0
        self._epoch_s = clock.time()  # laws count time from the beginning of the experiment
        inner.on_change = self._changed

    @property
    def ready(self) -> bool:
        """True when the wrapped backend is ready."""
        return self._inner.ready

    def submit(self, model: str, inputs: Array, on_reply: OnReply, key: int = 0) -> int:
        """Queues a task."""
        ticket = self._next_ticket
        self._next_ticket += 1
        self._tasks[ticket] = _DelayedTask(model, inputs, on_reply, key)
        if len(self._tasks) == 1:
            self._begin()
        return ticket

    def cancel(self, ticket: int) -> None:
        """Gives a task up that has not begun."""
        task = self._tasks.get(ticket)
        if task is not None and not task.begun:
            del self._tasks[ticket]
            self._clock.call_soon(task.on_reply, Reply(error=BackendError("cancelled"), cancelled=True))

    def suspect(self) -> None:
        """Passes the call on."""
        self._inner.suspect()

    async def start(self) -> None:
        """Starts the wrapped backend."""
        await self._inner.start()

    async def close(self) -> None:
        """Closes the wrapped backend; what waits is lost with it."""
        await self._inner.close()

    def _begin(self) -> None:
        ticket, task = next(iter(self._tasks.items()))
        task.begun = True
        now = self._clock.time()
        seconds = self._delay.draw(task.key, self._worker, now - self._epoch_s) * self._costs.get(task.model, 1.0)
        task.until_s = now + seconds
        self._inner.submit(task.model, task.inputs, lambda reply: self._replied(ticket, task, reply), task.key)

    def _replied(self, ticket: int, task: _DelayedTask, reply: Reply) -> None:
        if reply.error is not None or self._clock.time() >= task.until_s:
            self._end(ticket, task, reply)
        else:
            task.held = self._clock.call_at(task.until_s, self._end, ticket, task, reply)

    def _end(self, ticket: int, task: _DelayedTask, reply: Reply) -> None:
        del self._tasks[ticket]
        if self._tasks:
            self._begin()
        task.on_reply(reply)

    def _changed(self) -> None:
        if self._tasks and not self._inner.ready:
            ticket, task = next(iter(self._tasks.items()))
            if task.held is not None:
                task.held.cancel()
                task.held = None
                lost = Reply(error=BackendLostError(f"{self.name} was lost before its reply was due"))
                self._clock.call_soon(self._end, ticket, task, lost)
        self.on_change()
