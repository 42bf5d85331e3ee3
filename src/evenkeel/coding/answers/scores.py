"""Reads rows of scores: checks their shape, decides which may be answers, and says how sure they are.

One rule holds in every code: **a row with a score that is not finite is a row that is not there.** It answers nothing
and takes no part in decoding, so a broken model can make an answer late but never wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Literal

import numpy as np

from evenkeel.arrays import LEAST_PROBABILITY, Array
from evenkeel.coding.checks import at_least_one
from evenkeel.coding.code import Answer, Source
from evenkeel.errors import CodeError, ConfigurationError
from evenkeel.models.cards import ModelCard

__all__ = ["ScoreForm", "confidence", "softmax"]

# Up to so many classes plain Python is faster than numpy, by ten times for ten of them; it is on every item's path.
_FEW = 50


@dataclass(frozen=True)
class ScoreForm:
    """Says how the scores of a model are to be read."""

    classes: int
    temperature: float = 1.0  # above 1: less sure; below 1: surer
    kind: Literal["logits", "probabilities"] = "logits"

    def __post_init__(self) -> None:
        """Refuses what cannot be calibrated."""
        at_least_one("classes", self.classes)
        if not 0 < self.temperature < float("inf"):
            raise ConfigurationError(f"temperature must be a number above zero, found {self.temperature!r}")
        if self.kind not in ("logits", "probabilities"):
            raise ConfigurationError(f"scores must be logits or probabilities, found {self.kind!r}")

    @classmethod
    def from_card(cls, card: ModelCard) -> "ScoreForm":
        """Reads the form from a card."""
        return cls(len(card.classes), card.temperature, card.scores)

    def rows(self, number: int, reply: Array, *shape: int) -> Array:
        """Gives the reply to task `number` as float32 scores `[*shape, classes]`.

        Raises:
            CodeError: another shape, or no real numbers.
        """
        scores = np.asarray(reply)
        if scores.shape != (*shape, self.classes):
            raise CodeError(
                f"reply to task {number}: expected scores of shape {[*shape, self.classes]}, "
                f"found {list(scores.shape)}; check which model the worker runs"
            )
        if scores.dtype.kind not in "fiu":
            raise CodeError(f"reply to task {number}: expected real numbers, found datatype {scores.dtype}")
        return _single(scores)

    def confidences(self, scores: Array) -> Array:
        """Gives the highest calibrated probability of every row of finite scores `[..., classes]`."""
        if self.kind == "probabilities":
            scores = np.log(np.maximum(scores, LEAST_PROBABILITY))
        logits = scores.astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logits /= self.temperature
        # The largest term of the softmax is exp(0), so its share is one over the sum.
        sums: Array = np.exp(logits, out=logits).sum(axis=-1)
        return 1.0 / sums

    def answer(self, scores: Array, source: Source = "exact") -> Answer:
        """Makes the answer of one row of finite scores `[classes]`."""
        if self.kind == "probabilities":
            return Answer(scores, source, float(self.confidences(scores)))
        return Answer(scores, source, confidence(scores, self.temperature))

    def answers(self, scores: Array, source: Source) -> dict[int, Answer]:
        """Makes answers from scores `[items, classes]`, item by item; rows that are not finite answer nothing."""
        scores = _single(scores)
        finite = np.isfinite(scores)
        if finite.all():
            sure = self.confidences(scores).tolist()
            return {item: Answer(scores[item], source, sure[item]) for item in range(len(sure))}
        items = np.flatnonzero(finite.all(axis=-1)).tolist()
        if not items:
            return {}
        sure = self.confidences(scores[items]).tolist()
        return {item: Answer(scores[item], source, one) for item, one in zip(items, sure, strict=True)}

    def exact_answers(self, count: int, replies: Mapping[int, Array]) -> dict[int, Answer]:
        """Makes answers from the primary replies 0..count-1 `[1, classes]` of a systematic code."""
        known = {}
        for item in range(count):
            reply = replies.get(item)
            if reply is not None:
                scores = self.rows(item, reply, 1)[0]
                if np.isfinite(scores).all():
                    known[item] = self.answer(scores)
        return known


def softmax(scores: Array, temperature: float = 1.0) -> Array:
    """Gives the probabilities of the last axis of logits, sharpened or softened by `temperature`."""
    shifted = np.asarray(scores, dtype=np.float64) / temperature
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    probabilities: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities


def confidence(scores: Array, temperature: float = 1.0) -> float:
    """Gives the highest probability of one item's logits after calibration."""
    if scores.size > _FEW:
        return float(softmax(scores, temperature).max())
    logits = scores.tolist()
    largest = max(logits)
    # The largest term of the softmax is exp(0), so its share is one over the sum.
    return 1.0 / sum([exp((logit - largest) / temperature) for logit in logits])


def _single(scores: Array) -> Array:
    """Gives the scores in float32; what is too large becomes infinite, so that it is no answer."""
    if scores.dtype == np.float32:
        return scores
    with np.errstate(over="ignore"):
        return scores.astype(np.float32)
