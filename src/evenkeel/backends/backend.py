"""Defines a backend, something that does tasks: the interface of workers, remote servers and fakes.

Laws, tested over every backend:

- each `submit` is followed by exactly one call of `on_reply`, never from inside `submit`, always on the event loop's
  thread, whatever happens to the worker (a lost connection, a crash, a close);
- after `cancel` the reply comes all the same: a task that had not begun replies with a `cancelled` error soon, one
  that had begun may reply with its result. So a slot is never lost and never counted twice;
- `ready` is false when a task submitted now could not be done, and `on_change` is called whenever it changes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from evenkeel.arrays import Array
from evenkeel.errors import BackendError

__all__ = ["TRACEPARENT", "Backend", "OnReply", "Reply"]

# Set, in W3C's form, while a task is submitted that is part of a trace; backends whose protocol has a place for it
# send it.
TRACEPARENT: ContextVar[str] = ContextVar("traceparent", default="")


@dataclass(frozen=True, slots=True)
class Reply:
    """Holds what came back for one task: outputs `[rows, ...]`, or the error that says why there are none.

    `cancelled` marks the reply of a task that was given up before it began. `service_s` is the time the worker itself
    spent on the task, where it says so. `began` is false when the worker cannot have been at work on a task that it
    failed to do, so that the task cannot be the reason. `lost` is the share of the inputs that did not arrive and
    that the worker made do without.
    """

    outputs: Array | None = None
    error: BackendError | None = None
    cancelled: bool = False
    service_s: float | None = None
    began: bool = True
    lost: float = 0.0


OnReply = Callable[[Reply], object]


class Backend(ABC):
    """Does tasks, one ticket each; see the module's laws.

    Attributes:
        name: unique in a gateway, for records and metrics.
        address: where its worker is reached, without a password; empty where it has no address.
        on_change: called without arguments whenever `ready` may have changed; set by the gateway.
        managed: its worker is there because the gateway had it started, and ends with `close`.
        serial: it takes one task at a time, first in first out, so that the time between two replies is service time.
    """

    name: str
    address: str = ""
    managed: bool = False
    serial: bool = True

    @property
    def batch(self) -> int:
        """Gives the number of tasks that one pass may hold: so many of the oldest may be at work at once."""
        return 1

    on_change: Callable[[], object] = staticmethod(lambda: None)

    @property
    @abstractmethod
    def ready(self) -> bool:
        """True when a task submitted now can be done."""

    @property
    def why_not(self) -> str:
        """Says why it is not ready, where it knows."""
        return ""

    @abstractmethod
    def submit(self, model: str, inputs: Array, on_reply: OnReply, key: int = 0) -> int:
        """Sends one task; returns its ticket.

        Args:
            model: which of the backend's models runs it.
            inputs: `[rows, ...]` in that model's layout.
            on_reply: called once with the reply.
            key: names the piece of work (not the attempt) so that injected delays can be the same under every policy;
                backends without injected delays ignore it.
        """

    @abstractmethod
    def cancel(self, ticket: int) -> None:
        """Gives the task up; unknown and finished tickets are ignored."""

    def suspect(self) -> None:  # noqa: B027 - not every backend can look after itself
        """Hears that the gateway finds it stalled; a backend that can check if its worker is frozen should do so."""

    async def start(self) -> None:  # noqa: B027 - most fakes have nothing to start
        """Connects, and returns when the backend is ready, or raises BackendError."""

    async def close(self) -> None:  # noqa: B027
        """Lets go of everything; open tickets get a BackendLostError."""
