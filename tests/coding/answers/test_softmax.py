"""Confidence: the fast way for few classes agrees with the softmax that it stands for."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.coding.answers.scores import confidence, softmax


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=120), st.floats(0.05, 20))
def test_confidence_is_the_highest_probability_for_few_classes_and_for_many(logits, temperature):
    scores = np.array(logits, dtype=np.float32)
    assert confidence(scores, temperature) == pytest.approx(softmax(scores, temperature).max(), rel=1e-9)
