"""Berrut's interpolant: against a readable twin of the formula, at every coincidence of points, and for quality."""

from math import cos, pi

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.coding.answers import Berrut, ScoreForm
from evenkeel.coding.answers.berrut import berrut_weights


def reference(z: float, nodes: list[float], values: list[np.ndarray]) -> np.ndarray:
    """The formula, term by term."""
    top, bottom = np.zeros_like(values[0], dtype=float), 0.0
    for i, (node, value) in enumerate(zip(nodes, values, strict=True)):
        if abs(z - node) < 1e-9:
            return np.asarray(value, float)
        top = top + (-1) ** i / (z - node) * value
        bottom += (-1) ** i / (z - node)
    return top / bottom


def data_points(count: int) -> list[float]:
    return [cos((2 * j + 1) * pi / (2 * count)) for j in range(count)]


def worker_points(count: int, spares: int) -> list[float]:
    return [cos(n * pi / (count + spares - 1)) for n in range(count + spares)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.data())
def test_encoding_and_decoding_are_the_papers_formula(count: int, spares: int, data: st.DataObject) -> None:
    random = np.random.default_rng(count * 100 + spares)
    code = Berrut(count, ScoreForm(3), spares=spares)
    items = [random.integers(0, 256, (2, 2, 3), np.uint8) for _ in range(count)]
    tasks = code.encode(items)
    assert len(tasks) == count + spares
    floats = [item.astype(float) for item in items]
    for task, z in zip(tasks, worker_points(count, spares), strict=True):
        assert task.inputs.dtype == np.float32
        np.testing.assert_allclose(task.inputs[0], reference(z, data_points(count), floats), rtol=1e-4, atol=1e-2)
    lost = data.draw(st.sets(st.sampled_from(range(count + spares)), max_size=spares))
    replies = {n: random.normal(size=(1, 3)).astype(np.float32) for n in range(count + spares) if n not in lost}
    nodes = [worker_points(count, spares)[n] for n in replies]
    answers = code.decode(count, replies)
    for item, z in enumerate(data_points(count)):
        expected = reference(z, nodes, [reply[0] for reply in replies.values()])
        np.testing.assert_allclose(answers[item].value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("systematic", [False, True])
def test_no_group_divides_by_zero(systematic: bool) -> None:
    """Points of both kinds coincide for several sizes, K=3 with S=2 among them."""
    coincidences = 0
    sizes = range(1, 17)
    for count in sizes:
        items = [np.full((1, 1, 3), number, np.uint8) for number in range(count)]
        for spares in sizes:
            code = Berrut(count, ScoreForm(2), spares=spares, systematic=systematic)
            inputs = np.concatenate([task.inputs for task in code.encode(items)])
            assert np.isfinite(inputs).all()
            replies = {number: np.array([[1.0, 2.0]], np.float32) for number in range(count + spares)}
            for answer in code.decode(count, replies).values():
                np.testing.assert_allclose(answer.value, [1, 2], rtol=1e-5)
            gap = np.subtract.outer(data_points(count), worker_points(count, spares))
            coincidences += int((np.abs(gap) < 1e-9).any())
    assert coincidences > 0


def test_a_coinciding_point_takes_the_items_own_value() -> None:
    """K=3, S=2: the middle item and the middle worker both stand at 0."""
    items = [np.full((1, 1, 3), value, np.uint8) for value in (10, 77, 200)]
    tasks = Berrut(3, ScoreForm(2), spares=2).encode(items)
    assert np.array_equal(tasks[2].inputs, np.full((1, 1, 1, 3), 77, np.float32))


@pytest.mark.parametrize("systematic", [False, True])
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.data())
def test_like_items_are_answered_without_error(systematic: bool, count: int, spares: int, data: st.DataObject) -> None:
    """Weights sum to one, so what is equal stays equal."""
    code = Berrut(count, ScoreForm(3), spares=spares, systematic=systematic)
    item = np.random.default_rng(count).integers(0, 256, (2, 2, 3), np.uint8)
    tasks = code.encode([item] * count)
    for task in tasks:
        np.testing.assert_allclose(task.inputs[0], item, rtol=1e-4, atol=1e-2)
    scores = np.array([[3.0, -1.0, 0.5]], np.float32)
    lost = data.draw(st.sets(st.sampled_from(range(count + spares)), max_size=spares))
    answers = code.decode(count, {n: scores for n in range(count + spares) if n not in lost})
    assert set(answers) == set(range(count))
    for answer in answers.values():
        np.testing.assert_allclose(answer.value, scores[0], rtol=1e-4)


@pytest.mark.parametrize("systematic", [False, True])
def test_too_few_replies_decode_nothing(systematic: bool) -> None:
    code = Berrut(4, ScoreForm(2), systematic=systematic)
    reply = np.ones((1, 2), np.float32)
    three = code.decode(4, {0: reply, 1: reply, 4: reply})
    assert set(three) == ({0, 1} if systematic else set())
    assert set(code.decode(4, {0: reply, 1: reply, 2: reply, 4: reply})) == {0, 1, 2, 3}


def test_more_replies_make_better_answers() -> None:
    """Items along a smooth curve, a smooth model: the error with all replies is below the error with the fewest."""
    count, errors = 8, {}
    points = np.array(data_points(count))
    items = [np.full((1, 1, 3), 100 + 60 * point, np.float32) for point in points]

    def model(inputs: np.ndarray) -> np.ndarray:
        x = (inputs[:, 0, 0, 0] - 100) / 60
        return np.stack([np.sin(2 * x), x**2], axis=1).astype(np.float32)

    code = Berrut(count, ScoreForm(2), spares=24)
    replies = {n: model(task.inputs) for n, task in enumerate(code.encode(items))}
    truth = model(np.stack(items))
    for kept in (count, count + 24):
        chosen = np.linspace(0, len(replies) - 1, kept).round().astype(int).tolist()
        answers = code.decode(count, {n: replies[n] for n in chosen})
        errors[kept] = np.abs(np.stack([answers[i].value for i in range(count)]) - truth).max()
    assert errors[count + 24] < errors[count] / 2
    assert errors[count + 24] < 0.2


def test_systematic_tasks_are_the_items_themselves() -> None:
    items = [np.full((1, 1, 3), number, np.uint8) for number in range(5)]
    code = Berrut(5, ScoreForm(2), spares=2, systematic=True)
    for task, item in zip(code.primaries(items), items, strict=True):
        assert np.array_equal(task.inputs[0], item)
    assert [task.covers for task in code.primaries(items)] == [(0,), (1,), (2,), (3,), (4,)]


def test_systematic_decoding_is_the_same_formula_at_the_items_own_points() -> None:
    """Five points of the second kind; items at the second and fourth, so that spares stand on both sides."""
    code = Berrut(2, ScoreForm(2), spares=3, systematic=True)
    points = worker_points(2, 3)
    items = [np.full((1, 1, 3), 10, np.float32), np.full((1, 1, 3), 40, np.float32)]
    places = [1, 3, 0, 2, 4]  # of tasks 0, 1 (the items) and 2, 3, 4 (the spares)
    for task, place in zip(code.encode(items), places, strict=True):
        expected = reference(points[place], [points[1], points[3]], items)
        np.testing.assert_allclose(task.inputs[0], expected, rtol=1e-5)
    scores = np.random.default_rng(0).normal(size=(5, 1, 2)).astype(np.float32)
    arrived = [3, 1, 2, 4]  # task 0 is late
    answers = code.decode(2, {number: scores[number] for number in arrived})
    inner = sorted(arrived, key=lambda number: places[number])
    expected = reference(points[1], [points[places[n]] for n in inner], [scores[n, 0] for n in inner])
    np.testing.assert_allclose(answers[0].value, expected, rtol=1e-5)
    assert np.array_equal(answers[1].value, scores[1, 0])


def test_a_systematic_pair_is_decoded_exactly_by_a_linear_model() -> None:
    """K=2, S=1: the spare is the mean of both, and decoding is twice the spare less the other."""
    code = Berrut(2, ScoreForm(3), systematic=True)
    items = [np.full((1, 1, 3), 10, np.uint8), np.full((1, 1, 3), 40, np.uint8)]
    assert np.allclose(code.spares(items)[0].inputs, 25)
    replies = {1: np.array([[4.0, 0.0, 1.0]], np.float32), 2: np.array([[3.0, 1.0, 1.0]], np.float32)}
    np.testing.assert_allclose(code.decode(2, replies)[0].value, [2, 2, 1], rtol=1e-6)


def test_weights_are_those_of_the_interpolant() -> None:
    weights = berrut_weights(np.array([1.0, 0.0, -1.0]), np.array([0.5, 0.0]))
    # 1/(0.5-1) = -2, -1/(0.5-0) = -2, 1/(0.5+1) = 2/3; their sum is -10/3
    np.testing.assert_allclose(weights, [[0.6, 0.6, -0.2], [0, 1, 0]], atol=1e-15)


def test_names_tell_the_codes_apart() -> None:
    assert Berrut(8, ScoreForm(2)).name == "berrut8+1"
    assert Berrut(8, ScoreForm(2), spares=2, systematic=True).name == "berrut_systematic8+2"
