"""The paper's decoder: Figure 3's scenarios, the tie rules, and the mistakes of the public code."""

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.coding.answers import BoxCollage, Collage, ScoreForm
from evenkeel.coding.answers.boxes import assign_boxes, cell_boxes, decode_boxes, similarities
from evenkeel.errors import CodeError

A, B, C, D, E = range(5)  # classes of Figure 3
G1, G2, G3, G4 = range(4)
SIDE = 14
CODE = BoxCollage(Collage(2, SIDE, ScoreForm(5)))


def box(x0: float, y0: float, x1: float, y1: float, confidence: float, label: int) -> list[float]:
    scores = [0.0] * 5
    scores[label] = 4.0
    return [x0, y0, x1, y1, confidence, *scores]


def reply(*boxes: list[float]) -> np.ndarray:
    return np.array(boxes, np.float32).reshape(1, len(boxes), 10)


def labels(count: int, *boxes: list[float]) -> dict[int, int]:
    return {cell: int(answer.value.argmax()) for cell, answer in CODE.decode(count, {count: reply(*boxes)}).items()}


# Covers G1's full width and 8/14 of its height, and half of both beyond: the box of scenario 2.
SPREAD = (0, 6, 21, 18)


def test_figure_3_scenario_1_each_box_names_its_cell() -> None:
    found = labels(
        4,
        box(1, 0, 13, 12, 0.8, A),
        box(15, 2, 28, 15, 0.7, E),  # a wrong class is still this cell's class
        box(0, 13, 14, 27, 0.9, C),
        box(16, 15, 27, 28, 0.6, D),
    )
    assert found == {G1: A, G2: E, G3: C, G4: D}


def test_figure_3_scenario_2_a_cell_without_a_box_stays_empty() -> None:
    found = labels(4, box(*SPREAD, 0.9, A), box(0, 14, 14, 28, 0.8, C), box(14, 14, 28, 28, 0.8, D))
    assert found == {G1: A, G3: C, G4: D}


def test_figure_3_scenario_2_with_the_printed_similarities() -> None:
    printed = np.array([[1 / 3, 1 / 7, 1 / 7, 1 / 17], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert assign_boxes(printed, np.array([0.9, 0.8, 0.8])) == {G1: 0, G3: 1, G4: 2}


def test_figure_3_the_four_printed_similarities() -> None:
    """1/3, 1/7, 1/7, 1/17 by the formula; the fourth ground-truth box must be larger than the others for it."""
    cells = cell_boxes(2, SIDE)
    cells[G4] = (14, 14, 28, 32)
    found = similarities(np.array([SPREAD], float), cells)[0]
    assert [float(Fraction(1, n)) for n in (3, 7, 7, 17)] == found.tolist()


def test_figure_3_equal_cells_give_a_fifteenth_where_the_paper_prints_a_seventeenth() -> None:
    """In equal cells J = I / (1 + area - I), and I1 * I4 = I2 * I3, so 1/3, 1/7, 1/7 leave only 1/15 for G4."""
    found = similarities(np.array([SPREAD], float), cell_boxes(2, SIDE))[0]
    assert [float(Fraction(1, n)) for n in (3, 7, 7, 15)] == found.tolist()
    shares = [similarity / (1 + similarity) for similarity in (Fraction(1, 3), Fraction(1, 7), Fraction(1, 7))]
    fourth = shares[1] * shares[2] / shares[0]
    assert fourth / (1 - fourth) == Fraction(1, 15)


def jaccard(one: list[int], other: list[int]) -> Fraction:
    """The readable twin, in exact fractions."""
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [max(0, b[2] - b[0]) * max(0, b[3] - b[1]) for b in (one, other)]
    return Fraction(width * height, sum(areas) - width * height)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.lists(st.tuples(*[st.integers(-20, 80)] * 4, st.integers(0, 3)), max_size=8), st.data())
def test_decoding_agrees_with_exact_fractions(
    grid: int, rows: list[tuple[int, int, int, int, int]], data: st.DataObject
) -> None:
    side = 8
    count = data.draw(st.integers(1, grid * grid))
    cells = [[int(corner) for corner in cell] for cell in cell_boxes(grid, side)]
    best: dict[int, int] = {}
    for number, row in enumerate(rows):
        similar = [jaccard(list(row[:4]), cell) for cell in cells]
        cell = similar.index(max(similar))
        if similar[cell] > 0 and (cell not in best or row[4] > rows[best[cell]][4]):
            best[cell] = number
    expected = {cell: number for cell, number in best.items() if cell < count}
    assert decode_boxes(np.array(rows, float).reshape(len(rows), 5), grid, side, count) == expected


def test_cells_are_numbered_row_by_row() -> None:
    assert cell_boxes(2, 10).tolist() == [[0, 0, 10, 10], [10, 0, 20, 10], [0, 10, 10, 20], [10, 10, 20, 20]]


def test_a_box_as_similar_to_several_cells_goes_to_the_first() -> None:
    assert labels(4, box(7, 7, 21, 21, 0.9, B)) == {G1: B}
    assert labels(4, box(14, 7, 28, 21, 0.9, B)) == {G2: B}


def test_of_equally_confident_boxes_the_first_wins() -> None:
    cell = (0, 0, 14, 14)
    assert labels(4, box(*cell, 0.5, B), box(*cell, 0.5, C)) == {G1: B}


def test_a_box_over_an_unused_cell_answers_no_other() -> None:
    assert labels(3, box(13, 13, 28, 28, 0.9, D)) == {}


@pytest.mark.parametrize(
    "corners", [(40, 40, 50, 50), (-9, -9, 0, 0), (5, 5, 5, 9), (9, 9, 5, 5), (np.nan, 0, 14, 14), (0, 0, np.inf, 14)]
)
def test_what_is_no_box_answers_nothing(corners: tuple[float, float, float, float]) -> None:
    assert labels(4, box(*corners, 0.9, D)) == {}
    assert labels(4, box(*corners, 0.9, D), box(0, 0, 14, 14, 0.1, B)) == {G1: B}


def test_the_answer_is_the_boxs_own() -> None:
    answer = CODE.decode(4, {4: reply(box(0, 0, 14, 14, 0.625, B))})[G1]
    assert (answer.source, answer.confidence) == ("collage", 0.625)
    assert answer.value.tolist() == [0, 4, 0, 0, 0]


@pytest.mark.parametrize("confidence", [-0.5, 1.5, 7.0])
def test_a_confidence_that_is_no_probability_is_refused(confidence: float) -> None:
    with pytest.raises(CodeError, match=r"box confidences must lie in 0\.\.1"):
        CODE.decode(4, {4: reply(box(0, 0, 14, 14, confidence, B))})


def test_a_detector_claims_to_survive_no_lost_primary() -> None:
    assert CODE.survives(4, {4})
    assert not CODE.survives(4, {0})


# The mistakes of the authors' public code, as its list in the project's notes numbers them.


def test_public_mistake_1_stale_probability() -> None:
    """A better box replaced the label but not the stored probability, so a weaker one could win later."""
    cell = (0, 0, 14, 14)
    boxes = [box(*cell, 0.5, B), box(*cell, 0.9, C), box(*cell, 0.7, D)]
    for order in permutations(boxes):
        assert labels(4, *order) == {G1: C}


def test_public_mistake_2_an_empty_cell_is_not_the_last_class() -> None:
    """Empty cells held -1, which names the last class of a list."""
    answers = CODE.decode(4, {4: reply(box(0, 0, 14, 14, 0.9, B))})
    assert set(answers) == {G1}
    assert all(cell >= 0 for cell in answers)


def test_public_mistake_3_no_detection_at_all() -> None:
    """No detection left a variable undefined, and the request died."""
    primary = np.zeros((1, 5), np.float32)
    assert CODE.decode(4, {4: reply()}) == {}
    assert set(CODE.decode(4, {4: reply(), 2: primary})) == {2}


def test_public_mistake_4_each_code_keeps_its_own_grid() -> None:
    """The worker had a 4x4 grid written into it while the master had 3x3."""
    three, four = (BoxCollage(Collage(grid, 12, ScoreForm(5))) for grid in (3, 4))
    tile = np.full((12, 12, 3), 7, np.uint8)
    assert three.spares([tile] * 9)[0].inputs.shape == (1, 36, 36, 3)
    assert four.spares([tile] * 9)[0].inputs.shape == (1, 48, 48, 3)
    below = reply(box(0, 12, 12, 24, 0.9, B))  # first cell of the second row
    assert set(three.decode(9, {9: below})) == {3}
    assert set(four.decode(9, {9: below})) == {4}
    assert set(three.decode(9, {9: below})) == {3}
