"""Makes further copies of the items the spare tasks, which the user's own model runs."""

from collections.abc import Mapping, Sequence, Set

import numpy as np

from evenkeel.arrays import Array
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.checks import at_least_one, check_count, check_group, check_numbers
from evenkeel.coding.code import Answer, Task

__all__ = ["Replicate"]


class Replicate(BackupCode):
    """Makes `copies` further tasks for each item, so that every answer is exact.

    Copy c of item i is task `count * (1 + c) + i`. With `max_items=1` and one copy it is the 1x1 pass of an elastic
    backup that holds the replicas' own model.

    Args:
        scores: how the model's scores are to be read.
        model: name of the user's own model.
        copies: spare tasks for each item.
        max_items: how many items one group may hold.
    """

    def __init__(self, scores: ScoreForm, *, model: str = "classifier", copies: int = 1, max_items: int = 1) -> None:
        self.scores = scores
        self.model = model
        self.copies = at_least_one("copies", copies)
        self.max_items = at_least_one("max_items", max_items)
        self.name = "replicate" if copies == 1 else f"replicate{copies}"

    def spares(self, prepared: Sequence[Array]) -> list[Task]:
        """Makes `copies` tasks of one item for each item."""
        check_group(prepared, self.max_items)
        return [Task(item[None], (number,)) for _ in range(self.copies) for number, item in enumerate(prepared)]

    def decode(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Answers each item by the lowest-numbered copy that is in."""
        check_count(count, self.max_items)
        check_numbers(replies, count * (1 + self.copies))
        known: dict[int, Answer] = {}
        for number in sorted(replies):
            scores = self.scores.rows(number, replies[number], 1)[0]
            if number % count not in known and np.isfinite(scores).all():
                known[number % count] = self.scores.answer(scores)
        return known

    def survives(self, count: int, lost: Set[int]) -> bool:
        """Survives as long as every item keeps one copy."""
        return all(any(item + count * copy not in lost for copy in range(1 + self.copies)) for item in range(count))
