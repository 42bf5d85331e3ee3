"""Priorities order fragments as ESA's three factors do, over the whole range of job lengths."""

import math

import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import ConfigurationError
from evenkeel.switch.priority import LEAST, MOST, JobClock, PriorityMeter, Urgency, priority

times = st.floats(1e-3, 1e6)


def test_an_hour_left_and_as_much_communication_as_computation_is_the_middle():
    assert priority(Urgency(3600, 1, 1)) == 128


@pytest.mark.parametrize(
    ("urgency", "layer", "points"),
    [
        (Urgency(1800, 1, 1), 1, 16),
        (Urgency(7200, 1, 1), 1, -16),
        (Urgency(3600, 2, 1), 1, 16),
        (Urgency(3600, 1, 4), 1, -32),
        (Urgency(3600, 1, 1), 8, -48),
    ],
)
def test_each_factor_of_two_is_sixteen_points(urgency, layer, points):
    assert priority(urgency, layer) == 128 + points


@given(remaining=times, communication=times, computation=times, layer=st.integers(1, 1000), factor=st.floats(1, 100))
def test_more_urgent_is_never_less(remaining, communication, computation, layer, factor):
    here = priority(Urgency(remaining, communication, computation), layer)
    assert LEAST <= here <= MOST
    assert priority(Urgency(remaining / factor, communication, computation), layer) >= here
    assert priority(Urgency(remaining, communication * factor, computation), layer) >= here
    assert priority(Urgency(remaining, communication, computation * factor), layer) <= here
    assert priority(Urgency(remaining, communication, computation), layer + 1) <= here


def test_jobs_of_ten_seconds_and_of_a_day_are_apart_and_neither_is_at_the_end():
    short, long = priority(Urgency(60, 1, 1)), priority(Urgency(86400, 1, 1))
    assert LEAST < long < short < MOST


def test_what_cannot_be_divided_has_its_place():
    assert priority(Urgency(10, 0, 1)) == LEAST
    assert priority(Urgency(10, 1, 0)) == MOST
    assert priority(Urgency(0, 1, 1)) == MOST


@pytest.mark.parametrize(
    ("urgency", "layer"),
    [(Urgency(-1, 1, 1), 1), (Urgency(math.nan, 1, 1), 1), (Urgency(1, math.inf, 1), 1), (Urgency(1, 1, 1), 0)],
)
def test_numbers_that_no_job_has_are_refused(urgency, layer):
    with pytest.raises(ConfigurationError):
        priority(urgency, layer)


def test_a_job_is_measured_by_its_latest_steps():
    clock = JobClock(steps=100)
    assert clock.urgency is None
    for _ in range(50):
        clock.step(1.0, 3.0)
    assert clock.urgency == Urgency(200.0, 1.0, 3.0)
    for _ in range(40):
        clock.step(2.0, 2.0)
    assert clock.urgency == Urgency(40.0, 2.0, 2.0)


def test_a_job_of_unknown_length_counts_what_it_has_taken():
    clock = JobClock()
    for _ in range(10):
        clock.step(1.0, 1.0)
    assert clock.urgency == Urgency(20.0, 1.0, 1.0)
    with pytest.raises(ConfigurationError, match="times must be finite"):
        clock.step(-1.0, 1.0)
    with pytest.raises(ConfigurationError, match="steps: must be at least 1"):
        JobClock(0)


def test_a_training_is_measured_as_it_goes():
    meter = PriorityMeter(steps=3602)
    found = []
    for step in range(3):
        for exchange in range(4):
            found.append(meter.begin(step, step + 0.1 * exchange))
            meter.end(0.125)
    assert found[:4] == [128] * 4  # nothing is known yet
    # 3,600 steps of a second are left, half of it communication; the first layers' gradients come last.
    assert found[4:8] == [priority(Urgency(3601, 0.5, 0.5), layer) for layer in (4, 3, 2, 1)]
    assert found[8:] == [96, 103, 112, 128]


def test_what_no_clock_can_say_is_no_error():
    meter = PriorityMeter()
    meter.begin(0, 5.0)
    meter.end(100.0)
    assert meter.begin(1, 4.0) == LEAST  # the clock was set back: a step that took no time
    meter.end(1.0)
    assert meter.begin(2, 6.0) > LEAST
