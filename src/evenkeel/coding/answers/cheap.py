"""Runs a small model on the items themselves: what every coded backup must be compared with."""

from collections.abc import Mapping, Sequence, Set

import numpy as np

from evenkeel.arrays import Array
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.checks import at_least_one, check_count, check_group, check_numbers
from evenkeel.coding.code import Answer, Task

__all__ = ["Cheap"]


class Cheap(BackupCode):
    """Makes one spare task for a group: the items as a batch of `count` rows for a small model.

    The reply holds scores `[count, classes]`; answers have source "decoded". It costs one pass of the small model for
    each item, where a collage costs one pass for the group. Source: the approximate-backup baseline of ParM.

    Args:
        max_items: how many items one group may hold.
        scores: how the small model's scores are to be read.
        model: name of the small model, which takes items as the replicas do.
    """

    def __init__(self, max_items: int, scores: ScoreForm, *, model: str = "cheap") -> None:
        self.max_items = at_least_one("max_items", max_items)
        self.scores = scores
        self.model = model
        self.name = "cheap"

    def spares(self, prepared: Sequence[Array]) -> list[Task]:
        """Makes one task with a row for each item."""
        check_group(prepared, self.max_items)
        return [Task(np.stack(prepared), tuple(range(len(prepared))))]

    def decode(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Gives exact answers where a primary is in, the small model's elsewhere."""
        check_count(count, self.max_items)
        check_numbers(replies, count + 1)
        known: dict[int, Answer] = {}
        spare = replies.get(count)
        if spare is not None:
            known = self._answers(self.scores.rows(count, spare, count))
        if len(replies) > (spare is not None):
            known.update(self.scores.exact_answers(count, replies))
        return known

    def survives(self, count: int, lost: Set[int]) -> bool:
        """Survives any loss of primaries as long as the small model's reply is in."""
        return count not in lost or not any(number in lost for number in range(count))

    def _answers(self, rows: Array) -> dict[int, Answer]:
        """Gives an answer for each row of the small model's scores that is finite."""
        return self.scores.answers(rows, "decoded")
