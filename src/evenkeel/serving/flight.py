"""The items of one request on their way through the gateway."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from evenkeel.coding.code import Array
from evenkeel.serving.bodies import ClientGoneError, Receive
from evenkeel.serving.gateway import Options, Outcome
from evenkeel.serving.sweeper import Sweeper

__all__ = ["Flight", "Submits"]


class Submits(Protocol):
    """What a flight needs of the gateway; `on_outcome` is called once, later, and never after a cancel."""

    @property
    def ready(self) -> bool:
        """True when an item submitted now can be answered."""

    @property
    def draining(self) -> bool:
        """True from the moment a shutdown has begun."""

    def submit(
        self, array: Array, on_outcome: Callable[[Outcome], object], options: Options = ..., key: int | None = None
    ) -> int:
        """Take one item; returns its ticket, or raises OverloadedError."""

    def cancel(self, ticket: int) -> None:
        """Give the item up."""


class Flight:
    """Submits items, waits for all of them or for the first error, and gives up what is then still open.

    Args:
        gateway: answers items.
        patience: starts to watch the client of a flight that takes long; fast ones never pay for that.
    """

    __slots__ = ("_client_gone", "_future", "_gateway", "_left", "_outcomes", "_patience", "_tickets", "_watcher")

    def __init__(self, gateway: Submits, patience: Sweeper) -> None:
        self._gateway = gateway
        self._patience = patience
        self._tickets: list[int] = []
        self._outcomes: list[Outcome | None] = []
        self._left = 0
        self._client_gone = False
        self._watcher: asyncio.Task[None] | None = None
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def fly(self, items: Array, options: Options, key: int | None, receive: Receive) -> Sequence[Outcome]:
        """Outcomes of all rows of `items`, each with an answer.

        Raises:
            EvenkeelError: the error of the first item that failed; the others are cancelled.
            ClientGoneError: the client went away; all items are cancelled.
        """
        count = len(items)
        self._left = count
        self._outcomes = [None] * count
        watch = partial(self._watch, receive)
        self._patience.add(watch)
        try:
            for row in range(count):
                row_key = None if key is None else key + row
                self._tickets.append(self._gateway.submit(items[row], partial(self._done, row), options, row_key))
            await self._future
        finally:
            self._patience.remove(watch)
            if self._watcher is not None:
                self._watcher.cancel()
            if self._left:
                for row, ticket in enumerate(self._tickets):
                    if self._outcomes[row] is None:
                        self._gateway.cancel(ticket)
        outcomes = [outcome for outcome in self._outcomes if outcome is not None]
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        if self._client_gone:
            raise ClientGoneError
        return outcomes

    def _done(self, row: int, outcome: Outcome) -> None:
        self._outcomes[row] = outcome
        self._left -= 1
        if (not self._left or outcome.error is not None) and not self._future.done():
            self._future.set_result(None)

    def _watch(self, receive: Receive) -> None:
        self._watcher = asyncio.ensure_future(self._wait_for_disconnect(receive))

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        # The body is complete, so this waits until the client goes away or the response is out.
        if (await receive())["type"] != "http.disconnect":
            return
        self._client_gone = True
        if not self._future.done():
            self._future.set_result(None)
