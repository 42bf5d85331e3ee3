"""The confidence below which fills are not used: rare classes are not filled wrongly, and others are left alone."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from evenkeel.figures.estimates import share
from evenkeel.models.gate import NEVER, by_class, gate


def test_agreement_is_told_class_by_class() -> None:
    answers = np.array([0] * 95 + [2] * 5)
    fills = np.array([0] * 90 + [2] * 5 + [2] + [0] * 4)
    found = by_class(answers, fills)
    assert (found.images, found.agreed, found.largest) == ({0: 95, 2: 5}, {0: 90, 2: 1}, 0)
    assert found.largest_share == 0.95
    assert found.elsewhere.value == pytest.approx(0.2)
    assert found.elsewhere.high < 0.7


def test_a_network_that_knows_only_the_largest_class_fills_none_of_the_others() -> None:
    """193 of 198 answers are one class: it agrees in 97.5 %, and was right for no other."""
    answers = np.array([0] * 193 + [1] * 5)
    fills = np.zeros(198, np.int64)
    random = np.random.default_rng(0)
    unsure = np.concatenate([random.uniform(0.9, 1, 193), random.uniform(0.8, 0.93, 5)])
    least = gate(answers, fills, unsure)
    assert unsure[193:].max() < least < 0.94
    assert gate(answers, fills, np.concatenate([random.uniform(0.5, 0.9, 193), np.ones(5)])) == NEVER
    assert gate(answers, fills, np.ones(198)) == NEVER


def test_false_alarms_of_a_rare_class_are_held_back_too() -> None:
    answers, fills = np.array([0] * 180 + [1] * 20), np.array([1] * 40 + [0] * 140 + [1] * 20)
    confidences = np.array([0.6] * 40 + [0.99] * 140 + [0.9] * 20)
    assert 0.6 < gate(answers, fills, confidences) < 0.9


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("right", [0.4, 0.6, 0.9])
def test_classes_that_are_alike_get_no_gate(classes: int, right: float) -> None:
    random = np.random.default_rng(0)
    answers = random.permutation(np.arange(2000) % classes)
    fills = np.where(random.random(2000) < right, answers, random.integers(0, classes, 2000))
    assert gate(answers, fills, random.random(2000)) == 0


def test_a_rare_class_that_is_filled_well_gets_no_gate_and_a_single_image_makes_none() -> None:
    answers = np.array([0] * 190 + [1] * 10)
    fills = np.where(np.arange(200) == 191, 0, answers)
    assert gate(answers, fills, np.linspace(0.5, 1, 200)) == 0
    assert gate(np.array([0] * 199 + [1]), np.zeros(200, np.int64), np.ones(200)) == 0
    odd = np.array([0] * 192 + [1, 2, 2, 3, 4, 4, 5, 6])  # of no account, and all filled as class 0
    assert gate(odd, np.zeros(200, np.int64), np.ones(200)) == 0
    many = np.array([0] * 150 + list(range(1, 51)))  # a quarter of all
    assert gate(many, np.zeros(200, np.int64), np.ones(200)) == NEVER
    assert gate(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)) == 0


@settings(deadline=None)
@given(
    arrays(np.int64, 120, elements=st.sampled_from([0] * 12 + [1, 2])),
    arrays(np.int64, 120, elements=st.sampled_from([0] * 12 + [1, 2])),
    arrays(np.float64, 120, elements=st.sampled_from([0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])),
)
def test_of_what_passes_a_gate_rare_classes_are_as_often_right_as_wrong(
    answers: np.ndarray, fills: np.ndarray, confidences: np.ndarray
) -> None:
    least = gate(answers, fills, confidences)
    passing = confidences >= least
    images = np.bincount(answers, minlength=3)
    rare = images <= images.max() / 4
    right = answers == fills
    for number in np.flatnonzero(rare & (images >= 5)).tolist():
        concerned = (answers == number) | (fills == number)
        if share(int(right[concerned].sum()), int(concerned.sum())).high < 0.5:
            assert 2 * int(right[concerned & passing].sum()) >= int((concerned & passing).sum())
    if least > 0:
        assert not (confidences == least).any()  # a digit more or less makes no difference
