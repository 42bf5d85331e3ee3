"""Finds thresholds that keep a promise, by Learn-then-Test with a split fixed sequence.

A light model answers where its score reaches the threshold, an accurate one elsewhere. Each threshold is a hypothesis
"the promise is broken here", tested on a calibration set that nothing was learned from. The tests run in an order that
the tuning split has fixed: from where the answers seem best towards fewer and fewer answers of the accurate model, each
at the full level, until the first one fails. So the probability that any threshold is accepted wrongly is at most
`1 - guarantee`, however many there are.

The order does not begin at "everything to the accurate model": both together may be more right than the accurate model
alone, and a promise near its accuracy would fail at the first test. Source: Angelopoulos and others, Learn then Test.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt

import numpy as np

from evenkeel.arrays import Array, FloatArray, IntegerArray
from evenkeel.errors import ConfigurationError
from evenkeel.promises.binomial import cdf, max_errors, upper_bound
from evenkeel.promises.differences import drop_shown
from evenkeel.promises.promise import NEVER, Promise

__all__ = ["Curve", "Pairs", "Threshold", "certify", "check_pairs", "naive", "sequence", "split"]

_CANDIDATES = 100
_LEAST = 100  # pairs, in either split
_MAX_NEEDED = 10_000_000


@dataclass(frozen=True)
class Pairs:
    """Holds what both models said of the same items.

    Attributes:
        scores: of the light model, by which it is decided who answers, 0..1, [n].
        agree: whether both say the same, [n].
        light_right: whether the light model's answer is right, [n]; None where nobody knows.
        accurate_right: the same of the accurate model.
    """

    scores: FloatArray
    agree: Array
    light_right: Array | None = None
    accurate_right: Array | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, places: Array) -> "Pairs":
        """Takes some of the pairs."""
        light, accurate = self.light_right, self.accurate_right
        return Pairs(
            self.scores[places],
            self.agree[places],
            None if light is None else light[places],
            None if accurate is None else accurate[places],
        )


@dataclass(frozen=True)
class Curve:
    """Counts over pairs, for each of some thresholds: what a promise is tested by.

    Attributes:
        thresholds: rising, [t].
        n: all pairs.
        local: pairs that the light model answers, [t].
        apart: those of them in which the models disagree, [t].
        errors: wrong answers of both together, [t]; None without labels.
        worse: light answers that are wrong where the accurate model is right, [t]; None without labels.
        better: the other way round, [t]; None without labels.
    """

    thresholds: FloatArray
    n: int
    local: IntegerArray
    apart: IntegerArray
    errors: IntegerArray | None = None
    worse: IntegerArray | None = None
    better: IntegerArray | None = None

    @classmethod
    def of(cls, pairs: Pairs, thresholds: FloatArray) -> "Curve":
        """Counts the pairs at each threshold."""
        order = np.argsort(-pairs.scores, kind="stable")
        local = np.searchsorted(-pairs.scores[order], -thresholds, side="right")

        def among_local(hits: Array) -> IntegerArray:
            sums = np.concatenate([[0], np.cumsum(hits[order].astype(np.int64))])
            counted: IntegerArray = sums[local]
            return counted

        apart = among_local(~pairs.agree.astype(bool))
        if pairs.light_right is None or pairs.accurate_right is None:
            return cls(thresholds, len(pairs), local, apart)
        light, accurate = pairs.light_right.astype(bool), pairs.accurate_right.astype(bool)
        worse, better = among_local(accurate & ~light), among_local(light & ~accurate)
        errors = int((~accurate).sum()) + worse - better
        return cls(thresholds, len(pairs), local, apart, errors, worse, better)

    def risk(self, promise: Promise) -> FloatArray:
        """Gives the estimate of what the promise bounds from above, [t]."""
        if promise.kind == "min_agreement":
            return self.apart / self.n
        if promise.kind == "min_fill_agreement":
            rates: FloatArray = self.apart / np.maximum(self.local, 1)
            return rates
        errors, worse, better = self._labelled(promise)
        return errors / self.n if promise.kind == "min_accuracy" else (worse - better) / self.n

    def passes(self, promise: Promise) -> Array:
        """Tells for each threshold whether its test shows that the promise is kept, [t]."""
        if promise.kind == "max_accuracy_drop":
            _, worse, better = self._labelled(promise)
            return drop_shown(worse, better, self.n, promise.level, promise.delta)
        if promise.kind == "min_fill_agreement":
            most = [max_errors(int(local), 1 - promise.level, promise.delta) for local in self.local]
            shown: Array = self.apart <= np.array(most)
            return shown
        hits = self.apart if promise.kind == "min_agreement" else self._labelled(promise)[0]
        return hits <= max_errors(self.n, 1 - promise.level, promise.delta)

    def _labelled(self, promise: Promise) -> tuple[IntegerArray, IntegerArray, IntegerArray]:
        if self.errors is None or self.worse is None or self.better is None:
            raise ConfigurationError(
                f"{promise.kind}: cannot be shown without labels; give labelled images, or promise min_agreement"
            )
        return self.errors, self.worse, self.better


@dataclass(frozen=True)
class Threshold:
    """Holds the threshold that was found for a promise, or why there is none.

    Attributes:
        promise: that it keeps.
        bucket: of packet loss, by its number; 0 where none is lost.
        threshold: lowest score that is answered by the light model; None: not certifiable.
        n: pairs that it was tested on.
        offload: share of the items that go to the accurate model, in those pairs.
        offload_high: bound that the share stays below with the promise's guarantee.
        risk: what the promise bounds, as measured on those pairs.
        disagreement_high: bound, with the same guarantee, of the share of all items that the light model answers
            otherwise than the accurate one would: what an audit watches.
        needed: pairs that would probably do, where it is not certifiable; None: no number would.
    """

    promise: Promise
    bucket: int
    threshold: float | None
    n: int
    offload: float = 1.0
    offload_high: float = 1.0
    risk: float = 0.0
    disagreement_high: float = 0.0
    needed: int | None = None

    @property
    def certified(self) -> bool:
        """Tells whether the promise can be shown to be kept."""
        return self.threshold is not None

    def __str__(self) -> str:
        if self.threshold is not None:
            return f"{self.promise}: threshold {self.threshold:.4g}, offload {self.offload:.3f}"
        about = "no larger set would do with these models" if self.needed is None else f"about {self.needed:,} needed"
        return f"{self.promise}: not certifiable with n = {self.n:,}, {about}"


def sequence(tuning: Pairs, promise: Promise) -> FloatArray:
    """Gives the thresholds in the order in which they are to be tested, learned from the tuning split, [t].

    The first one has the least risk there, smoothed over its neighbours; the next ones send less and less to the
    accurate model.
    """
    check_pairs(tuning, "tuning", promise)
    shares = np.arange(_CANDIDATES + 1) / _CANDIDATES
    candidates = np.unique(np.concatenate([np.quantile(tuning.scores, shares[1:]), [0.0, NEVER]]))
    curve = Curve.of(tuning, candidates)
    if promise.kind == "min_fill_agreement":
        # A share of few answers says little, so what counts is how surely the tuning split shows it.
        pairs = zip(curve.apart.tolist(), curve.local.tolist(), strict=True)
        risk = np.array([cdf(apart, local, 1 - promise.level) for apart, local in pairs])
    else:
        risk = curve.risk(promise)
    width = max(1, len(candidates) // 20)
    padded = np.pad(risk, width, "edge")
    smooth = np.convolve(padded, np.ones(2 * width + 1) / (2 * width + 1), "valid")
    best = len(smooth) - 1 - int(smooth[::-1].argmin())
    ordered: FloatArray = candidates[: best + 1][::-1]
    return ordered


def certify(calibration: Pairs, order: FloatArray, promise: Promise, *, tuning: Pairs, bucket: int = 0) -> Threshold:
    """Finds the threshold with the least offload that the calibration set certifies.

    Args:
        calibration: pairs that nothing was learned from.
        order: of the tests, by `sequence`.
        promise: to keep.
        tuning: says, besides, how many pairs would be needed where none is certified.
        bucket: of packet loss that all these pairs have.

    Raises:
        ConfigurationError: too few pairs, of one class of answers, or without the labels that the promise needs.
    """
    check_pairs(calibration, "calibration", promise)
    curve = Curve.of(calibration, order)
    passed = curve.passes(promise)
    count = len(order) if passed.all() else int(np.argmin(passed))
    n = len(calibration)
    if not count:
        return Threshold(promise, bucket, None, n, needed=_needed(tuning, calibration, order, promise))
    place = count - 1
    away = n - int(curve.local[place])
    return Threshold(
        promise,
        bucket,
        float(order[place]),
        n,
        away / n,
        # Chosen among all by the same pairs, so both bounds hold for all thresholds at once: by Dvoretzky, Kiefer,
        # Wolfowitz and Massart, and by Bonferroni, which is closer for small shares.
        min(1.0, away / n + sqrt(log(1 / promise.delta) / (2 * n))),
        float(curve.risk(promise)[place]),
        upper_bound(int(curve.apart[place]), n, promise.delta / len(order)),
    )


def naive(pairs: Pairs, thresholds: FloatArray, promise: Promise) -> float:
    """Gives the lowest threshold at which the pairs themselves keep the promise: the usual way, without guarantee."""
    rising = np.sort(thresholds)
    kept = np.flatnonzero(Curve.of(pairs, rising).risk(promise) <= promise.allowed)
    return float(rising[kept[0]]) if len(kept) else NEVER


def check_pairs(pairs: Pairs, what: str, promise: Promise) -> None:
    """Refuses pairs from which nothing follows."""
    if len(pairs) < _LEAST:
        raise ConfigurationError(f"the {what} split has {len(pairs)} images; at least {_LEAST} are needed")
    if not np.isfinite(pairs.scores).all():
        raise ConfigurationError(f"the {what} split has scores that are not finite")
    if promise.needs_labels and (pairs.light_right is None or pairs.accurate_right is None):
        raise ConfigurationError(
            f"{promise.kind}: cannot be shown without labels; give labelled images, or promise min_agreement"
        )


def _needed(tuning: Pairs, calibration: Pairs, order: FloatArray, promise: Promise) -> int | None:
    """Guesses how many pairs would certify the best threshold, from all that is known of it."""
    risks = [Curve.of(pairs, order[:1]).risk(promise)[0] * len(pairs) for pairs in (tuning, calibration)]
    risk = float(sum(risks)) / (len(tuning) + len(calibration))
    allowed = promise.allowed
    gap = allowed - risk
    if gap <= 0:
        return None
    if promise.kind == "max_accuracy_drop":
        curve = Curve.of(calibration, order[:1])
        spread = (
            0.0 if curve.worse is None or curve.better is None else float(curve.worse[0] + curve.better[0]) / curve.n
        )
    else:
        spread = allowed * (1 - allowed)
    # One and a half times what a normal law says: at that many, four of five calibrations succeed.
    most = ceil(1.5 * 2 * log(1 / promise.delta) * spread / gap**2) + ceil(log(1 / promise.delta) / allowed)
    return most if most <= _MAX_NEEDED else None


def split(count: int, seed: int, shares: Sequence[float] = (0.2, 0.6, 0.2)) -> list[IntegerArray]:
    """Deals the places of `count` pairs, shuffled, into tuning, calibration and test; the seed decides."""
    order = np.random.default_rng(seed).permutation(count)
    ends = np.round(np.cumsum(shares) * count).astype(np.int64)
    return list(np.split(order, ends[:-1]))
