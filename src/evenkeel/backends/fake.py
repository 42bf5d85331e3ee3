"""Answers from a function, without workers, at once or when its script says so."""

from collections.abc import Callable

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, OnReply, Reply
from evenkeel.clock import Clock
from evenkeel.errors import BackendError, BackendLostError

__all__ = ["FakeBackend"]


class FakeBackend(Backend):
    """Replies at once with `answer(model, inputs)`; can be frozen, thawed, killed and restored.

    Args:
        name: its name.
        clock: where replies are called from.
        answer: (model, inputs `[rows, ...]`) -> outputs `[rows, ...]`; a BackendError it raises becomes the reply.
    """

    def __init__(self, name: str, clock: Clock, answer: Callable[[str, Array], Array]) -> None:
        self.name = name
        self._clock = clock
        self._answer = answer
        self._open: dict[int, tuple[str, Array, OnReply]] = {}
        self._given_up: set[int] = set()
        self._next_ticket = 0
        self._alive = True
        self._frozen = False
        self.suspected = 0

    @property
    def ready(self) -> bool:
        """True until `kill`, and again after `restore`."""
        return self._alive

    def submit(self, model: str, inputs: Array, on_reply: OnReply, key: int = 0) -> int:
        """Takes a task; its reply is due at once, or after `thaw`."""
        ticket = self._next_ticket
        self._next_ticket += 1
        self._open[ticket] = (model, inputs, on_reply)
        self._clock.call_soon(self._work, ticket)
        return ticket

    def cancel(self, ticket: int) -> None:
        """Gives the task up; it has not begun as long as it is open. A frozen worker says so when it thaws."""
        if ticket in self._open:
            self._given_up.add(ticket)
            self._clock.call_soon(self._work, ticket)

    def suspect(self) -> None:
        """Counts that the gateway found it stalled."""
        self.suspected += 1

    def freeze(self) -> None:
        """Stops replying, like a process that got SIGSTOP."""
        self._frozen = True

    def thaw(self) -> None:
        """Goes on, and sends the replies that were held back."""
        self._frozen = False
        for ticket in list(self._open):
            self._clock.call_soon(self._work, ticket)

    def kill(self) -> None:
        """Loses everything that is open, and is gone. It was at work on the oldest task."""
        self._alive = False
        self._frozen = False
        tasks, self._open = self._open, {}
        self._given_up.clear()
        for place, (_, _, on_reply) in enumerate(tasks.values()):
            lost = Reply(error=BackendLostError(f"{self.name} was killed"), began=not place)
            self._clock.call_soon(on_reply, lost)
        self.on_change()

    def restore(self) -> None:
        """Makes it ready again."""
        self._alive = True
        self.on_change()

    async def close(self) -> None:
        """Loses everything that is open."""
        self.kill()

    def _work(self, ticket: int) -> None:
        if self._frozen or ticket not in self._open:
            return
        model, inputs, on_reply = self._open.pop(ticket)
        if not self._alive:
            on_reply(Reply(error=BackendLostError(f"{self.name} is dead"), began=False))
            return
        if ticket in self._given_up:
            self._given_up.remove(ticket)
            on_reply(Reply(error=BackendError("cancelled"), cancelled=True))
            return
        try:
            outputs = self._answer(model, inputs)
        except BackendError as error:
            on_reply(Reply(error=error))
            return
        on_reply(Reply(outputs))
