"""States what the gateway asks of spares, the workers that may answer an item besides the replica it was sent to.

There is always one `Spares` object, so that the gateway never asks whether there is one, or of which kind. A new way to
dispatch spares is one more subclass, made in `spare_kinds.py`.
"""

from abc import ABC, abstractmethod

from evenkeel.arrays import Array
from evenkeel.serving.gateway.item import Item

__all__ = ["NoSpares", "Spares"]


class Spares(ABC):
    """Covers items with coded tasks, and reports every answer that those tell.

    Attributes:
        sends_items: True when each item also goes to a replica by itself; False when covered items are only coded.
    """

    sends_items: bool = True

    @abstractmethod
    def cover(self, item: Item, now_s: float) -> None:
        """Take a new item into account, and set the times at which it counts as late or is hedged."""

    @abstractmethod
    def item_is_late(self, item: Item) -> None:
        """Cover an item that was not worth a spare before it was late."""

    @abstractmethod
    def replica_replied(self, item: Item, outputs: Array) -> None:
        """Use a replica's own reply, `[1, classes]`, where decoding the item's group needs it."""

    @abstractmethod
    def forget(self, item: Item) -> None:
        """Cover the item no longer; its user has an answer, or is gone. Items never covered are ignored."""

    @abstractmethod
    def may_answer(self, item: Item) -> bool:
        """True while a spare is at work on the item, or will be as soon as it is idle."""

    @abstractmethod
    def room(self, most: int) -> int:
        """Items that could be answered exactly with no replica there, if each worker may hold `most`."""

    @abstractmethod
    def stand_in(self, item: Item) -> None:
        """Do what a replica would do for the item, if possible: there is none that can be asked."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """True while any worker of its own has a task."""

    @abstractmethod
    def wake(self) -> None:
        """Go on with what waits: a worker may have become idle or ready."""

    @abstractmethod
    def sweep(self, now_s: float, stall_s: float) -> None:
        """Have workers of its own examined that have been at one group for longer than `stall_s`; drop lost tasks."""


class NoSpares(Spares):
    """Covers nothing: only replicas answer."""

    def cover(self, item: Item, now_s: float) -> None:
        """Leave the item to its replica."""

    def forget(self, item: Item) -> None:
        """Have kept nothing of it."""

    def item_is_late(self, item: Item) -> None:
        """Leave the late item to its hedge."""

    def replica_replied(self, item: Item, outputs: Array) -> None:
        """Need no reply."""

    def wake(self) -> None:
        """Have nothing to go on with."""

    def sweep(self, now_s: float, stall_s: float) -> None:
        """Have no workers of its own."""

    def may_answer(self, item: Item) -> bool:
        """Never answer."""
        return False

    def room(self, most: int) -> int:
        """Have none."""
        return 0

    def stand_in(self, item: Item) -> None:
        """Do nothing: the item waits for a replica."""

    busy = False
