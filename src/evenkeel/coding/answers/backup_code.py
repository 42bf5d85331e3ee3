"""Defines what a code has besides, whose spare tasks a model on a backup runs."""

from abc import abstractmethod
from collections.abc import Hashable, Sequence

from evenkeel.arrays import Array
from evenkeel.coding.code import Code, Task

__all__ = ["BackupCode"]


class BackupCode(Code):
    """Is a code whose spare tasks a model on a backup runs; items wait in the form that `prepare` makes.

    Attributes:
        model: the model that runs the spare tasks.
    """

    model: str

    def prepare(self, item: Array) -> Array:
        """Makes what the code keeps of an item until a group is encoded, e.g. a shrunk tile. This may take long."""
        return item

    @property
    def form(self) -> Hashable:
        """Names what `prepare` makes: codes of equal form keep the same of an item, so one may use it for the other."""
        return self.name

    def is_prepared(self, item: Array) -> bool:
        """Tells whether `prepare` has nothing to do for such an item, so that it can run on the event loop."""
        return True

    @abstractmethod
    def spares(self, prepared: Sequence[Array]) -> list[Task]:
        """Makes the spare tasks of a group of 1..max_items *prepared* items.

        Raises:
            CodeError: no items, too many, or shapes that do not fit.
        """

    def encode(self, items: Sequence[Array]) -> list[Task]:
        """Prepares the items and makes all tasks of their group."""
        return self.primaries(items) + self.spares([self.prepare(item) for item in items])
