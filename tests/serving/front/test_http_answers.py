"""The quick way to write one item's answer and its plain twin agree."""

from typing import get_args

import numpy as np
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from evenkeel.coding.code import Answer, Source
from evenkeel.oip import parse_response
from evenkeel.serving.front.answers import OUTPUTS, AnswerWriter
from evenkeel.serving.gateway.gateway import Outcome

CLASSES = ["a", "Ärger", "a longer name"]
SCORES = hnp.arrays(st.sampled_from([np.float32, np.float64]), 3, elements=st.floats(-1e6, 1e6, width=32))
OUTCOMES = st.builds(
    lambda scores, source, confidence, latency_s: Outcome(Answer(scores, source, confidence), None, latency_s),
    SCORES,
    st.sampled_from(get_args(Source)),
    st.floats(0, 1),
    st.floats(0, 100),
)


@given(st.lists(st.tuples(OUTCOMES, st.permutations(list(OUTPUTS)), st.integers(1, 5)), min_size=1, max_size=6))
def test_one_item_in_binary_is_written_alike_both_ways(answers):
    writer = AnswerWriter("toy", "1", CLASSES)
    for outcome, order, count in answers:
        names = order[:count]
        binary = [True] * count
        quick = writer.write([outcome], names, binary, None)
        assert quick == writer.write_any([outcome], names, binary, None)
        assert [output.name for output in parse_response(*quick).outputs] == names


@given(st.lists(OUTCOMES, min_size=1, max_size=3), st.lists(st.booleans(), min_size=5, max_size=5))
def test_any_number_of_items_in_any_form_say_the_same(outcomes, binary):
    writer = AnswerWriter("toy", "1", CLASSES)
    response = parse_response(*writer.write(outcomes, list(OUTPUTS), binary, "id"))
    scores, label, source, confidence, latency_ms = (output.data for output in response.outputs)
    for row, outcome in enumerate(outcomes):
        assert np.array_equal(scores[row], outcome.answer.value.astype(np.float32))
        assert label[row].decode() == CLASSES[int(outcome.answer.value.argmax())]
        assert source[row].decode() == outcome.answer.source
        assert confidence[row] == np.float32(outcome.answer.confidence)
        assert latency_ms[row] == np.float32(outcome.latency_s * 1e3)
