"""Cascade: how sure the light model is, computed alike for one item and for many."""

import numpy as np
import pytest

from evenkeel.coding.answers import Cascade, ScoreForm
from evenkeel.coding.answers.cascade import Sureness, sureness

ROWS = np.random.default_rng(0).normal(0, 3, (6, 10)).astype(np.float32)


@pytest.mark.parametrize("kind", ["max_probability", "margin"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_few_and_many_rows_are_equally_sure(kind: Sureness, temperature: float) -> None:
    form = ScoreForm(10, temperature)
    code = Cascade(60, form, kind=kind)
    one = [code.decode(1, {1: row[None]})[0] for row in ROWS]
    many = code.decode(60, {60: np.concatenate([ROWS] * 10)})
    right = sureness(ROWS, form, kind)
    assert [answer.confidence for answer in one] == pytest.approx(right, abs=1e-9)
    assert [many[place].confidence for place in range(6)] == pytest.approx(right, abs=1e-9)
    assert {answer.source for answer in (*one, *many.values())} == {"edge"}


def test_a_margin_is_the_lead_over_the_second() -> None:
    rows = np.log(np.array([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]]))
    assert sureness(rows, ScoreForm(3), "margin") == pytest.approx([0.5, 0.0])
    assert sureness(np.exp(rows), ScoreForm(3, kind="probabilities"), "margin") == pytest.approx([0.5, 0.0])


def test_rows_that_are_not_finite_answer_nothing() -> None:
    rows = ROWS[:3].copy()
    rows[1, 4] = np.nan
    rows[2, 0] = np.inf
    assert set(Cascade(3, ScoreForm(10)).decode(3, {3: rows})) == {0}
    whole = np.concatenate([rows] * 5)
    assert set(Cascade(15, ScoreForm(10)).decode(15, {15: whole})) == {0, 3, 6, 9, 12}
