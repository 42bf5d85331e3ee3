"""What a request needs of its answers, as parameters; and the outputs that say what is promised."""

from typing import Any

import numpy as np
import pytest

from evenkeel.coding.code import Answer
from evenkeel.errors import RequestError
from evenkeel.oip import InferRequest
from evenkeel.promises.promise import Promise
from evenkeel.serving.front.answers import AnswerWriter
from evenkeel.serving.front.items import read_options
from evenkeel.serving.gateway.gateway import Options, Outcome


def test_needs_are_read() -> None:
    parameters = {"min_accuracy": 0.8, "guarantee": 0.9, "timeout": 1000, "max_cost": 0.5, "on_miss": "degrade"}
    promise = Promise("min_accuracy", 0.8, 0.9)
    assert read_options(parameters) == Options(timeout_s=0.001, promise=promise, max_cost=0.5, degrade=True)
    assert read_options({"max_accuracy_drop": 0.01}).promise == Promise("max_accuracy_drop", 0.01)
    assert read_options({"on_miss": "reject"}) == Options(degrade=False)
    assert read_options({"min_agreement": 0.9, "packet_loss": 0.1}).loss == 0.1


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"min_accuracy": 0.8, "max_accuracy_drop": 0.1}, "contradict each other"),
        ({"min_accuracy": 0.8, "exact": True}, "contradict each other"),
        ({"min_accuracy": 0.8, "min_confidence": 0.1}, "contradict each other"),
        ({"min_accuracy": 1.5}, "number from 0 to 1"),
        ({"min_accuracy": 1.0}, "between 0 and 1"),
        ({"min_accuracy": True}, "number from 0 to 1"),
        ({"min_accuracy": float("nan")}, "number from 0 to 1"),
        ({"min_accuracy": "0.8"}, "number from 0 to 1"),
        ({"min_accuracy": 0.8, "guarantee": 0.1}, "guarantee"),
        ({"guarantee": 0.9}, "needs a promise"),
        ({"on_miss": "panic"}, "degrade or reject"),
        ({"on_miss": 3}, "degrade or reject"),
        ({"max_cost": -1}, "max_cost"),
        ({"min_accuracy": 0.8, "packet_loss": 2}, "packet_loss"),
    ],
)
def test_needs_that_cannot_be_met_or_contradict_each_other_are_refused(parameters: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_options(parameters)


def test_answers_say_their_path_and_certificate_where_something_is_promised() -> None:
    scores = np.array([0.0, 1.0], np.float32)
    outcomes = [
        Outcome(Answer(scores, "edge", 0.9), None, 0.1, "abc"),
        Outcome(Answer(scores, "exact", 0.9), None, 0.1, "abc"),
        Outcome(Answer(scores, "degraded", 0.4), None, 0.1),
    ]
    request = InferRequest(inputs=[])
    writer = AnswerWriter("m", "1", ("cat", "dog"), promised=True)
    names, binary = writer.wanted(request)
    assert names[-2:] == ("path", "certificate")
    body, _ = writer.write(outcomes, names, binary, None)
    assert b'"data":["edge","data centre","degraded"]' in body
    assert b'"data":["abc","abc",""]' in body
    one, _ = writer.write(outcomes[:1], names, [True] * len(names), None)
    assert one == writer.write_any(outcomes[:1], names, [True] * len(names), None)[0]
    assert "path" not in AnswerWriter("m", "1", ("cat", "dog")).wanted(request)[0]
