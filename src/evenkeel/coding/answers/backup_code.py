"""Adds to a code what a gateway must know to have its spare tasks run by a model on a backup."""

from abc import abstractmethod
from collections.abc import Hashable, Sequence

from evenkeel.arrays import Array
from evenkeel.coding.code import Code, Task

__all__ = ["BackupCode"]


class BackupCode(Code):
    """A code whose spare tasks a model runs, on items that wait in a form of their own.

    Attributes:
        model: the model that runs the spare tasks.
    """

    model: str

    def prepare(self, item: Array) -> Array:
        """What the code keeps of an item until a group is encoded, e.g. a shrunk tile. May take long."""
        return item

    @property
    def form(self) -> Hashable:
        """Names what `prepare` makes: codes of equal form keep the same of an item, so one may use it for the other."""
        return self.name

    def is_prepared(self, item: Array) -> bool:
        """True when `prepare` has nothing to do for such an item, so that it need not leave the event loop."""
        return True

    @abstractmethod
    def spares(self, prepared: Sequence[Array]) -> list[Task]:
        """Spare tasks for a group of 1..max_items *prepared* items.

        Raises:
            CodeError: no items, too many, or shapes that do not fit.
        """

    def encode(self, items: Sequence[Array]) -> list[Task]:
        """All tasks of a group of items, which are prepared here."""
        return self.primaries(items) + self.spares([self.prepare(item) for item in items])
