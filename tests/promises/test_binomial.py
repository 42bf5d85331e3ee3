"""The binomial tails agree with exact fractions, and the bounds keep their level."""

from fractions import Fraction
from math import comb

import pytest

from evenkeel.promises.binomial import cdf, cdfs, lower_bound, max_errors, upper_bound


def exact(k: int, n: int, p: Fraction) -> Fraction:
    return sum((comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))


@pytest.mark.parametrize("n", [1, 7, 100, 1000])
@pytest.mark.parametrize("p", [Fraction(1, 100), Fraction(1, 5), Fraction(1, 2), Fraction(9, 10)])
def test_tails_agree_with_exact_fractions(n: int, p: Fraction) -> None:
    whole = cdfs(n, float(p))
    for k in {0, n // 100, n // 5, n // 2, n - 1, n}:
        right = float(exact(k, n, p))
        assert cdf(k, n, float(p)) == pytest.approx(right, rel=1e-9, abs=1e-300)
        assert whole[k] == pytest.approx(right, rel=1e-9, abs=1e-300)


def test_outside_and_at_the_ends() -> None:
    assert cdf(-1, 5, 0.5) == 0.0
    assert cdf(5, 5, 0.5) == 1.0
    assert list(cdfs(2, 0.0)) == [1.0, 1.0, 1.0]
    assert list(cdfs(2, 1.0)) == [0.0, 0.0, 1.0]


def test_so_few_errors_show_the_rate_and_one_more_does_not() -> None:
    for n, rate, delta in ((100, 0.2, 0.05), (5000, 0.2, 0.05), (300, 0.01, 0.05)):
        most = max_errors(n, rate, delta)
        right = [float(exact(k, n, Fraction(rate).limit_denominator(1000))) for k in (most, most + 1)]
        assert right[0] <= delta < right[1]
    assert max_errors(10, 0.01, 0.05) == -1  # even no error at all shows nothing


def test_bounds_are_where_the_tail_has_the_level() -> None:
    high = upper_bound(7, 200, 0.05)
    assert cdf(7, 200, high) == pytest.approx(0.05, rel=1e-6)
    low = lower_bound(7, 200, 0.05)
    assert 1 - cdf(6, 200, low) == pytest.approx(0.05, rel=1e-6)
    assert upper_bound(0, 59, 0.05) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert upper_bound(5, 5, 0.05) == 1.0
    assert lower_bound(0, 5, 0.05) == pytest.approx(0.0, abs=1e-12)
