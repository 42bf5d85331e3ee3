"""Replicate and Cheap: spares that are the items themselves."""

import numpy as np
import pytest

from evenkeel.coding.answers import Cheap, Replicate, ScoreForm
from evenkeel.coding.answers.scores import confidence
from evenkeel.errors import CodeError, ConfigurationError


def item(value: int) -> np.ndarray:
    return np.full((2, 2, 3), value, np.uint8)


def row(*scores: float) -> np.ndarray:
    return np.array([scores], np.float32)


def test_copies_are_tasks_of_one_item_each() -> None:
    tasks = Replicate(ScoreForm(2), copies=2, max_items=3).spares([item(1), item(2)])
    assert [task.covers for task in tasks] == [(0,), (1,), (0,), (1,)]
    assert [int(task.inputs[0, 0, 0, 0]) for task in tasks] == [1, 2, 1, 2]
    assert all(task.inputs.shape == (1, 2, 2, 3) for task in tasks)


def test_any_copy_answers_exactly() -> None:
    code = Replicate(ScoreForm(2), copies=2, max_items=3)
    answers = code.decode(2, {5: row(1, 2), 2: row(3, 0)})
    assert {number: answer.value.tolist() for number, answer in answers.items()} == {0: [3, 0], 1: [1, 2]}
    assert {answer.source for answer in answers.values()} == {"exact"}


def test_a_later_copy_does_not_change_an_answer() -> None:
    code = Replicate(ScoreForm(2), copies=2)
    replies = {0: row(1, 0), 1: row(1.5, 0), 2: row(1.25, 0)}  # as from machines that round differently
    assert code.decode(1, replies)[0].value.tolist() == [1, 0]


def test_a_copy_that_is_not_finite_leaves_room_for_the_next() -> None:
    code = Replicate(ScoreForm(2), copies=1, max_items=1)
    assert code.decode(1, {0: row(np.nan, 0), 1: row(1, 2)})[0].value.tolist() == [1, 2]


def test_each_item_needs_one_copy() -> None:
    code = Replicate(ScoreForm(2), copies=2, max_items=3)
    assert code.survives(2, {0, 2, 1, 5})
    assert not code.survives(2, {0, 2, 4})


def test_the_default_is_the_smallest_backup() -> None:
    code = Replicate(ScoreForm(2))
    assert (code.max_items, code.copies, code.name) == (1, 1, "replicate")
    with pytest.raises(ConfigurationError, match="copies must be"):
        Replicate(ScoreForm(2), copies=0)


def test_cheap_is_one_batch_for_the_small_model() -> None:
    code = Cheap(4, ScoreForm(2, temperature=3.0), model="small")
    (task,) = code.spares([item(1), item(2)])
    assert task.inputs.shape == (2, 2, 2, 3)
    assert task.covers == (0, 1)
    assert code.model == "small"
    answers = code.decode(2, {2: np.array([[1, 2], [5, 0]], np.float32)})
    assert answers[1].source == "decoded"
    assert answers[1].confidence == pytest.approx(confidence(np.array([5, 0]), 3.0))
    with pytest.raises(CodeError, match=r"expected scores of shape \[2, 2\]"):
        code.decode(2, {2: np.zeros((4, 2), np.float32)})


def test_cheap_needs_items_of_one_size() -> None:
    with pytest.raises(CodeError, match="must be alike"):
        Cheap(4, ScoreForm(2)).spares([item(1), np.zeros((3, 2, 3), np.uint8)])
