import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import EvenkeelError
from evenkeel.figures.estimates import (
    exact_share,
    grouped_share,
    mean,
    quantile,
    quantile_ratio,
    rate,
    sd,
    sd_ratio,
    share,
)

# Published or exactly computable values.


def test_the_interval_of_a_median_of_ten_is_second_to_ninth():
    # P(2 <= Binomial(10, 1/2) <= 8) = 1002/1024, the textbook case.
    estimate = quantile(range(1, 11), 0.5)
    assert (estimate.value, estimate.low, estimate.high) == (5.0, 2.0, 9.0)


@pytest.mark.parametrize(("level", "enough"), [(0.99, 368), (0.999, 3688)])
def test_a_small_sample_has_no_upper_bound(level, enough):
    # The largest of n is above the quantile with probability 1 - level ** n; 97.5 % is wanted.
    assert level**enough < 0.025 < level ** (enough - 1)
    assert math.isnan(quantile(range(enough - 1), level).high)
    assert quantile(range(enough), level).high == enough - 1


def test_a_tiny_sample_has_no_bounds_at_all():
    estimate = quantile([3.0], 0.5)
    assert estimate.value == 3.0
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)
    assert math.isnan(quantile([], 0.5).value)


def test_a_share_has_wilsons_interval():
    # Newcombe 1998, Table I: 81 of 263 and 15 of 148, without continuity correction.
    assert share(81, 263).low == pytest.approx(0.2553, abs=1e-4)
    assert share(81, 263).high == pytest.approx(0.3662, abs=1e-4)
    assert share(15, 148).low == pytest.approx(0.0624, abs=1e-4)
    assert share(15, 148).high == pytest.approx(0.1605, abs=1e-4)
    assert (share(0, 20).low, share(0, 20).value) == (0.0, 0.0)
    assert share(20, 20).high == 1.0
    assert math.isnan(share(0, 0).value)
    with pytest.raises(EvenkeelError, match="0 to 3 hits, found 4"):
        share(4, 3)


@pytest.mark.parametrize(
    ("count", "student"), [(2, 12.706), (3, 4.303), (5, 2.776), (6, 2.571), (11, 2.228), (31, 2.042), (10_001, 1.960)]
)
def test_a_mean_has_students_interval(count, student):
    values = np.arange(count, dtype=float)
    estimate = mean(values)
    assert estimate.value == pytest.approx((count - 1) / 2)
    half = student * values.std(ddof=1) / math.sqrt(count)
    assert estimate.high - estimate.value == pytest.approx(half, rel=6e-4)
    assert estimate.value - estimate.low == pytest.approx(half, rel=6e-4)


def test_a_count_may_exceed_its_exposure():
    estimate = rate(100, 50)
    assert estimate.value == 2.0
    # Exact Poisson bounds for 100 events are 81.4 and 121.6.
    assert estimate.low * 50 == pytest.approx(82.2, abs=1)
    assert estimate.high * 50 == pytest.approx(121.6, abs=0.5)
    assert rate(0, 100).low == 0.0
    assert 0.03 < rate(0, 100).high < 0.04
    assert math.isnan(rate(0, 0).value)


# Intervals must hold the truth in about 95 % of repetitions; 400 repetitions leave a standard error of 1.1 points.


def coverage(estimate_of, truth, draw, repetitions=400):
    random = np.random.default_rng(1)
    held = 0
    for _ in range(repetitions):
        estimate = estimate_of(draw(random))
        held += estimate.low <= truth <= estimate.high
    return held / repetitions


def lognormal(random):
    return random.lognormal(-1.977, 0.222, 800)


def test_intervals_hold_the_truth():
    z95 = NormalDist().inv_cdf(0.95)
    deviation = math.exp(-1.977 + 0.222**2 / 2) * math.sqrt(math.exp(0.222**2) - 1)
    assert coverage(mean, math.exp(-1.977 + 0.222**2 / 2), lognormal) == pytest.approx(0.95, abs=0.035)
    assert coverage(sd, deviation, lognormal) == pytest.approx(0.95, abs=0.045)
    truth = math.exp(-1.977 + 0.222 * z95)
    assert 0.93 < coverage(lambda values: quantile(values, 0.95), truth, lognormal) <= 0.995
    assert coverage(lambda hits: share(int(hits), 200), 0.1, lambda random: random.binomial(200, 0.1)) == (
        pytest.approx(0.95, abs=0.035)
    )


def test_a_ratio_of_quantiles_is_sharper_when_paired():
    random = np.random.default_rng(2)
    slow = random.lognormal(0, 0.5, 3000)
    quick = slow / 3.0
    paired = quantile_ratio(slow, quick, 0.99, paired=True, resamples=200)
    apart = quantile_ratio(slow, quick, 0.99, paired=False, resamples=200)
    assert (paired.low, paired.value, paired.high) == pytest.approx((3.0, 3.0, 3.0))
    assert apart.low < 2.9 < 3.1 < apart.high
    assert apart == quantile_ratio(slow, quick, 0.99, paired=False, resamples=200), "the seed is fixed"
    assert sd_ratio(slow, quick, paired=True, resamples=50).low == pytest.approx(3.0)


def test_a_ratio_holds_the_truth():
    def draw(random):
        return random.exponential(2.0, 500), random.exponential(1.0, 500)

    held = coverage(
        lambda pair: quantile_ratio(pair[0], pair[1], 0.9, paired=False, resamples=200), 2.0, draw, repetitions=100
    )
    assert held >= 0.88


def test_paired_samples_must_be_of_one_number():
    with pytest.raises(EvenkeelError, match="found 3 and 2"):
        quantile_ratio([1, 2, 3], [1, 2], 0.5, paired=True)


def test_constant_samples_have_no_spread():
    assert sd([2.0] * 9).value == 0.0
    assert mean([2.0] * 9).low == 2.0
    assert quantile([2.0] * 9, 0.5).high == 2.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.001, 0.999))
def test_bounds_are_on_their_sides(values, level):
    estimate = quantile(values, level)
    assert not estimate.low > estimate.value
    assert not estimate.high < estimate.value


def test_a_level_must_be_between_zero_and_one():
    with pytest.raises(EvenkeelError, match="between 0 and 1, found 99"):
        quantile([1.0], 99)


def test_a_grouped_share_of_single_trials_is_a_share():
    hits = np.array([1, 0, 1, 1, 0, 1, 1])
    estimate, plain = grouped_share(hits, np.ones(7)), share(5, 7)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((plain.value, plain.low, plain.high))
    assert grouped_share(np.append(hits, 0), np.append(np.ones(7), 0)) == estimate  # a group without trials
    assert math.isnan(grouped_share([], []).value)


def test_repeating_the_same_trials_tells_nothing_new():
    hits = np.array([1, 0, 1, 1, 0, 1, 1])
    assert grouped_share(3 * hits, np.full(7, 3)).low == pytest.approx(grouped_share(hits, np.ones(7)).low)
    assert (grouped_share(np.zeros(5), np.full(5, 9)).high, share(0, 5).low) == (share(0, 5).high, 0)


def test_trials_that_do_not_depend_on_their_group_all_count():
    hits = np.random.default_rng(0).binomial(4, 0.8, 2000)
    estimate, plain = grouped_share(hits, np.full(2000, 4)), share(int(hits.sum()), 8000)
    assert estimate.high - estimate.low == pytest.approx(plain.high - plain.low, rel=0.05)


def test_the_interval_of_a_grouped_share_covers_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        chance = random.beta(4, 1, 150)  # mean .8, groups very different
        counts = random.integers(1, 5, 150)
        estimate = grouped_share(random.binomial(counts, chance), counts)
        covered += estimate.low <= 0.8 <= estimate.high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(5, 10, 0.18709, 0.81291), (0, 10, 0.0, 0.30850), (10, 10, 0.69150, 1.0), (990, 1000, 0.98169, 0.99519)],
)
def test_clopper_and_pearsons_interval(hits, count, low, high):
    """Values of published tables."""
    found = exact_share(hits, count)
    assert found.value == hits / count
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-5)


def test_an_exact_share_of_nothing_and_of_too_much():
    assert np.isnan(exact_share(0, 0).value)
    with pytest.raises(EvenkeelError, match="0 to 3 hits, found 4"):
        exact_share(4, 3)
