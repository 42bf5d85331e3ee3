"""Finds the confidence below which fills are not to be used, so that classes which are rare are not filled wrongly.

Agreement hides rare classes: where 97.5 % of a classifier's answers are one class, a network that always says so agrees
in 97.5 %, and is never right where it matters. Its confidence may still tell. The gate is the lowest confidence at
which, of the fills that concern a rare class (the classifier's answer, or the fill), no more are wrong than right.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.arrays import IntegerArray
from evenkeel.figures.estimates import Estimate, share

__all__ = ["NEVER", "ByClass", "by_class", "gate"]

NEVER = 1.01  # a confidence that no fill reaches
_RARE = 0.25  # of the share of the most frequent class
_LEAST = 5  # images of a class before it is judged by itself
_MANY = 0.1  # of all images; rare classes are judged together from there on


@dataclass(frozen=True)
class ByClass:
    """Counts how fills agree with a classifier, class by class of its answers.

    Attributes:
        images: of each class that it answers.
        agreed: of those the fills that say the same.
        largest: the class that it answers most.
    """

    images: dict[int, int]
    agreed: dict[int, int]
    largest: int

    @property
    def largest_share(self) -> float:
        """Gives the share of the largest class: with so many answers a fill that always says it would agree."""
        return self.images[self.largest] / sum(self.images.values())

    @property
    def elsewhere(self) -> Estimate:
        """Gives the agreement on images that are not given the largest class."""
        others = [number for number in self.images if number != self.largest]
        return share(sum(self.agreed[each] for each in others), sum(self.images[each] for each in others))


def by_class(answers: IntegerArray, fills: IntegerArray) -> ByClass:
    """Counts how `fills` [n] agree with the classifier's `answers` [n], class by class; n is 1 or more."""
    images = np.bincount(answers)
    agreed = np.bincount(answers[fills == answers], minlength=len(images))
    there = np.flatnonzero(images).tolist()
    return ByClass(
        {number: int(images[number]) for number in there},
        {number: int(agreed[number]) for number in there},
        int(images.argmax()),
    )


def gate(answers: IntegerArray, fills: IntegerArray, confidences: NDArray[np.floating[Any]]) -> float:
    """Finds the confidence below which fills are not to be used; 0 where rare classes are filled as they should be.

    There is one where classes are clearly filled wrongly more often than right: a rare class of `_LEAST` images or
    more, or all rare ones together where they are many. A few odd answers, which every classifier gives, are no class
    to be kept: holding back what could be one of them would hold back most fills.

    Args:
        answers: of the classifier, [n].
        fills: for the same images, which trained nothing, [n].
        confidences: of the fills, [n].
    """
    if not len(answers):
        return 0.0
    images = np.bincount(answers, minlength=int(fills.max()) + 1)
    rare = images <= _RARE * images.max()
    right = answers == fills
    alone = np.flatnonzero(rare & (images >= _LEAST)).tolist()
    groups = [(answers == number) | (fills == number) for number in alone]
    if rare[answers].mean() >= _MANY:
        groups.append(rare[answers] | rare[fills])
    judged = [each for each in groups if each.any() and share(int(right[each].sum()), int(each.sum())).high < 0.5]
    if not judged:
        return 0.0
    order = np.argsort(-confidences, kind="stable")
    surest = confidences[order]
    # Right ones less wrong ones among the surest 1, 2, ... fills.
    balances = np.stack([np.cumsum(np.where(each[order], np.where(right[order], 1, -1), 0)) for each in judged])
    ends = np.flatnonzero(np.append(surest[1:] < surest[:-1], True))  # fills of one confidence pass together
    fitting = ends[(balances[:, ends] >= 0).all(axis=0)]
    if not len(fitting):
        return NEVER
    last = int(fitting[-1])
    return float((surest[last] + surest[last + 1]) / 2) if last + 1 < len(surest) else 0.0
