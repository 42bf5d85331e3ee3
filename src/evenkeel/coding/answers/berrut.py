"""Mixes items for the user's own model and interpolates the answers (Berrut, ApproxIFER); nothing is trained.

Source: Soleymani, Ali, Avestimehr, Mahdavifar, ApproxIFER, AAAI 2022, and the authors' public code. With K items x_j at
the Chebyshev points of the first kind, a_j = cos((2j+1) pi / 2K), the encoder is Berrut's interpolant

    u(z) = sum_j w_j(z) x_j,    w_j(z) = (-1)^j / (z - a_j)  /  sum_i (-1)^i / (z - a_i)

and worker n of N = K + S gets u(b_n) at the points of the second kind, b_n = cos(n pi / (N - 1)). The decoder is the
same interpolant through the replies that are in, evaluated at a_j, with the signs alternating over *those* points:
only then has the interpolant no poles.

Weights sum to one, so it makes no difference whether pixels are normalised before or inside the model. Where a point of
one kind falls on one of the other (K=3, S=2: both have 0) the public code divides by zero; here the interpolant takes
its limit, the value at that point.
"""

from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from math import pi

import numpy as np

from evenkeel.arrays import Array
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.checks import at_least_one, check_count, check_group, check_numbers
from evenkeel.coding.code import Answer, Task

__all__ = ["Berrut", "berrut_weights"]

# Distinct points of up to 32 are more than 1e-4 apart; equal ones differ by rounding alone.
_SAME_POINT = 1e-9


def berrut_weights(known: Array, wanted: Array) -> Array:
    """Gives weights `[wanted, known]` of Berrut's interpolant: its values at `wanted` are weights @ values at `known`.

    `known` is monotone. Every row sums to one; at a known point the row picks that point's value.
    """
    distance = wanted[:, None] - known[None, :]
    same = np.abs(distance) < _SAME_POINT
    signs = np.where(np.arange(len(known)) % 2, -1.0, 1.0)
    terms = signs / np.where(same, 1.0, distance)
    terms = np.where(same.any(axis=1, keepdims=True), same, terms)
    weights: Array = terms / terms.sum(axis=1, keepdims=True)
    return weights


@lru_cache(maxsize=256)
def _points(count: int, spares: int, systematic: bool) -> tuple[Array, Array]:
    """Gives the points of the items `[count]`, and of the tasks `[count + spares]` in the order of their numbers."""
    tasks = np.cos(np.arange(count + spares) * pi / (count + spares - 1))
    if not systematic:
        return np.cos((2 * np.arange(count) + 1) * pi / (2 * count)), tasks
    # Items take `count` of the tasks' points, spread evenly; the spares lie between them.
    taken = (2 * np.arange(count) + 1) * (count + spares) // (2 * count)
    return tasks[taken], np.concatenate([tasks[taken], np.delete(tasks, taken)])


class Berrut(BackupCode):
    """Makes N = count + spares tasks for the replicas' own model; all items are answered once `count` of them are in.

    NON-systematic, as in the paper: all tasks are mixtures, so every answer is approximate, straggler or not, and a
    group must be complete before its first task can be sent. More replies make better answers. With `systematic` the
    first tasks are the items themselves and their replies exact; only the spares are mixtures.

    Mixtures are float32 and may leave 0..255, so the model must take FP32. Answers have source "decoded".

    Args:
        max_items: ApproxIFER's K.
        scores: how the model's scores are to be read.
        spares: ApproxIFER's S, how many losses are survived.
        systematic: keep the items as primary tasks.
        model: name of the user's own model.
    """

    def __init__(
        self,
        max_items: int,
        scores: ScoreForm,
        *,
        spares: int = 1,
        systematic: bool = False,
        model: str = "classifier",
    ) -> None:
        self.max_items = at_least_one("max_items", max_items)
        self.spare_tasks = at_least_one("spares", spares)
        self.scores = scores
        self.systematic = systematic
        self.uses_primaries = True
        self.model = model
        self.name = f"berrut{'_systematic' if systematic else ''}{max_items}+{spares}"

    def primaries(self, items: Sequence[Array]) -> list[Task]:
        """Gives the items themselves where systematic, else the first `count` mixtures."""
        check_group(items, self.max_items)
        if self.systematic:
            return super().primaries(items)
        return self._mixtures(items, range(len(items)))

    def spares(self, prepared: Sequence[Array]) -> list[Task]:
        """Gives the last `spares` mixtures."""
        check_group(prepared, self.max_items)
        count = len(prepared)
        return self._mixtures(prepared, range(count, count + self.spare_tasks))

    def decode(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Answers every item once `count` replies are in; before that only exact ones, where systematic."""
        check_count(count, self.max_items)
        check_numbers(replies, count + self.spare_tasks)
        points, tasks = _points(count, self.spare_tasks, self.systematic)
        rows = {number: self.scores.rows(number, reply, 1)[0] for number, reply in replies.items()}
        known = {}
        if len(rows) >= count:
            # From the largest point down, which fixes both the signs and the order of adding up.
            numbers = np.array(sorted(rows, key=lambda number: -tasks[number]))
            values = np.stack([rows[number] for number in numbers.tolist()]).astype(np.float64)
            finite = np.isfinite(values).all(axis=1)
            if finite.sum() >= count:
                weights = berrut_weights(tasks[numbers[finite]], points)
                known = self.scores.answers(weights @ values[finite], "decoded")
        if self.systematic:
            known.update(self.scores.exact_answers(count, replies))
        return known

    def survives(self, count: int, lost: Set[int]) -> bool:
        """Survives any `spares` losses; where systematic, also any loss of spares alone."""
        if self.systematic and not any(number in lost for number in range(count)):
            return True
        return sum(number in lost for number in range(count + self.spare_tasks)) <= self.spare_tasks

    def _mixtures(self, items: Sequence[Array], numbers: range) -> list[Task]:
        count = len(items)
        points, tasks = _points(count, self.spare_tasks, self.systematic)
        weights = berrut_weights(points, tasks[numbers.start : numbers.stop]).astype(np.float32)
        mixtures = np.tensordot(weights, np.stack(items).astype(np.float32), axes=1)
        return [Task(mixture[None], tuple(range(count))) for mixture in mixtures]
