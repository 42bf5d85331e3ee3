"""Notices a classifier that is fed wrongly: pixels of another scale, other means, or blue in the place of red.

Its answers to labelled images tell: if they are right clearly more often when it is fed in another usual way, that is
most likely how it was trained.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import EvenkeelError
from evenkeel.models.black_box import BlackBox
from evenkeel.models.classifier_form import Colours, Normalisation
from evenkeel.models.labels import Skill, number_labels

__all__ = ["better_fed", "count_ways"]

_ASKED = 100  # images
_USUAL = {
    "pixels of 0..1": Normalisation(1 / 255),
    "--scale 1": Normalisation(1.0),
    "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5": Normalisation(1 / 255, (0.5,) * 3, (0.5,) * 3),
    "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225": Normalisation(
        1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ),
    "--scale 1 --mean 123.68 116.78 103.94": Normalisation(1.0, (123.68, 116.78, 103.94)),
}


def better_fed(
    classifier: BlackBox,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    names: tuple[str, ...] | None,
    done: Callable[[int], object],
) -> str | None:
    """Says how else the classifier is clearly better at `labels`; None where it is fed as well as we know.

    Args:
        classifier: as it is fed.
        pixels: of labelled images, uint8 [n, height, width, 3]; the first hundred are shown.
        labels: of those images, as their source numbers them.
        names: of the labels; None where they are numbers of classes.
        done: called with 1 for each of `count_ways(classifier)` ways that was tried.
    """
    pixels, labels = pixels[:_ASKED], labels[:_ASKED]
    now = _skill(classifier, pixels, labels, names)
    best, how = now, None
    for text, other in _ways(classifier):
        found = _skill(other, pixels, labels, names)
        done(1)
        if not found.near_chance and found.right.low > now.right.high and found.hits > best.hits:
            best, how = found, text
    if how is None:
        return None
    return (
        f"fed with {how} the classifier is right for {best.right.value:.0%} of {best.count} labelled images, and for "
        f"{now.right.value:.0%} as it is fed now: look how it was trained"
    )


def count_ways(classifier: BlackBox) -> int:
    """Counts the other ways to feed it that are tried."""
    return sum(1 for _ in _ways(classifier))


def _ways(classifier: BlackBox) -> Iterator[tuple[str, BlackBox]]:
    form = classifier.form
    usual = {"pixels as they are": form.normalisation} if form.dtype == "u1" else _USUAL
    orders: tuple[Colours, ...] = ("GREY",) if form.colours == "GREY" else ("RGB", "BGR")
    for text, normalisation in usual.items():
        for colours in orders:
            if (normalisation, colours) != (form.normalisation, form.colours):
                order = {"RGB": " and red first", "BGR": " and --bgr", "GREY": ""}[colours]
                yield f"{text}{order}", classifier.fed(normalisation, colours)


def _skill(
    classifier: BlackBox, pixels: NDArray[np.uint8], labels: NDArray[np.int64], names: tuple[str, ...] | None
) -> Skill:
    try:
        answers = classifier.scores(pixels).argmax(axis=1)
        found = number_labels(labels, names, classifier.class_names, classifier.classes, answers).skill
    except EvenkeelError:  # scores that are not finite, or labels that fit nothing
        found = None
    return Skill(0, len(labels), 0.0) if found is None else found
