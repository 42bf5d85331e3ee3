"""Certified thresholds keep their promises as often as they say, and naive ones do not."""

from itertools import product

import numpy as np
import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.promises.differences import max_worse
from evenkeel.promises.promise import NEVER, Promise
from evenkeel.promises.thresholds import Curve, Pairs, certify, naive, sequence, split


def population(count: int, seed: int) -> Pairs:
    """A light model that is right in .746 of the cases, an accurate one in .823; together in up to .832."""
    random = np.random.default_rng(seed)
    scores = random.beta(2.2, 0.75, count)
    light = random.random(count) < scores
    accurate = random.random(count) < 0.45 + 0.5 * scores
    # Two wrong answers are sometimes the same one.
    agree = (light & accurate) | (~light & ~accurate & (random.random(count) < 0.3))
    return Pairs(scores, agree, light, accurate)


WHOLE = population(400_000, 1)
GRID = np.append(np.linspace(0, 1, 2001), NEVER)
TRUTH = Curve.of(WHOLE, GRID)
PROMISES = [
    Promise("min_accuracy", 0.8),
    Promise("max_accuracy_drop", 0.01),
    Promise("min_agreement", 0.95),
    Promise("min_fill_agreement", 0.85),
]


def misses(promise: Promise, n: int, repetitions: int) -> tuple[float, float, float]:
    """Shares of calibrations whose threshold breaks the promise: certified, naive; and the share certified at all."""
    risk, random = TRUTH.risk(promise), np.random.default_rng(2)
    allowed = promise.level if promise.kind == "max_accuracy_drop" else 1 - promise.level
    missed = missed_naively = certified = 0
    for _ in range(repetitions):
        places = random.integers(0, len(WHOLE), n + 400)
        tuning, calibration = WHOLE.take(places[:400]), WHOLE.take(places[400:])
        order = sequence(tuning, promise)
        found = certify(calibration, order, promise, tuning=tuning)
        if found.threshold is not None:
            certified += 1
            missed += np.interp(found.threshold, GRID, risk) > allowed
        missed_naively += np.interp(naive(calibration, GRID, promise), GRID, risk) > allowed
    return missed / repetitions, missed_naively / repetitions, certified / repetitions


@pytest.mark.parametrize("promise", PROMISES, ids=str)
def test_a_certified_threshold_misses_rarely_and_the_naive_one_half_of_the_time(promise: Promise) -> None:
    missed, naively, certified = misses(promise, 1500, 200)
    assert missed <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)  # three deviations of the count
    assert naively >= 0.3
    assert certified >= 0.5


def test_the_order_does_not_begin_at_the_accurate_model_alone() -> None:
    # .827 is above the accurate model's own accuracy: a start there fails at the first test.
    promise = Promise("min_accuracy", 0.827, 0.9)
    tuning, calibration = population(10_000, 3), population(60_000, 4)
    order = sequence(tuning, promise)
    assert order[0] < 1.0
    assert certify(calibration, order, promise, tuning=tuning).certified
    assert not Curve.of(calibration, np.array([NEVER])).passes(promise)[0]


def test_what_is_not_certifiable_says_how_many_would_do() -> None:
    tuning, calibration = population(300, 5), population(300, 6)
    near, beyond = Promise("min_accuracy", 0.82), Promise("min_accuracy", 0.95)
    found = certify(calibration, sequence(tuning, near), near, tuning=tuning)
    assert not found.certified
    assert str(found).startswith("min_accuracy 0.82 (guarantee 0.95): not certifiable with n = 300, ")
    found = certify(calibration, sequence(tuning, beyond), beyond, tuning=tuning)
    assert (found.certified, found.needed) == (False, None)
    assert "no larger set would do" in str(found)


def test_the_offload_and_the_disagreement_are_bounded() -> None:
    promise = Promise("min_agreement", 0.9)
    found = certify(population(5000, 8), sequence(population(1000, 7), promise), promise, tuning=population(1000, 7))
    truth = Curve.of(WHOLE, np.array([found.threshold]))
    assert 1 - truth.local[0] / truth.n <= found.offload_high
    assert truth.apart[0] / truth.n <= found.disagreement_high <= 0.12
    assert found.offload < found.offload_high < found.offload + 0.02


def test_too_little_and_unlabelled_data_are_refused() -> None:
    labelled, promise = population(99, 1), Promise("min_accuracy", 0.7)
    with pytest.raises(ConfigurationError, match="tuning split has 99 images; at least 100"):
        sequence(labelled, promise)
    bare = Pairs(WHOLE.scores[:200], WHOLE.agree[:200])
    with pytest.raises(ConfigurationError, match="cannot be shown without labels"):
        sequence(bare, promise)
    with pytest.raises(ConfigurationError, match="not finite"):
        sequence(Pairs(np.full(200, np.nan), WHOLE.agree[:200]), Promise("min_agreement", 0.9))


def drop_tail(n: int, q: float, drop: float, limit: int) -> float:
    """P(sum of D <= limit), summed over all outcomes."""
    chances = {1: (q + drop) / 2, 0: 1 - q, -1: (q - drop) / 2}
    return sum(
        float(np.prod([chances[one] for one in each])) for each in product(chances, repeat=n) if sum(each) <= limit
    )


def test_the_tail_of_differences_is_that_of_all_outcomes() -> None:
    from evenkeel.promises.differences import _tail

    for q, drop in ((0.5, 0.2), (0.3, 0.3), (0.9, 0.05)):
        begin, sums = _tail(7, q, drop)
        for limit in range(-7, 8):
            assert sums[limit - begin] == pytest.approx(drop_tail(7, q, drop, limit), abs=1e-12)


def test_a_drop_is_shown_at_its_level_whatever_the_spread() -> None:
    random, n, drop = np.random.default_rng(0), 1000, 0.02
    for q in (0.02, 0.05, 0.2, 0.6):
        draws = random.multinomial(n, [(q + drop) / 2, (q - drop) / 2, 1 - q], 4000)
        shown = [worse - better <= max_worse(n, int(worse + better), drop, 0.05) for worse, better, _ in draws]
        assert np.mean(shown) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000), q


@pytest.mark.parametrize(
    ("kind", "level", "guarantee", "words"),
    [
        ("min_accuracy", 1.0, 0.95, "between 0 and 1"),
        ("min_accuracy", float("nan"), 0.95, "between 0 and 1"),
        ("max_accuracy_drop", 0.0, 0.95, "between 0 and 1"),
        ("min_agreement", 0.9, 1.0, "guarantee"),
        ("min_agreement", 0.9, 0.2, "guarantee"),
        ("min_luck", 0.9, 0.95, "expected one of"),
    ],
)
def test_what_cannot_be_promised_is_refused(kind: str, level: float, guarantee: float, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Promise(kind, level, guarantee)  # type: ignore[arg-type]


def test_which_promises_cover_which() -> None:
    accuracy = Promise("min_accuracy", 0.8)
    assert accuracy.covers(Promise("min_accuracy", 0.75))
    assert accuracy.covers(Promise("min_accuracy", 0.8, 0.9))
    assert not accuracy.covers(Promise("min_accuracy", 0.81))
    assert not accuracy.covers(Promise("min_accuracy", 0.8, 0.99))
    assert Promise("max_accuracy_drop", 0.01).covers(Promise("max_accuracy_drop", 0.02))
    assert not Promise("max_accuracy_drop", 0.02).covers(Promise("max_accuracy_drop", 0.01))
    assert Promise("min_agreement", 0.99).covers(Promise("max_accuracy_drop", 0.01))
    assert not Promise("max_accuracy_drop", 0.01).covers(Promise("min_agreement", 0.99))


def test_splits_share_nothing_and_leave_nothing_out() -> None:
    parts = split(1001, 3)
    assert sorted(np.concatenate(parts)) == list(range(1001))
    assert [len(part) for part in parts] == [200, 601, 200]


def test_the_naive_threshold_is_the_lowest_that_keeps_the_promise_in_whatever_order_they_come() -> None:
    scores = np.arange(1000) / 1000
    pairs = Pairs(scores, scores >= 0.4)  # the models differ below .4 alone
    falling = np.array([2.0, 0.6, 0.4, 0.35, 0.2, 0.0])
    promise = Promise("min_agreement", 0.95)
    assert naive(pairs, falling, promise) == naive(pairs, falling[::-1], promise) == 0.35
