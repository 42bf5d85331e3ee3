"""Elastic: the smallest code that holds what waits."""

import pytest

from evenkeel.coding.answers import Cheap, Collage, Elastic, Replicate, ScoreForm
from evenkeel.errors import ConfigurationError

FORM = ScoreForm(2)


def test_the_smallest_that_holds_what_waits() -> None:
    three, one, two = Collage(3, 4, FORM), Replicate(FORM), Collage(2, 4, FORM)
    elastic = Elastic([three, one, two])
    assert elastic.codes == (one, two, three)
    assert elastic.max_items == 9
    chosen = [elastic.choose(waiting) for waiting in range(1, 12)]
    assert chosen == [one, two, two, two, three, three, three, three, three, three, three]


def test_one_code_is_always_chosen() -> None:
    only = Collage(2, 4, FORM)
    assert {Elastic([only]).choose(waiting) for waiting in (1, 4, 99)} == {only}


def test_codes_that_leave_no_choice_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one code"):
        Elastic([])
    with pytest.raises(ConfigurationError, match="'cheap' and 'collage2x2' both hold 4 items"):
        Elastic([Cheap(4, FORM), Collage(2, 4, FORM)])
