"""Defines what every code does: it answers from some of the replies.

A *code* turns items into primary tasks (the items themselves, where the code is systematic) and spare tasks, and turns
whatever replies are in into answers. It is pure: no clock, no I/O, no processes. Laws, tested over every code:

- a further reply never takes an answer away, and never makes an exact answer approximate;
- the order of replies does not matter (replies are a mapping, so there is no order to depend on);
- with all primaries in, every item is answered exactly (systematic codes);
- after any loss for which `survives` is true, every item is answered.

An answer says how it is known, so that an approximate answer is never passed off as an exact one. Nothing here knows
what the numbers mean: what classifiers' scores need is in `answers/scores.py`, what a gateway needs of a code that its
backups run is in `answers/backup_code.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from evenkeel.arrays import Array

__all__ = ["Answer", "Code", "Source", "Task", "path_of"]

Source = Literal["exact", "collage", "hedge", "concealed", "edge", "degraded", "decoded", "default"]


def path_of(source: str) -> str:
    """Gives the path of an answer from `source`: `data centre` where a replica did it, else the source itself."""
    return "data centre" if source in ("exact", "hedge", "concealed") else source


@dataclass(frozen=True, slots=True)
class Task:
    """Holds what one worker is sent.

    Attributes:
        inputs: `[rows, ...]`, one row for each pass of the model that runs it.
        covers: numbers of the items in the group that the task can help to answer.
    """

    inputs: Array
    covers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Holds what the user gets for one item.

    Attributes:
        value: what a task's row would have given for the item, `[...]`: a classifier's scores, a gradient.
        source: how it is known.
        confidence: how sure it is, 0..1; 1 where the code computes it and does not guess.
    """

    value: Array
    source: Source
    confidence: float


class Code(ABC):
    """Gives answers from some of the replies; see the module's laws.

    Attributes:
        name: short name for tables and configuration.
        max_items: how many items one group may hold.
        systematic: primary tasks are the items themselves, so that their replies are exact answers.
        uses_primaries: decoding a spare needs primary replies too (parity), so it is worth trying again at each.
        min_confidence: answers of spares that are less sure are not good enough to be used.
    """

    name: str
    max_items: int
    systematic: bool = True
    uses_primaries: bool = False
    min_confidence: float = 0.0

    def primaries(self, items: Sequence[Array]) -> list[Task]:
        """Makes one task for each item."""
        return [Task(item[None], (number,)) for number, item in enumerate(items)]

    @abstractmethod
    def spares(self, items: Sequence[Array]) -> list[Task]:
        """Makes the spare tasks of a group of 1..max_items items.

        Raises:
            CodeError: no items, too many, or shapes that do not fit.
        """

    def encode(self, items: Sequence[Array]) -> list[Task]:
        """Makes all tasks of a group: primaries first, then spares; a task's place in the list is its number."""
        return self.primaries(items) + self.spares(items)

    @abstractmethod
    def decode(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Gives every answer that the replies so far allow: item number -> answer.

        Args:
            count: how many items the group holds.
            replies: task number -> what its worker gave, `[rows, ...]`.

        Raises:
            CodeError: a reply whose shape or values no worker of this code may give.
        """

    @abstractmethod
    def survives(self, count: int, lost: Set[int]) -> bool:
        """Tells whether the code answers all `count` items of a group although the tasks `lost` never reply."""
