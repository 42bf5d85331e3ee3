"""Live quantiles and the moments that triggers mean by them."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.delays.laws import TwoMode
from evenkeel.serving.gateway.policy import AUTO_FILL, AUTO_HEDGE, Trigger
from evenkeel.serving.gateway.quantile import LiveQuantiles

TIMES = st.lists(st.floats(0, 100, allow_nan=False), max_size=120)


@given(TIMES, st.floats(0.01, 0.999), st.integers(1, 40))
def test_a_quantile_is_the_one_of_the_last_samples(samples, q, window):
    live = LiveQuantiles(window=window, enough=1)
    for number, sample in enumerate(samples, start=1):
        live.add(sample)
        last = sorted(samples[max(0, number - window) : number])
        assert live.quantile(q) == last[min(int(q * len(last)), len(last) - 1)]


def test_nothing_is_told_from_too_few_samples():
    live = LiveQuantiles(enough=3)
    for _ in range(2):
        live.add(1.0)
        assert live.quantile(0.5) is None
    live.add(1.0)
    assert live.quantile(0.5) == 1.0


def test_a_fixed_trigger_needs_no_samples():
    assert LiveQuantiles().after(Trigger(fixed_s=0.3)) == 0.3


def test_a_live_trigger_starts_from_its_guess_and_keeps_between_floor_and_ceiling():
    live = LiveQuantiles(window=20)
    trigger = Trigger(quantile=0.95, floor_s=0.1, ceiling_s=2.0, initial_s=0.7)
    assert live.after(trigger) == 0.7
    for seconds, moment in ((0.01, 0.1), (1.5, 1.5), (9.0, 2.0)):
        for _ in range(20):
            live.add(seconds)
        assert live.after(trigger) == moment


def late_s(times, trigger=AUTO_FILL):
    live = LiveQuantiles(window=len(times))
    for seconds in times:
        live.add(float(seconds))
    return live.after(trigger)


@pytest.mark.parametrize("slow_share", [0.0, 0.02, 0.05, 0.06, 0.1, 0.15, 0.2])
def test_late_is_after_the_body_and_before_the_slow_mode(slow_share):
    law = TwoMode(slow_share=slow_share, seed=3)
    times = np.array([law.draw(key, 0, 0.0) for key in range(1000)])
    body = times[times < 0.45]
    for trigger in (AUTO_FILL, AUTO_HEDGE):
        moment = late_s(times, trigger)
        if trigger is AUTO_HEDGE and slow_share <= 0.02:
            assert moment > np.quantile(body, 0.9)  # without many stragglers it pays later, or never
        else:
            assert np.quantile(body, 0.8) < moment < 0.45


def test_nothing_is_late_that_is_merely_above_average():
    steady = np.random.default_rng(0).normal(0.1, 0.001, 1000)
    assert late_s(steady) == np.sort(steady)[950]
    assert late_s([0.1] * 100) == 0.1
    uniform = np.random.default_rng(0).uniform(0.1, 0.3, 1000)
    assert late_s(uniform) == np.sort(uniform)[950]


@pytest.mark.parametrize("draw", ["normal", "uniform", "lognormal"])
def test_a_hedge_never_pays_where_waiting_on_is_quicker_than_asking_again(draw):
    random = np.random.default_rng(1)
    times = {"normal": random.normal(5, 1, 1000), "uniform": random.uniform(1, 3, 1000)}.get(
        draw, np.exp(random.normal(0, 0.2, 1000))
    )
    assert late_s(times, AUTO_HEDGE) == AUTO_HEDGE.ceiling_s


def test_the_moment_follows_a_fleet_that_becomes_slower():
    live = LiveQuantiles()
    law = TwoMode(slow_share=0.1)
    for key in range(3000):
        live.add(law.draw(key, 0, 0.0) * (1.0 if key < 1500 else 3.0))
        if key in (1499, 2999):
            scale = 1.0 if key == 1499 else 3.0
            assert 0.17 * scale < live.after(AUTO_HEDGE) <= live.after(AUTO_FILL) < 0.4 * scale
