"""Turns measured fills into rows, and rows into the page that people read.

A row says how often fills are right, how well they know it, and what that makes of all answers together.

**Intervals are over images.** An image that is sent several times (several shuffles, or every worker lost in turn) is
no new evidence, so shares have Wilson's interval at the effective sample size (`estimates.grouped_share`). That fills
of one group share a spare's reply is not allowed for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenkeel.arrays import Array, FloatArray
from evenkeel.bench.fills.backups import UserClassifier
from evenkeel.bench.fills.measure import Fills, MeasuredAnswers, MeasuredBackup, from_scores
from evenkeel.figures.estimates import Estimate, grouped_share, mean, quantile, quantile_ratio, share
from evenkeel.figures.tables import Column, Page, Row
from evenkeel.models.gate import by_class
from evenkeel.models.measure import calibration_error, reliability_table

__all__ = [
    "COVERAGES",
    "UNAVAILABLE",
    "Truth",
    "class_fields",
    "cost_fields",
    "fill_fields",
    "gate_fields",
    "notes_of",
    "page_of",
    "partial_fields",
    "rows_of",
    "same_class_fields",
]

COVERAGES = (100, 95, 90, 80, 70)  # percent of the fills that the confidence gate lets through
UNAVAILABLE = (2, 5, 10)  # percent of the primaries that do not answer

_METHOD = Column("method", "method")
_WIDE = 2000  # images; with fewer, intervals are so wide that a note says so
_COLUMNS = (
    Column("cost", "cost", "passes"),
    Column("macs", "compute", "MMAC", 1e-6),
    Column("parameters", "weights", "M", 1e-6),
    Column("latency_ms", "pass", "ms"),
    Column("accuracy", "right", "%", 100.0, apart=True),
    Column("drop", "drop", "points", 100.0),
    Column("agreement", "agree", "%", 100.0),
    Column("agreement_elsewhere", "elsewhere", "%", 100.0),
    Column("accuracy_coverage_90", "surest .9", "%", 100.0),
    Column("overall_unavailable_5", "all, .05 lost", "%", 100.0),
    Column("accuracy_same_class", "same class", "%", 100.0),
)


@dataclass(frozen=True)
class Truth:
    """Holds what fills are compared with: the classifier's own answers `[images]` and, if known, labels `[images]`."""

    answers: NDArray[np.int64]
    labels: NDArray[np.int64] | None

    @property
    def right(self) -> NDArray[np.bool_] | None:
        """Marks the images that the classifier gets right `[images]`."""
        return None if self.labels is None else self.answers == self.labels


def rows_of(
    classifier: UserClassifier,
    scores: Array,
    labels: NDArray[np.int64] | None,
    backups: Sequence[MeasuredBackup],
    answers: Sequence[MeasuredAnswers],
    times_ms: Array | None,
) -> list[dict[str, Any]]:
    """Gives one row for the classifier itself, then one for each backup.

    Args:
        classifier: whose replies are lost.
        scores: its own, `[images, classes]`.
        labels: `[images]`; without them there are no figures but agreement.
        backups: who fills.
        answers: what each backup answered.
        times_ms: `[rounds, 1 + backups]`; without them there is no cost.
    """
    truth = Truth(scores.argmax(axis=1).astype(np.int64), labels)
    own = from_scores(scores, classifier.form.confidences(scores))
    rows = [
        {
            "method": "classifier",
            "model": classifier.name,
            "images_per_backup": 1,
            "macs": classifier.macs,
            "parameters": classifier.parameters,
            **fill_fields(own, None, truth),
        }
    ]
    for backup, found in zip(backups, answers, strict=True):
        row = {
            "method": backup.method,
            "model": backup.model,
            "images_per_backup": backup.code.max_items,
            "macs": backup.macs,
            "parameters": backup.parameters,
            **fill_fields(found.fills, found.unhurt, truth),
            **gate_fields(found.fills, truth, backup.code.min_confidence),
        }
        if found.by_items:
            row |= partial_fields(found.by_items, truth)
        if found.same_class is not None:
            row |= same_class_fields(found.same_class, truth)
        rows.append(row)
    if times_ms is not None:
        for place, row in enumerate(rows):
            row |= cost_fields(times_ms, place)
    return rows


def page_of(rows: Sequence[Row]) -> Page:
    """Gives the table: a line for the classifier and for each backup, with the columns that have figures."""
    return Page(rows, [_METHOD], [each for each in _COLUMNS if any(row.get(each.key) is not None for row in rows)])


def notes_of(rows: Sequence[Row], shuffles: int, images: int) -> list[str]:
    """Gives lines that say how the figures are to be read."""
    notes = ["groups: distinct images, shuffled, classes mixed; intervals: 95 %, over images"]
    if shuffles > 1:
        notes.append(f"{shuffles} shuffles ask every image again: more groups, not more images")
    if images < _WIDE:
        notes.append(f"only {images} images: the intervals are wide; give more with --images")
    if any("by_items" in row for row in rows):
        notes.append("partly filled groups (--json, --figure): the first cells, as the gateway fills them")
    if any(row.get("accuracy_same_class") is not None for row in rows):
        notes.append("same class: all items of a group are of one class, which no traffic is; an ablation")
    largest_share = rows[0].get("largest_class_share")
    if largest_share is not None:
        notes.append(
            "elsewhere: agreement on images that the classifier does not give its most frequent class, which is "
            f"{100 * largest_share:.1f} % of its answers"
        )
    for row in rows:
        if row.get("min_confidence"):
            notes.append(
                f"{row['method']}: its card lets no fill below confidence {row['min_confidence']:.4g} through; "
                f"{100 * row['filled_above_min_confidence']:.1f} % pass, and {row['elsewhere_filled_wrongly']} images "
                "elsewhere are filled wrongly; the other figures are without it"
            )
        kept = row.get("accuracy_none_lost")
        if kept is not None:
            notes.append(
                f"{row['method']}: not systematic, so every answer is approximate; right with nothing lost: "
                f"{100 * kept:.1f} %"
            )
    return notes


def fill_fields(fills: Fills, unhurt: Fills | None, truth: Truth) -> dict[str, Any]:
    """Gives what a row says about answers; figures against labels are None where there are no labels.

    `drop` compares fills and the classifier on the same images: those that have fills.

    An item without an answer counts as wrong, and is the first that a confidence gate holds back. With a share f of the
    primaries unavailable, A = (1 - f) A_a + f A_d of all answers are right: A_a of the usual ones, which are the
    classifier's or, where a code is not systematic, its own with nothing lost; A_d of the fills.

    Args:
        fills: of full groups, one task lost each.
        unhurt: answers with nothing lost, where they are not the classifier's own.
        truth: what is right.
    """
    row: dict[str, Any] = {
        "fills": len(fills),
        "images": len(np.unique(fills.images)),
        "unanswered": float((fills.answers < 0).mean()),
        **_estimate("agreement", _share(fills, fills.answers == truth.answers[fills.images])),
        **class_fields(fills, truth),
        **_estimate("base_accuracy", None if truth.right is None else share(int(truth.right.sum()), len(truth.right))),
    }
    if truth.labels is None or truth.right is None:
        return row | _estimate("accuracy", None)
    right = fills.answers == truth.labels[fills.images]
    accuracy = _share(fills, right)
    of_image, filled = _by_image(fills, right, len(truth.labels))
    base = truth.right.astype(np.float64)
    usual, usual_of_image = float(base.mean()), base
    row |= _estimate("accuracy", accuracy)
    row |= _estimate("drop", mean((base - of_image)[filled]))
    if unhurt is not None:
        kept = unhurt.answers == truth.labels[unhurt.images]
        row |= _estimate("accuracy_none_lost", _share(unhurt, kept))
        usual, usual_of_image = float(kept.mean()), _by_image(unhurt, kept, len(truth.labels))[0]
    for percent in UNAVAILABLE:
        lost = percent / 100
        value = (1 - lost) * usual + lost * accuracy.value
        spread = ((1 - lost) * usual_of_image + lost * of_image)[filled]
        overall = _around(value, spread)
        # A share, though the interval of a mean does not know it.
        bounded = Estimate(value, max(overall.low, 0.0), min(overall.high, 1.0))
        row |= _estimate(f"overall_unavailable_{percent}", bounded)
    for percent in COVERAGES:
        row |= _gated(fills, right, percent)
    answered = fills.answers >= 0
    return row | {
        "calibration_error": _known(calibration_error(fills.confidences[answered], right[answered])),
        "reliability": [list(step) for step in reliability_table(fills.confidences[answered], right[answered])],
    }


def class_fields(fills: Fills, truth: Truth) -> dict[str, Any]:
    """Gives agreement class by class of the classifier's answers, which agreement as a whole hides for rare classes.

    `largest_class_share` is what always saying the largest class agrees in; `agreement_elsewhere` is of images that are
    not given that class; `agreement_by_class` has rows `[class, fills, agreed]`.
    """
    answers = truth.answers[fills.images]
    classes = by_class(answers, fills.answers)
    others = answers != classes.largest
    return {
        "largest_class_share": _known(classes.largest_share),
        **_estimate("agreement_elsewhere", _share(fills, fills.answers == answers, others) if others.any() else None),
        "agreement_by_class": [[each, classes.images[each], classes.agreed[each]] for each in classes.images],
    }


def gate_fields(fills: Fills, truth: Truth, min_confidence: float) -> dict[str, Any]:
    """Gives what passes the confidence that a backup's card requires; nothing where it requires none."""
    if not min_confidence:
        return {}
    answers = truth.answers[fills.images]
    passing = (fills.confidences >= min_confidence) & (fills.answers >= 0)
    agreed = fills.answers == answers
    others = answers != by_class(answers, fills.answers).largest
    return {
        "min_confidence": min_confidence,
        "filled_above_min_confidence": _known(float(passing.mean())),
        **_estimate("agreement_above_min_confidence", _share(fills, agreed, passing) if passing.any() else None),
        "elsewhere_filled_wrongly": int((passing & others & ~agreed).sum()),
    }


def partial_fields(by_items: Sequence[tuple[int, Fills]], truth: Truth) -> dict[str, Any]:
    """Gives `by_items`: accuracy and agreement of groups of so many items."""
    entries = []
    for items, fills in by_items:
        entry: dict[str, Any] = {"items": items, "fills": len(fills)}
        if truth.labels is not None:
            entry |= _estimate("accuracy", _share(fills, fills.answers == truth.labels[fills.images]))
        entries.append(entry | _estimate("agreement", _share(fills, fills.answers == truth.answers[fills.images])))
    return {"by_items": entries}


def same_class_fields(fills: Fills, truth: Truth) -> dict[str, Any]:
    """Gives `accuracy_same_class`: of groups whose items are all of one class, an ablation and nothing to go by."""
    assert truth.labels is not None
    return _estimate("accuracy_same_class", _share(fills, fills.answers == truth.labels[fills.images]))


def cost_fields(times_ms: Array, place: int) -> dict[str, Any]:
    """Gives `latency_ms` and `cost`, relative to the classifier's pass.

    Args:
        times_ms: `[rounds, passes]`, measured in turn; pass 0 is the classifier's.
        place: of this row's passes.
    """
    own, base = times_ms[:, place], times_ms[:, 0]
    cost = Estimate(1.0, 1.0, 1.0) if place == 0 else quantile_ratio(own, base, 0.5, paired=True)
    return _estimate("cost", cost) | _estimate("latency_ms", quantile(own, 0.5))


def _gated(fills: Fills, right: NDArray[np.bool_], percent: int) -> dict[str, Any]:
    """Gives the accuracy of the surest `percent` of the fills; the others would be hedged."""
    # An item without an answer never passes, whatever its place among the confidences.
    order = np.where(fills.answers < 0, -1.0, fills.confidences)
    last = max(1, math.ceil(percent / 100 * len(fills) - 1e-9))
    threshold = float(np.partition(order, len(order) - last)[len(order) - last])
    let_through = order >= threshold
    passed = _share(fills, right, let_through)
    return _estimate(f"accuracy_coverage_{percent}", passed) | {
        f"min_confidence_coverage_{percent}": round(max(threshold, 0.0), 6)
    }


def _share(fills: Fills, right: NDArray[np.bool_], some: NDArray[np.bool_] | None = None) -> Estimate:
    images, right = (fills.images, right) if some is None else (fills.images[some], right[some])
    return grouped_share(np.bincount(images, weights=right), np.bincount(images))


def _by_image(fills: Fills, right: NDArray[np.bool_], images: int) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Gives for every image the share of its fills that is right, and whether it has any."""
    hits = np.bincount(fills.images, weights=right, minlength=images)
    counts = np.bincount(fills.images, minlength=images)
    return hits / np.maximum(counts, 1), counts > 0


def _around(value: float, samples: FloatArray) -> Estimate:
    """Puts around the value the interval of the mean of samples, one for each image."""
    found = mean(samples)
    return Estimate(value, value - (found.value - found.low), value + (found.high - found.value))


def _estimate(key: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return {key: None, f"{key}_low": None, f"{key}_high": None}
    return {key: _known(estimate.value), f"{key}_low": _known(estimate.low), f"{key}_high": _known(estimate.high)}


def _known(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
