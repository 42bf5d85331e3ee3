"""Asks a light model first; what it is not sure of goes to the replicas, which hold the accurate one."""

from collections.abc import Callable, Sequence

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend
from evenkeel.promises.promise import NEVER
from evenkeel.serving.gateway.backups import Backups
from evenkeel.serving.gateway.item import Item
from evenkeel.serving.gateway.node import Node
from evenkeel.serving.gateway.spares import Spares

__all__ = ["LightFirst"]


class LightFirst(Spares):
    """Gives every item to the light model, unless its request wants more than that can give.

    Args:
        light: workers that hold the light model, and run a cascade's code.
        escalate: sends an item to a replica.
    """

    sends_items = False

    def __init__(self, light: Backups, escalate: Callable[[Item], object]) -> None:
        self._light = light
        self._escalate = escalate

    @property
    def answers_alone(self) -> bool:
        """Tells whether a light worker is there."""
        return self._light.any_ready

    def cover(self, item: Item, now_s: float) -> None:
        """Hands the item to the light model, or to a replica where that could not answer it."""
        if item.exact:
            return  # a replica has it
        item.late_at = item.hedge_at = float("inf")
        # An audited item is for both, also where the light model's answer will not be used; and where that may be used
        # in place of none, it must be there before the replica is late.
        wanted = item.min_confidence < NEVER or item.audited or item.degrade
        if not (wanted and self._light.any_ready):
            self._escalate(item)
        else:
            self._light.take(item)

    def item_is_late(self, item: Item) -> None:
        """Does nothing more: the item was covered when it came."""

    def replica_replied(self, item: Item, outputs: Array) -> None:
        """Needs no reply."""

    def forget(self, item: Item) -> None:
        """Takes the item from those that wait."""
        self._light.forget(item)

    def may_answer(self, item: Item) -> bool:
        """Tells whether the light model has the item and no replica was asked because it was not sure."""
        return not item.unsure and self._light.may_answer(item)

    def room(self, limit: int) -> int:
        """Gives the light model's room: what it is sure of needs no replica."""
        return self._light.waiting_room(limit)

    def stand_in(self, item: Item) -> None:
        """Has the light model answer, if it was not asked yet."""
        wanted = item.min_confidence < NEVER or item.degrade
        if wanted and not item.exact and not item.unsure and not item.passes:
            self._light.take(item)

    @property
    def nodes(self) -> Sequence[Node]:
        """Gives the light workers."""
        return self._light.nodes

    def check_add(self, name: str) -> None:
        """Takes any."""

    def add(self, backend: Backend) -> None:
        """Takes in one more light worker."""
        self._light.add(backend)

    def retire(self, node: Node) -> None:
        """Gives a light worker no more work."""
        self._light.retire(node)

    def remove(self, node: Node) -> None:
        """Lets go of a light worker that was retired."""
        self._light.remove(node)

    @property
    def busy(self) -> bool:
        """Tells whether any light worker has a task."""
        return self._light.busy

    def wake(self) -> None:
        """Gives waiting items to light workers that have become idle or ready."""
        self._light.wake()

    def sweep(self, now_s: float, stall_s: float) -> None:
        """Looks after the light workers."""
        self._light.sweep(now_s, stall_s)
