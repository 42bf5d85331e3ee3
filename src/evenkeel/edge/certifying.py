"""Certifies promises from what two models say of the same items: tunes, calibrates and tests, on parts of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evenkeel.arrays import Array, FloatArray
from evenkeel.coding.answers.cascade import Sureness
from evenkeel.coding.answers.scores import softmax
from evenkeel.edge.both_models import BothModels
from evenkeel.errors import ConfigurationError
from evenkeel.promises.binomial import lower_bound, upper_bound
from evenkeel.promises.certificate import BUCKETS, bucket_of
from evenkeel.promises.promise import NEVER, Promise
from evenkeel.promises.thresholds import Curve, Pairs, Threshold, certify, naive, sequence, split

__all__ = ["Certified", "Tested", "certify_all", "examined", "temperature_of"]

_TEMPERATURES = np.geomspace(0.05, 20.0, 241)
_INTERVAL = 0.025  # beside either end of a 95 % interval


@dataclass(frozen=True)
class Tested:
    """Holds one threshold, and what the test split says of it.

    Attributes:
        found: the threshold, or why there is none.
        tested: images of the test split.
        value: what is promised, as the test split has it: accuracy, drop or agreement.
        low: of its 95 % interval.
        high: the same.
        test_offload: share of the test split that goes to the accurate model.
        naive: threshold that the validation set alone would give.
        examined: of the calibration images, those whose label, or whose answer of the accurate model, decided: it was
            looked at only where the light model would have answered and, for a drop, the two disagree.
    """

    found: Threshold
    tested: int
    value: float
    low: float
    high: float
    test_offload: float
    naive: float
    examined: int


@dataclass(frozen=True)
class Certified:
    """Holds what one run of `evenkeel certify` found.

    Attributes:
        score: that was chosen.
        temperature: of the light model's logits.
        thresholds: of every promise and bucket.
        curves: by bucket, how all go together over thresholds, on the test split.
        sizes: of the splits.
        labelled: whether every item has a label, so that accuracies are known.
    """

    score: Sureness
    temperature: float
    thresholds: tuple[Tested, ...]
    curves: dict[int, Curve]
    sizes: dict[str, int]
    labelled: bool


def temperature_of(logits: Array, classes: Array) -> float:
    """Finds the temperature at which the logits `[n, classes]` are the least surprised by the classes [n]."""
    rows = np.arange(len(classes))
    losses = [-np.log(np.maximum(softmax(logits, one)[rows, classes], 1e-30)).mean() for one in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def certify_all(both: BothModels, promises: Sequence[Promise], *, seed: int = 0, score: Sureness | None = None,
                shares: Sequence[float] = (0.2, 0.6, 0.2)) -> Certified:  # fmt: skip
    """Finds a threshold for every promise, in every bucket of packet loss that items are in.

    Args:
        both: what the models say.
        promises: to keep, each by itself at its own guarantee.
        seed: deals the items into the three splits.
        score: that decides; None: the one that offloads less on the tuning split.
        shares: of the tuning, calibration and test split.

    Raises:
        ConfigurationError: too few items, or no labels where a promise needs them.
    """
    loss = np.zeros(len(both)) if both.loss is None else both.loss
    buckets = np.array([bucket_of(float(one)) for one in loss])
    parts = {}
    for bucket in np.unique(buckets).tolist():
        places = np.flatnonzero(buckets == bucket)
        try:
            parts[bucket] = [both.take(places[part]) for part in split(len(places), seed, shares)]
            _check_size(parts[bucket])
        except ConfigurationError as error:
            raise ConfigurationError(f"{_named(bucket)}{error}") from None
    first = min(parts)  # with the least loss
    kind, temperature = _tuned(parts[first][0], promises, score)
    found: list[Tested] = []
    curves = {}
    for bucket, three in parts.items():
        tuning, calibration, test = (part.pairs(kind, temperature) for part in three)
        for promise in promises:
            found.append(_certified(tuning, calibration, test, promise, bucket))
        grid = np.append(np.unique(np.quantile(test.scores, np.arange(201) / 200)), NEVER)
        curves[bucket] = Curve.of(test, grid)
    sizes = {name: sum(len(three[place]) for three in parts.values()) for place, name in enumerate(_NAMES)}
    labelled = both.labels is not None and bool((both.labels >= 0).all())
    return Certified(kind, temperature, tuple(found), curves, sizes, labelled)


_NAMES = ("tuning", "calibration", "test")


def _check_size(three: Sequence[BothModels]) -> None:
    for name, part in zip(_NAMES, three, strict=True):
        if len(part) < 100:
            raise ConfigurationError(f"the {name} split has {len(part)} images; at least 100 are needed in each")


def _named(bucket: int) -> str:
    return f"packet loss up to {BUCKETS[bucket]:.0%}: " if bucket else ""


def _tuned(tuning: BothModels, promises: Sequence[Promise], score: Sureness | None) -> tuple[Sureness, float]:
    if tuning.scores.shape[1] == 1:
        return "max_probability", 1.0
    scores = np.log(np.maximum(tuning.scores, 1e-30)) if tuning.form.kind == "probabilities" else tuning.scores
    labels = tuning.labels
    known = tuning.accurate if labels is None or (labels < 0).any() else labels
    temperature = temperature_of(scores, known)
    if score is not None:
        return score, temperature
    kinds: tuple[Sureness, ...] = ("max_probability", "margin")
    return min(kinds, key=lambda kind: _offloads(tuning.pairs(kind, temperature), promises)), temperature


def _offloads(tuning: Pairs, promises: Sequence[Promise]) -> float:
    grid: FloatArray = np.append(np.quantile(tuning.scores, np.arange(101) / 100), NEVER)
    return sum(float((tuning.scores < naive(tuning, grid, promise)).mean()) for promise in promises)


def _certified(tuning: Pairs, calibration: Pairs, test: Pairs, promise: Promise, bucket: int) -> Tested:
    order = sequence(tuning, promise)
    found = certify(calibration, order, promise, tuning=tuning, bucket=bucket)
    at = NEVER if found.threshold is None else found.threshold
    curve = Curve.of(test, np.array([at]))
    n, risk = len(test), float(curve.risk(promise)[0])
    if promise.kind == "min_fill_agreement":
        n = max(1, int(curve.local[0]))
    if promise.kind == "max_accuracy_drop":
        worse, better = 0 if curve.worse is None else curve.worse[0], 0 if curve.better is None else curve.better[0]
        spread = 1.96 * float(np.sqrt(max((worse + better) / n - risk**2, 0.0) / n))
        value, low, high = risk, risk - spread, risk + spread
    else:
        bad = round(risk * n)
        value, low, high = 1 - risk, 1 - upper_bound(bad, n, _INTERVAL), 1 - lower_bound(bad, n, _INTERVAL)
    return Tested(
        found, len(test), value, low, high, 1 - float(curve.local[0]) / len(test), naive(calibration, order, promise),
        examined(calibration, order, found, promise),
    )  # fmt: skip


def examined(calibration: Pairs, order: FloatArray, found: Threshold, promise: Promise) -> int:
    """Counts what had to be known: down to the first threshold that failed, and no further."""
    if promise.kind == "min_accuracy":
        return len(calibration)
    place = -1 if found.threshold is None else int(np.flatnonzero(order == found.threshold)[0])
    local = calibration.scores >= order[min(place + 1, len(order) - 1)]
    if promise.kind == "max_accuracy_drop":
        local = local & ~calibration.agree.astype(bool)
    return int(local.sum())
