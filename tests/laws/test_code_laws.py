"""The laws of `coding/code.py`, over every code, in a linear world where the right answers are known.

Items are pictures of one colour and the replicas' model is linear in the mean colour, so a perfect parity model, a
perfect Collage-CNN and a perfect detector exist, and whatever a code decodes can be compared with the truth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.arrays import Array
from evenkeel.coding.answers import (
    Answer,
    Berrut,
    BoxCollage,
    Cascade,
    Cheap,
    Code,
    Collage,
    ConcatEncoder,
    Parity,
    Pixels,
    Replicate,
    ScoreForm,
    SumEncoder,
)
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.linear_codes import linear_code
from evenkeel.errors import CodeError

CLASSES = 5
SIDE = 12  # pixels of an item; divides by 2 and 3, and tiles of 4 are shrunk while tiles of 12 are not
WEIGHTS = np.random.default_rng(1).normal(size=(CLASSES, 3))
CHEAP_WEIGHTS = np.random.default_rng(2).normal(size=(CLASSES, 3))
FORM = ScoreForm(CLASSES, temperature=2.0)


def linear(inputs: Array, weights: Array = WEIGHTS, channels: int = 3) -> Array:
    """Scores `[rows, classes]`: linear in the mean colour."""
    pixels = np.moveaxis(inputs, channels, -1).astype(np.float64)
    return (pixels.mean(axis=(1, 2)) @ weights.T).astype(np.float32)


def cheap_model(inputs: Array) -> Array:
    return linear(inputs, CHEAP_WEIGHTS)


def collage_model(grid: int, channels: int = 3) -> Callable[[Array], Array]:
    """Scores `[1, cells, classes]`: the linear model on each cell."""

    def run(canvas: Array) -> Array:
        upright = np.moveaxis(canvas, channels, -1)
        rows = [cell for band in np.split(upright, grid, axis=1) for cell in np.split(band, grid, axis=2)]
        return np.stack([linear(cell) for cell in rows], axis=1)

    return run


def detector(grid: int) -> Callable[[Array], Array]:
    """Boxes `[1, cells, 5 + classes]`: each cell's own box, last cell first, and one worse box in every cell."""

    def run(canvas: Array) -> Array:
        scores = collage_model(grid)(canvas)[0]
        side = canvas.shape[1] // grid
        boxes = []
        for cell in reversed(range(grid * grid)):
            row, column = divmod(cell, grid)
            corners = [column * side, row * side, (column + 1) * side, (row + 1) * side]
            boxes.append([*corners, 0.9, *scores[cell]])
            boxes.append([*corners, 0.2, *(-scores[cell])])
        return np.array([boxes], np.float32)

    return run


def concat_parity(cells: int) -> Callable[[Array], Array]:
    """The sum of the cells' scores; blank cells add nothing because the model is linear."""
    return lambda picture: linear(picture) * cells


def sum_of_thirds(inputs: Array) -> Array:
    """The sum of the scores of three parts of one picture, which are of one colour."""
    return 3 * linear(inputs)


@dataclass(frozen=True)
class Case:
    """A code, the model its spares run, and how near its fills are to the truth in this world."""

    code: Code
    spare_model: Callable[[Array], Array]
    truth: Callable[[Array], Array] | None = linear  # of fills; None: approximate even here
    channels_first: bool = False

    def item(self, colour: Sequence[int]) -> Array:
        picture = np.full((SIDE, SIDE, 3), colour, np.uint8)
        return picture.transpose(2, 0, 1).copy() if self.channels_first else picture

    def prepared(self, colour: Sequence[int]) -> Array:
        item = self.item(colour)
        return self.code.prepare(item) if isinstance(self.code, BackupCode) else item

    def replica(self, inputs: Array) -> Array:
        return linear(inputs, channels=1 if self.channels_first else 3)

    def replies(self, items: Sequence[Array]) -> dict[int, Array]:
        primaries = len(self.code.primaries(items))
        return {
            number: self.replica(task.inputs) if number < primaries else self.spare_model(task.inputs)
            for number, task in enumerate(self.code.encode(items))
        }


CASES = [
    Case(Replicate(FORM), linear),
    Case(Replicate(FORM, copies=2, max_items=4), linear),
    Case(Collage(1, SIDE, FORM), collage_model(1)),
    Case(Collage(2, SIDE, FORM), collage_model(2)),
    Case(Collage(3, 4, FORM), collage_model(3)),
    Case(Collage(3, 4, FORM, mirrored=True), collage_model(3)),
    Case(Collage(3, 4, FORM, pixels=Pixels("NCHW", "FP32")), collage_model(3, channels=1), channels_first=True),
    Case(BoxCollage(Collage(2, SIDE, FORM)), detector(2)),
    Case(BoxCollage(Collage(3, 4, FORM)), detector(3)),
    Case(Parity(SumEncoder(2), FORM), linear),
    Case(Parity(SumEncoder(4), FORM), linear),
    Case(Parity(ConcatEncoder(2, SIDE, SIDE), FORM), concat_parity(2)),
    Case(Parity(ConcatEncoder(4, SIDE, SIDE), FORM), concat_parity(4)),
    Case(Parity(ConcatEncoder(9, SIDE, SIDE), FORM), concat_parity(9)),
    Case(Berrut(1, FORM), linear, truth=None),
    Case(Berrut(4, FORM, spares=2), linear, truth=None),
    Case(Berrut(8, FORM), linear, truth=None),
    Case(Berrut(4, FORM, spares=2, systematic=True), linear, truth=None),
    Case(Berrut(8, FORM, systematic=True), linear, truth=None),
    Case(Cheap(4, FORM), cheap_model, truth=cheap_model),
    Case(Cascade(4, FORM), cheap_model, truth=cheap_model),
    Case(Cascade(4, FORM, kind="margin"), cheap_model, truth=cheap_model),
    Case(linear_code("mds:extra=2", 3), linear),
    Case(linear_code("mds:extra=1,own=2", 4), linear),
    Case(linear_code("rlnc:extra=6", 4), linear),
    Case(linear_code("rlnc:extra=5,weight=half", 4), linear),
    Case(linear_code("balanced:copies=2", 5), linear),
    Case(linear_code("balanced:copies=2,extra=4", 6), linear),
    Case(linear_code("replication:copies=2", 4), linear),
    Case(linear_code("replication:groups=2", 5), linear),
    Case(linear_code("gradient:losses=1", 3), linear, truth=sum_of_thirds),
    Case(linear_code("gradient:groups=1", 3), linear, truth=sum_of_thirds),
]
every_code = pytest.mark.parametrize("case", CASES, ids=lambda case: case.code.name)
every_systematic_code = pytest.mark.parametrize(
    "case", [case for case in CASES if case.code.systematic], ids=lambda case: case.code.name
)
thrifty = settings(max_examples=15, deadline=None)  # there are many codes


@st.composite
def groups(draw: st.DrawFn, case: Case) -> list[Array]:
    colour = st.tuples(*[st.integers(0, 255)] * 3)
    return [case.item(draw(colour)) for _ in range(draw(st.integers(1, case.code.max_items)))]


def same(one: Mapping[int, Answer], other: Mapping[int, Answer]) -> bool:
    return one.keys() == other.keys() and all(
        one[item].source == other[item].source
        and one[item].confidence == other[item].confidence
        and np.array_equal(one[item].value, other[item].value)
        for item in one
    )


def check_true(case: Case, items: Sequence[Array], answers: Mapping[int, Answer]) -> None:
    """Every answer is what it says it is."""
    for item, answer in answers.items():
        assert 0 <= item < len(items)
        assert answer.value.shape == (CLASSES,)
        # The top probability is 1 / classes or more; its lead over the second may be nothing.
        low = 0.0 if isinstance(case.code, Cascade) and case.code.kind == "margin" else 1 / CLASSES - 1e-9
        assert low <= answer.confidence <= 1 + 1e-9
        if answer.source == "exact":
            np.testing.assert_array_equal(answer.value, case.replica(items[item][None])[0])
        elif case.truth is not None:
            upright = items[item].transpose(1, 2, 0) if case.channels_first else items[item]
            np.testing.assert_allclose(answer.value, case.truth(upright[None])[0], rtol=1e-4, atol=2e-3)


@every_code
@thrifty
@given(data=st.data())
def test_a_further_reply_takes_nothing_away(case: Case, data: st.DataObject) -> None:
    items = data.draw(groups(case))
    replies = case.replies(items)
    arrived: dict[int, Array] = {}
    before: dict[int, Answer] = {}
    for number in data.draw(st.permutations(sorted(replies))):
        arrived[number] = replies[number]
        now = case.code.decode(len(items), arrived)
        check_true(case, items, now)
        assert before.keys() <= now.keys()
        assert all(now[item].source == "exact" for item in before if before[item].source == "exact")
        before = now
    assert before.keys() == set(range(len(items)))


@every_code
@thrifty
@given(data=st.data())
def test_the_order_of_replies_does_not_matter(case: Case, data: st.DataObject) -> None:
    items = data.draw(groups(case))
    replies = case.replies(items)
    arrived = data.draw(st.lists(st.sampled_from(sorted(replies)), unique=True))
    forward = case.code.decode(len(items), {number: replies[number] for number in arrived})
    backward = case.code.decode(len(items), {number: replies[number] for number in reversed(arrived)})
    assert same(forward, backward)


@every_systematic_code
@thrifty
@given(data=st.data())
def test_with_all_primaries_in_everything_is_exact(case: Case, data: st.DataObject) -> None:
    items = data.draw(groups(case))
    replies = case.replies(items)
    spares = data.draw(st.sets(st.sampled_from(range(len(items), len(replies)))))
    arrived = {number: replies[number] for number in [*range(len(items)), *spares]}
    answers = case.code.decode(len(items), arrived)
    assert answers.keys() == set(range(len(items)))
    assert {answer.source for answer in answers.values()} == {"exact"}
    check_true(case, items, answers)


@every_code
@thrifty
@given(data=st.data())
def test_what_a_code_survives_leaves_everything_answered(case: Case, data: st.DataObject) -> None:
    items = data.draw(groups(case))
    replies = case.replies(items)
    lost = data.draw(st.sets(st.sampled_from(sorted(replies))))
    survived = case.code.survives(len(items), lost)
    answers = case.code.decode(len(items), {n: reply for n, reply in replies.items() if n not in lost})
    check_true(case, items, answers)
    if survived:
        assert answers.keys() == set(range(len(items)))


@every_code
def test_a_code_claims_what_it_is_for(case: Case) -> None:
    """Otherwise a code that claims nothing would keep every law."""
    count, tasks = case.code.max_items, len(case.replies([case.item((9, 9, 9))] * case.code.max_items))
    assert case.code.survives(count, set())
    assert case.code.survives(count, set(range(count, tasks))) or not case.code.systematic
    assert case.code.survives(count, {0}) is not isinstance(case.code, BoxCollage)
    assert not case.code.survives(count, set(range(tasks)))


@every_code
@thrifty
@given(data=st.data())
def test_one_lost_primary_is_filled(case: Case, data: st.DataObject) -> None:
    """The perfect spare of this world answers for any one item, detectors included, and says that it did."""
    items = data.draw(groups(case))
    replies = case.replies(items)
    late = data.draw(st.integers(0, len(items) - 1))
    answers = case.code.decode(len(items), {n: reply for n, reply in replies.items() if n != late})
    assert answers.keys() == set(range(len(items)))
    exact = isinstance(case.code, Replicate)
    assert (answers[late].source == "exact") is exact
    check_true(case, items, answers)


@every_code
@thrifty
@given(data=st.data())
def test_encoding_is_pure(case: Case, data: st.DataObject) -> None:
    items = data.draw(groups(case))
    copies = [item.copy() for item in items]
    first, second = case.code.encode(items), case.code.encode(items)
    assert all(np.array_equal(one, other) for one, other in zip(items, copies, strict=True))
    assert [task.covers for task in first] == [task.covers for task in second]
    assert all(np.array_equal(one.inputs, other.inputs) for one, other in zip(first, second, strict=True))
    for task in first:
        assert task.covers
        assert set(task.covers) <= set(range(len(items)))
        assert task.inputs.ndim == 4
    assert {item for task in first[len(items) :] for item in task.covers} == set(range(len(items)))


@every_code
def test_an_item_that_needs_no_preparing_is_what_preparing_makes(case: Case) -> None:
    """The gateway gives such an item to `spares` as it is."""
    if not isinstance(case.code, BackupCode):
        return
    item = case.item((9, 99, 200))
    if case.code.is_prepared(item):
        made = case.code.prepare(item)
        assert (made.dtype, made.shape) == (item.dtype, item.shape)
        np.testing.assert_array_equal(made, item)


def broken(reply: Array, how: str) -> Array:
    """The reply with wrong rows, a wrong number of classes, or a wrong number of axes."""
    if how == "rows":
        return np.concatenate([reply, reply])
    if how == "no rows":
        return reply[:0]
    if how == "classes":
        return reply[..., :-1]
    if how == "flat":
        return reply.reshape(-1)
    if how == "words":
        return np.full(reply.shape, "cat")
    return reply.astype(np.complex64)


@every_code
@pytest.mark.parametrize("how", ["rows", "no rows", "classes", "flat", "words", "complex"])
def test_a_reply_of_the_wrong_shape_is_refused(case: Case, how: str) -> None:
    items = [case.item((number, 200, 50)) for number in range(case.code.max_items)]
    replies = case.replies(items)
    for number in replies:
        with pytest.raises(CodeError, match=f"reply to task {number}: expected"):
            case.code.decode(len(items), {**replies, number: broken(replies[number], how)})


@every_code
@thrifty
@given(data=st.data())
def test_a_reply_that_is_not_finite_answers_nothing(case: Case, data: st.DataObject) -> None:
    """It is as if it were not there: nothing it says becomes a class, nothing else is spoilt."""
    items = data.draw(groups(case))
    replies = case.replies(items)
    arrived = data.draw(st.lists(st.sampled_from(sorted(replies)), unique=True, min_size=1))
    bad = arrived[0]
    value = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    spoilt = np.array(replies[bad])
    spoilt[..., -1] = value
    others = {number: replies[number] for number in arrived[1:]}
    assert same(case.code.decode(len(items), {**others, bad: spoilt}), case.code.decode(len(items), others))


@every_code
def test_replies_and_groups_that_do_not_belong_are_refused(case: Case) -> None:
    items = [case.item((1, 2, 3))] * case.code.max_items
    replies = case.replies(items)
    with pytest.raises(CodeError, match="tasks 0 to"):
        case.code.decode(len(items), {len(replies): replies[0]})
    with pytest.raises(CodeError, match="tasks 0 to"):
        case.code.decode(len(items), {-1: replies[0]})
    for count in (0, case.code.max_items + 1):
        with pytest.raises(CodeError, match=f"1 to {case.code.max_items} items, found {count}"):
            case.code.decode(count, {})
        with pytest.raises(CodeError, match=f"1 to {case.code.max_items} items, found {count}"):
            case.code.spares([case.prepared((1, 2, 3))] * count)


@every_code
def test_without_replies_there_are_no_answers(case: Case) -> None:
    assert case.code.decode(case.code.max_items, {}) == {}
