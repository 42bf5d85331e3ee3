"""Runs a light model on items first; whoever uses the answers sends those that are not sure to an accurate model.

Source: Lao and others, HawkVision / EdgeSight: one pair of models serves every accuracy between both, by the score
from which the light model's answer is used. That score is a promise's threshold (`promises/`), so it is computed here
in one way only, for whoever calibrates and whoever serves.
"""

from math import exp
from typing import Literal

import numpy as np

from evenkeel.arrays import LEAST_PROBABILITY, Array, FloatArray
from evenkeel.coding.answers.cheap import Cheap
from evenkeel.coding.answers.scores import ScoreForm, softmax
from evenkeel.coding.code import Answer

__all__ = ["Cascade", "Sureness", "sureness"]

Sureness = Literal["max_probability", "margin"]
# Up to so many scores plain Python is faster than numpy, and it is on every item's path.
_FEW = 100


def sureness(scores: Array, form: ScoreForm, kind: Sureness = "max_probability") -> FloatArray:
    """Gives how sure finite scores `[n, classes]` are, 0..1, [n]: the top probability, or its lead over the second."""
    if form.kind == "probabilities":
        scores = np.log(np.maximum(scores, LEAST_PROBABILITY))
    probabilities = softmax(scores, form.temperature)
    if kind == "max_probability":
        sure: FloatArray = probabilities.max(axis=-1)
        return sure
    top = np.partition(probabilities, -2, axis=-1)[..., -2:]
    lead: FloatArray = top[..., 1] - top[..., 0]
    return lead


class Cascade(Cheap):
    """Is a small model as a backup, whose answers are judged: their source is "edge", their confidence its sureness.

    Args:
        max_items: how many items one group may hold.
        scores: how the light model's scores are to be read.
        kind: of sureness.
        model: name of the light model, which takes items as the replicas do.
    """

    def __init__(
        self, max_items: int, scores: ScoreForm, *, kind: Sureness = "max_probability", model: str = "light"
    ) -> None:
        super().__init__(max_items, scores, model=model)
        self.kind = kind
        self.name = "cascade"

    def _answers(self, rows: Array) -> dict[int, Answer]:
        if rows.size > _FEW or self.scores.kind == "probabilities":
            there = np.flatnonzero(np.isfinite(rows).all(axis=-1)).tolist()
            sure = sureness(rows[there], self.scores, self.kind).tolist() if there else []
            return {item: Answer(rows[item], "edge", one) for item, one in zip(there, sure, strict=True)}
        known = {}
        for item, row in enumerate(rows.tolist()):
            one = self._sureness_of(row)
            if one is not None:
                known[item] = Answer(rows[item], "edge", one)
        return known

    def _sureness_of(self, logits: list[float]) -> float | None:
        """Computes `sureness` of one row; None where a score is not finite."""
        total = sum(logits)
        if total - total != 0.0:  # infinite or not a number
            return None
        temperature, largest = self.scores.temperature, max(logits)
        whole = sum([exp((logit - largest) / temperature) for logit in logits])
        if self.kind == "max_probability":
            return 1.0 / whole
        second = sorted(logits)[-2] if len(logits) > 1 else largest
        return (1.0 - exp((second - largest) / temperature)) / whole
