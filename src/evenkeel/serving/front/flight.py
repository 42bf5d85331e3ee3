"""Carries the items of one request through the gateway."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from evenkeel.arrays import Array
from evenkeel.errors import EvenkeelError
from evenkeel.serving.gateway.gateway import Options, Outcome

__all__ = ["Flight", "Submits"]


class Submits(Protocol):
    """Does what a flight needs of the gateway; `on_outcome` is called once, later, and never after a cancel."""

    @property
    def ready(self) -> bool:
        """True when an item submitted now can be answered."""

    @property
    def in_flight(self) -> int:
        """Counts the items that have no answer yet."""

    @property
    def max_items(self) -> int:
        """Gives the number of items that may ever be taken at once."""

    @property
    def deadline_s(self) -> float:
        """Gives the seconds that a request may take in all."""

    def check_room(self, count: int) -> None:
        """Raises TooLargeError or OverloadedError when that many items, more than one, would not all be taken."""

    def submit(
        self, array: Array, on_outcome: Callable[[Outcome], object], options: Options = ..., key: int | None = None
    ) -> int:
        """Takes one item; returns its ticket, or raises OverloadedError."""

    def cancel(self, ticket: int) -> None:
        """Gives the item up."""

    def start_draining(self) -> None:
        """Reports not ready from now on; what is submitted is still answered."""


class Flight:
    """Submits items, and tells when all of them are answered or the first has failed; then the others are given up.

    Args:
        gateway: answers items.
        landed: called with the outcomes of all items, in their order, each with an answer.
        failed: called with the first error instead.
    """

    __slots__ = ("_failed", "_gateway", "_landed", "_left", "_outcomes", "_tickets")

    def __init__(
        self,
        gateway: Submits,
        landed: Callable[[Sequence[Outcome]], object],
        failed: Callable[[EvenkeelError], object],
    ) -> None:
        self._gateway = gateway
        self._landed = landed
        self._failed = failed
        self._tickets: list[int] = []
        self._outcomes: list[Outcome | None] = []
        self._left = 0

    def start(self, items: Array, options: Options, key: int | None) -> None:
        """Submits the rows of `items`.

        Args:
            items: `[n, ...]`, n >= 1.
            options: of each.
            key: of the first; the others' follow.

        Raises:
            TooLargeError: more than are ever taken at once; none was submitted.
            OverloadedError: there is no room for all; none is left submitted.
        """
        count = self._left = len(items)
        submit = self._gateway.submit
        if count == 1:
            self._tickets.append(submit(items[0], self._only, options, key))
            return
        self._gateway.check_room(count)
        self._outcomes = [None] * count
        try:
            for row in range(count):
                row_key = None if key is None else key + row
                self._tickets.append(submit(items[row], partial(self._done, row), options, row_key))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Gives up the items that are not answered yet; nothing is called any more."""
        if not self._left:
            return
        self._left = 0
        # One item alone has no place for its outcome: with it, nothing would be left.
        outcomes = self._outcomes or [None]
        for ticket, outcome in zip(self._tickets, outcomes, strict=False):
            if outcome is None:
                self._gateway.cancel(ticket)

    def _only(self, outcome: Outcome) -> None:
        self._left = 0
        if outcome.error is None:
            self._landed((outcome,))
        else:
            self._failed(outcome.error)

    def _done(self, row: int, outcome: Outcome) -> None:
        self._outcomes[row] = outcome
        if outcome.error is not None:
            self.cancel()
            self._failed(outcome.error)
            return
        self._left -= 1
        if not self._left:
            self._landed([outcome for outcome in self._outcomes if outcome is not None])
