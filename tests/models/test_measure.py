"""What is measured of model files without torch."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.models.measure import (
    calibration_error,
    fit_temperature,
    interleaved_latencies_ms,
    interleaved_times_ms,
    reliability_table,
    shuffled_groups,
)


def test_passes_are_timed_in_turn():
    calls = []
    times_ms = interleaved_times_ms([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3)
    assert calls == ["a", "b"] * 4  # once before, untimed
    assert times_ms.shape == (3, 2)
    assert (times_ms >= 0).all()
    assert len(interleaved_latencies_ms([lambda: None], rounds=2)) == 1


def test_groups_hold_no_image_twice():
    groups = shuffled_groups(40, 9, seed=5)
    assert groups.shape == (4, 9)
    assert len(np.unique(groups)) == 36


def test_reliability_by_hand():
    confidences = np.array([0.1, 0.5, 0.5, 0.55, 1.0])
    right = np.array([False, True, False, True, True])
    assert reliability_table(confidences, right, bins=2) == ((0.0, 0.5, 3, 0.33333), (0.5, 1.0, 2, 1.0))
    # |1 - 1.1| + |2 - 1.55| over five
    assert calibration_error(confidences, right, bins=2) == pytest.approx((0.1 + 0.45) / 5)
    assert math.isnan(calibration_error(np.array([]), np.array([], bool)))
    assert reliability_table(np.array([]), np.array([], bool)) == ()


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50), st.integers(1, 20))
def test_every_answer_has_its_step(answers, bins):
    confidences, right = map(np.array, zip(*answers, strict=True))
    table = reliability_table(confidences, right, bins)
    assert sum(row[2] for row in table) == len(answers)
    assert all(0 <= row[0] < row[1] <= 1 and 0 <= row[3] <= 1 for row in table)
    assert 0 <= calibration_error(confidences, right, bins) <= 1


def test_sure_and_always_right_is_calibrated_and_unsure_and_right_is_not():
    assert calibration_error(np.ones(10), np.ones(10)) == 0
    assert calibration_error(np.full(10, 0.6), np.ones(10)) == pytest.approx(0.4)


def test_measuring_needs_no_torch():
    code = "import sys, evenkeel.models.measure; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "torch" not in loaded.stdout.split()


def test_temperature_makes_confidence_what_it_is_worth():
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, 4000)
    scores = (3 * np.eye(5)[labels] + random.normal(size=(4000, 5))).astype(np.float32)
    found = fit_temperature(scores * 7, labels)
    assert fit_temperature(scores, labels) == pytest.approx(found / 7, rel=0.01)
    confidences = (np.exp(scores * 7 / found) / np.exp(scores * 7 / found).sum(1, keepdims=True)).max(1)
    assert confidences.mean() == pytest.approx((scores.argmax(1) == labels).mean(), abs=0.01)


@pytest.mark.parametrize("count", [1, 20, 100, 2000])
def test_a_few_images_that_are_all_right_make_no_answer_certain(count):
    """The likelihood alone is highest at a temperature of zero."""
    labels = np.arange(count) % 4
    scores = (np.eye(4)[labels] * 5).astype(np.float32)
    temperature = fit_temperature(scores, labels)
    confidence = 1 / (1 + 3 * math.exp(-5 / temperature))
    assert confidence == pytest.approx((count + 1) / (count + 2), abs=0.002 / count)


def test_scores_of_a_large_scale_get_a_large_temperature():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    scores = (1000 * np.eye(2)[np.where(random.random(400) < 0.7, labels, 1 - labels)]).astype(np.float32)
    assert 1 / (1 + math.exp(-1000 / fit_temperature(scores, labels))) == pytest.approx(0.7, abs=0.06)
