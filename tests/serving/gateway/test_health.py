"""When one replica is out, and how it comes back. All times are seconds; the fleet's median is one."""

import numpy as np
import pytest

from evenkeel.delays.laws import Pareto, ShiftedExponential, TwoMode
from evenkeel.serving.gateway.health import Health, HealthSettings


def replies(health, *seconds):
    for one in seconds:
        health.replied(one)
    return health


def test_a_row_of_slow_replies_is_a_slow_machine():
    assert replies(Health(HealthSettings()), *[4.0] * 8).is_slow(1.0)


def test_one_fast_reply_in_the_row_does_not_clear_it():
    assert replies(Health(HealthSettings()), *[4.0] * 4, 1.0, *[4.0] * 3).is_slow(1.0)


def test_two_do():
    assert not replies(Health(HealthSettings()), *[4.0] * 4, 1.0, 1.0, *[4.0] * 2).is_slow(1.0)


def test_a_replica_whose_last_reply_is_fast_is_not_slow():
    assert not replies(Health(HealthSettings()), *[4.0] * 7, 1.0).is_slow(1.0)


def test_nobody_is_slow_before_there_is_something_to_compare():
    assert not replies(Health(HealthSettings()), *[4.0] * 7).is_slow(1.0)
    assert not replies(Health(HealthSettings()), *[4.0] * 8).is_slow(None)


@pytest.mark.parametrize("law", [TwoMode(), Pareto(), ShiftedExponential(0.1, 10.0)])
def test_healthy_replicas_are_not_ejected_however_heavy_the_tail_of_their_times(law):
    times = [law.draw(key, 0, 0.0) for key in range(50_000)]
    health, median = Health(HealthSettings()), float(np.median(times))
    slow = 0
    for seconds in times:
        health.replied(seconds)
        slow += health.is_slow(median)
    assert slow <= 1


def test_only_errors_in_a_row_are_a_failing_replica():
    health = Health(HealthSettings(max_failures=3))
    assert [health.failed(), health.failed()] == [False, False]
    health.replied(1.0)
    assert [health.failed(), health.failed(), health.failed()] == [False, False, True]


def ejected(reason="slow", at=10.0, **settings):
    health = Health(HealthSettings(**settings))
    health.eject(reason, at)
    return health


def test_the_first_probe_is_due_after_a_pause_and_there_is_one_at_a_time():
    health = ejected(pause_s=2.0)
    assert not health.wants_probe(11.9)
    assert health.wants_probe(12.0)
    health.probe_sent()
    assert not health.wants_probe(13.0)


def test_good_probes_bring_a_slow_replica_back():
    health = ejected(probes=2)
    assert not health.probe_back(1.0, 1.0, 12.0)
    assert health.wants_probe(12.0)  # the second may follow at once
    assert health.probe_back(1.0, 1.0, 13.0)


@pytest.mark.parametrize("service_s", [None, 5.0])
def test_a_bad_probe_doubles_the_pause_up_to_its_limit(service_s):
    health = ejected(at=0.0, pause_s=1.0, max_pause_s=4.0)
    now = 1.0
    for pause in (2.0, 4.0, 4.0):
        health.probe_sent()
        assert not health.probe_back(service_s, 1.0, now)
        assert not health.wants_probe(now + pause - 0.01)
        assert health.wants_probe(now + pause)
        now += pause


def test_a_bad_probe_wipes_out_the_good_one_before():
    health = ejected(probes=2, pause_s=0.0)
    assert [health.probe_back(seconds, 1.0, 1.0) for seconds in (1.0, 5.0, 1.0, 1.0)] == [False, False, False, True]


def test_a_stalled_replica_is_well_with_any_answer_but_not_with_an_error():
    assert not ejected("stalled").probe_back(None, 1.0, 12.0)
    assert ejected("stalled").probe_back(100.0, 1.0, 12.0)


def test_who_comes_back_has_a_clean_record():
    health = replies(Health(HealthSettings(pause_s=1.0)), *[4.0] * 8)
    health.eject("slow", 0.0)
    health.eject("slow", 0.0)
    health.readmit()
    assert not health.ejected
    assert not health.is_slow(1.0)
    health.eject("slow", 0.0)
    assert health.wants_probe(1.0)


def test_a_probe_that_comes_back_after_the_readmission_changes_nothing():
    health = ejected()
    health.probe_sent()
    health.readmit()
    assert not health.probe_back(100.0, 1.0, 12.0)
    assert not health.ejected


def test_silence_is_over_once_the_replica_has_become_ready_anew():
    health = Health(HealthSettings())
    health.eject("stalled", 0.0)
    assert health.joined(1.0, try_first=False)
    assert not health.joined(1.0, try_first=True)
    assert health.ejected_for == "untried"
    assert health.wants_probe(1.0)
