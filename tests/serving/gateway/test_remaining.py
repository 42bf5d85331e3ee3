"""What is left of a service time."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.serving.gateway.remaining import Remaining

TIMES = st.lists(st.floats(0.001, 100), min_size=20, max_size=200).map(sorted)


@given(TIMES, st.floats(0, 1))
def test_it_is_what_the_longer_samples_exceed_the_age_by_in_the_mean(times, place):
    quartile, longest = times[len(times) * 3 // 4], times[-1]
    age = quartile + place * (longest - quartile) * 1.1
    longer = [seconds - age for seconds in times if seconds > age]
    assert Remaining(times).left_s(age) == pytest.approx(np.mean(longer) if longer else age, abs=1e-9)


@given(TIMES)
def test_the_first_age_at_which_another_attempt_pays_is_the_first(times):
    remaining = Remaining(times)
    start = times[len(times) * 3 // 4]
    first = remaining.first_paying_s(start)
    paying = [age for age in (start, *times[:-1]) if age >= start and remaining.pays(age)]
    assert first == min(paying, default=float("inf"))


def test_most_is_left_just_before_a_slow_mode():
    times = sorted([*np.linspace(0.1, 0.2, 900), *np.linspace(0.65, 0.75, 100)])
    remaining = Remaining(times)
    assert remaining.pays(0.18)
    assert not remaining.pays(0.66)
    assert remaining.most_s(0.18) == pytest.approx(0.2)
