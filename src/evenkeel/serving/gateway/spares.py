"""Defines what the gateway needs of spares: workers that may answer an item besides its replica.

There is always one `Spares` object, so that the gateway never asks whether there is one, or of which kind. A new way to
dispatch spares is one more subclass, made in `spare_kinds.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend
from evenkeel.errors import ConfigurationError
from evenkeel.serving.gateway.item import Item
from evenkeel.serving.gateway.node import Node

__all__ = ["NoSpares", "Spares"]


class Spares(ABC):
    """Covers items with coded tasks, and reports every answer that follows from the replies.

    Attributes:
        sends_items: True when each item also goes to a replica by itself; False when covered items are only coded.
    """

    sends_items: bool = True

    @property
    def nodes(self) -> Sequence[Node]:
        """Gives the workers of its own."""
        return ()

    @property
    def answers_alone(self) -> bool:
        """Tells whether it can answer any item without a replica, if need be less surely than was wanted."""
        return False

    @abstractmethod
    def cover(self, item: Item, now_s: float) -> None:
        """Takes a new item into account, and sets the times at which it counts as late or is hedged."""

    @abstractmethod
    def item_is_late(self, item: Item) -> None:
        """Covers an item that was not worth a spare before it was late."""

    @abstractmethod
    def replica_replied(self, item: Item, outputs: Array) -> None:
        """Uses a replica's own reply, `[1, classes]`, where decoding the item's group needs it."""

    @abstractmethod
    def forget(self, item: Item) -> None:
        """Covers the item no longer: its user has an answer, or is gone. Ignores items that were never covered."""

    @abstractmethod
    def may_answer(self, item: Item) -> bool:
        """Tells whether a spare is at work on the item, or will be as soon as it is idle."""

    @abstractmethod
    def room(self, limit: int) -> int:
        """Counts the items that spares could answer exactly without replicas, if each worker may hold `limit`."""

    @abstractmethod
    def stand_in(self, item: Item) -> None:
        """Does what a replica would do for the item, if possible: no replica can take it."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Tells whether any worker of its own has a task."""

    @abstractmethod
    def wake(self) -> None:
        """Goes on with what waits: a worker may have become idle or ready."""

    @abstractmethod
    def sweep(self, now_s: float, stall_s: float) -> None:
        """Handles workers of its own that have been at one group for longer than `stall_s`, and drops lost tasks."""

    def check_add(self, name: str) -> None:
        """Raises an error unless a worker of its own, of that name, may be added.

        Raises:
            ConfigurationError: it has none.
        """
        raise ConfigurationError(
            f"{name} cannot join: this gateway began without backups, or its policy has no use for them"
        )

    def add(self, backend: Backend) -> None:
        """Takes in one more worker of its own; raises as `check_add`."""
        self.check_add(backend.name)

    def retire(self, node: Node) -> None:
        """Gives a worker of its own no more work."""
        raise LookupError(node)

    def remove(self, node: Node) -> None:
        """Lets go of a worker that was retired."""
        raise LookupError(node)


class NoSpares(Spares):
    """Covers nothing: only replicas answer."""

    def cover(self, item: Item, now_s: float) -> None:
        """Leaves the item to its replica."""

    def forget(self, item: Item) -> None:
        """Does nothing: nothing of it was kept."""

    def item_is_late(self, item: Item) -> None:
        """Leaves the late item to its hedge."""

    def replica_replied(self, item: Item, outputs: Array) -> None:
        """Needs no reply."""

    def wake(self) -> None:
        """Does nothing: nothing waits here."""

    def sweep(self, now_s: float, stall_s: float) -> None:
        """Does nothing: it has no workers of its own."""

    def may_answer(self, item: Item) -> bool:
        """Gives False: it never answers."""
        return False

    def room(self, limit: int) -> int:
        """Gives 0."""
        return 0

    def stand_in(self, item: Item) -> None:
        """Does nothing: the item waits for a replica."""

    busy = False
