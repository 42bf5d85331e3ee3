"""The seam of every code: answers from some of the replies.

A *code* turns items into primary tasks (the items themselves, where the code is systematic) and spare tasks, and turns
whatever replies are in into answers. It is pure: no clock, no I/O, no processes. Laws, tested over every code:

- a further reply never takes an answer away, and never makes an exact answer approximate;
- the order of replies does not matter (replies are a mapping, so there is no order to depend on);
- with all primaries in, every item is answered exactly (systematic codes);
- after any loss for which `survives` is true, every item is answered.

An answer says how it is known, so that an approximate answer is never passed off as an exact one.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from math import exp
from typing import Literal

import numpy as np

from evenkeel.arrays import Array

__all__ = ["Answer", "Code", "Source", "Task", "confidence", "softmax"]

# Up to so many classes plain Python is faster than numpy, by ten times for ten of them; it is on every item's path.
_FEW = 50
Source = Literal["exact", "collage", "hedge", "edge", "decoded", "default"]


@dataclass(frozen=True, slots=True)
class Task:
    """What one worker is sent.

    Attributes:
        inputs: `[rows, ...]`, one row for each pass of the model that runs it.
        covers: numbers of the items in the group that the task can help to answer.
    """

    inputs: Array
    covers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the user gets for one item: scores `[classes]`, how they are known, and how sure (0..1)."""

    scores: Array
    source: Source
    confidence: float


class Code(ABC):
    """Answers from some of the replies; see the module's laws.

    Attributes:
        name: short name for tables and configuration.
        most_items: how many items one group may hold.
        model: the model that runs the spare tasks.
        systematic: primary tasks are the items themselves, so that their replies are exact answers.
        uses_primaries: decoding a spare needs primary replies too (parity), so it is worth trying again at each.
        min_confidence: answers of spares that are less sure are not good enough to be used.
    """

    name: str
    most_items: int
    model: str
    systematic: bool = True
    uses_primaries: bool = False
    min_confidence: float = 0.0

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

    def primaries(self, items: Sequence[Array]) -> list[Task]:
        """One task for each item."""
        return [Task(item[None], (number,)) for number, item in enumerate(items)]

    @abstractmethod
    def spares(self, prepared: Sequence[Array]) -> list[Task]:
        """Spare tasks for a group of 1..most_items *prepared* items.

        Raises:
            CodeError: no items, too many, or shapes that do not fit.
        """

    def encode(self, items: Sequence[Array]) -> list[Task]:
        """All tasks of a group: primaries first, spares behind; a task's place in the list is its number."""
        return self.primaries(items) + self.spares([self.prepare(item) for item in items])

    @abstractmethod
    def decode(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Every answer that can be told so far: item number -> answer.

        Args:
            count: how many items the group holds.
            replies: task number -> what its worker gave, `[rows, ...]`.

        Raises:
            CodeError: a reply whose shape or values no worker of this code may give.
        """

    @abstractmethod
    def survives(self, count: int, lost: Set[int]) -> bool:
        """True when the code claims to answer all `count` items of a group although the tasks `lost` never reply."""


def softmax(scores: Array, temperature: float = 1.0) -> Array:
    """Probabilities of the last axis of logits, sharpened or softened by `temperature`."""
    shifted = np.asarray(scores, dtype=np.float64) / temperature
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    probabilities: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities


def confidence(scores: Array, temperature: float = 1.0) -> float:
    """Highest probability that one item's logits give after calibration."""
    if scores.size > _FEW:
        return float(softmax(scores, temperature).max())
    logits = scores.tolist()
    largest = max(logits)
    # The largest term of the softmax is exp(0), so its share is one over the sum.
    return 1.0 / sum([exp((logit - largest) / temperature) for logit in logits])
