"""The tables against all tables, and their costs against published and measured figures."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from evenkeel.coding.sums.thc_table import clamp_error, clip, rounding_error, table
from evenkeel.errors import ConfigurationError


@pytest.mark.parametrize(
    ("bits", "granularity", "p"),
    [
        (1, 1, 0.3),
        (1, 4, 0.3),
        (2, 3, 1 / 8),
        (2, 11, 1 / 32),
        (2, 16, 1 / 1024),
        (3, 7, 1 / 16),
        (3, 12, 1 / 32),
        (3, 14, 0.01),
    ],
)
def test_no_table_is_better(bits: int, granularity: int, p: float) -> None:
    best = min(
        rounding_error((0, *inner, granularity), p) for inner in combinations(range(1, granularity), 2**bits - 2)
    )
    assert rounding_error(table(bits, granularity, p), p) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    ("bits", "granularity", "p", "rounding"),
    [
        (4, 15, 1 / 32, 0.01332),
        (4, 17, 1 / 32, 0.01253),
        (4, 30, 1 / 32, 0.01306),
        (4, 34, 1 / 32, 0.01213),
        (4, 51, 1 / 32, 0.01201),
        (4, 17, 1 / 64, 0.01521),
        (4, 36, 1 / 64, 0.01460),
        (4, 17, 1 / 128, 0.01781),
        (3, 7, 1 / 16, 0.04432),
        (3, 16, 1 / 16, 0.04202),
        (2, 3, 1 / 8, 0.1537),
        (2, 11, 1 / 32, 0.3136),
    ],
)
def test_costs_are_the_known_ones(bits: int, granularity: int, p: float, rounding: float) -> None:
    assert rounding_error(table(bits, granularity, p), p) == pytest.approx(rounding, rel=1e-3)


@pytest.mark.parametrize(
    ("p", "clamped"), [(1 / 8, 0.0419), (1 / 16, 0.01716), (1 / 32, 0.00727), (1 / 64, 0.00315), (1 / 128, 0.00139)]
)
def test_clamp_costs_are_the_known_ones(p: float, clamped: float) -> None:
    assert clamp_error(p) == pytest.approx(clamped, rel=4e-3)


def test_the_authors_own_table_is_a_little_worse() -> None:
    theirs = (0, 3, 5, 7, 9, 11, 13, 14, 16, 17, 19, 21, 23, 25, 27, 30)
    assert rounding_error(theirs, 1 / 32) == pytest.approx(0.01307, rel=1e-3)
    assert rounding_error(table(4, 30, 1 / 32), 1 / 32) < rounding_error(theirs, 1 / 32)


def test_costs_are_those_of_simulated_rounding() -> None:
    random = np.random.default_rng(4)
    z = random.normal(size=400_000)
    t, numbers = clip(1 / 16), np.array(table(3, 9, 1 / 16))
    levels = -t + 2 * t / 9 * numbers
    inside = z[np.abs(z) < t]
    above = np.searchsorted(levels, inside)
    variance = (inside - levels[above - 1]) * (levels[above] - inside)
    assert variance.sum() / z.size == pytest.approx(rounding_error(tuple(numbers.tolist()), 1 / 16), rel=0.01)
    assert (np.clip(np.abs(z) - t, 0, None) ** 2).mean() == pytest.approx(clamp_error(1 / 16), rel=0.05)


def test_all_bits_give_rising_tables_that_span_the_granularity() -> None:
    for bits in range(1, 9):
        for granularity in (2**bits - 1, 2**bits + 20):
            numbers = table(bits, granularity, 1 / 64)
            assert len(numbers) == 2**bits
            assert (numbers[0], numbers[-1]) == (0, granularity)
            assert all(low < high for low, high in pairwise(numbers))
    assert table(4, 17, 1 / 128) == (0, *range(2, 16), 17)


@pytest.mark.parametrize(
    ("bits", "granularity", "p", "message"),
    [
        (0, 15, 0.1, "bits: must be 1 to 8, found 0"),
        (9, 600, 0.1, "bits: must be 1 to 8, found 9"),
        (4, 14, 0.1, "granularity: must be 15 to 1024 for 4 bits, found 14"),
        (4, 1025, 0.1, "granularity: must be 15 to 1024"),
        (4, 17, 0.0, "p: the share of clipped coordinates"),
        (4, 17, 1.0, "p: the share of clipped coordinates"),
        (4, 17, float("nan"), "p: the share of clipped coordinates"),
    ],
)
def test_wrong_settings_are_refused_by_name(bits: int, granularity: int, p: float, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        table(bits, granularity, p)
