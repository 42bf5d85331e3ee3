"""Live quantiles and the moments that triggers mean by them."""

from hypothesis import given, strategies as st

from evenkeel.serving.gateway.policy import Trigger
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
