"""The test by betting keeps still while the claim holds, and speaks up when it does not."""

import numpy as np

from evenkeel.promises.betting import RateTest


def alarms(claimed: float, true: float, samples: int, repetitions: int) -> float:
    random = np.random.default_rng(0)
    tests = [RateTest(claimed, 0.05) for _ in range(repetitions)]
    for test in tests:
        for hit in (random.random(samples) < true).tolist():
            if test.add(hit):
                break
    return sum(test.alarm for test in tests) / repetitions


def test_false_alarms_are_as_rare_as_was_said() -> None:
    for claimed in (0.02, 0.3):
        assert alarms(claimed, claimed, 1000, 300) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_a_rate_twice_as_high_is_found() -> None:
    assert alarms(0.05, 0.1, 2000, 50) == 1.0


def test_an_alarm_stays() -> None:
    test = RateTest(0.1)
    while not test.add(True):
        pass
    for _ in range(1000):
        assert test.add(False)
    assert test.hits < test.samples
