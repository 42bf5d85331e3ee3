"""The collage: where items stand, how they are shrunk, what the card decides, and what a cell says."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from evenkeel.coding.answers import Collage, Pixels, ScoreForm
from evenkeel.coding.answers.scores import confidence
from evenkeel.errors import CodeError, ConfigurationError
from evenkeel.models.cards import ModelCard

CARD = ModelCard(
    name="collage3",
    kind="collage",
    file="collage3.onnx",
    sha256="0" * 64,
    classes=("cat", "dog"),
    height=12,
    width=12,
    grid=3,
    tile_side=4,
    temperature=1.5,
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@settings(max_examples=50, deadline=None)
@given(grid=st.integers(1, 5), side=st.integers(1, 6), layout=st.sampled_from(["NHWC", "NCHW"]), data=st.data())
def test_item_i_stands_in_box_i_and_the_rest_is_blank(grid: int, side: int, layout: str, data: st.DataObject) -> None:
    code = Collage(grid, side, ScoreForm(2), pixels=Pixels(layout))
    count = data.draw(st.integers(1, grid * grid))
    tiles = [noise(*code.pixels.shape(side, side), seed=number) for number in range(count)]
    (task,) = code.spares(tiles)
    assert task.covers == tuple(range(count))
    assert task.inputs.dtype == np.uint8
    assert task.inputs.shape == (1, *code.pixels.shape(grid * side, grid * side))
    canvas = task.inputs[0] if layout == "NHWC" else task.inputs[0].transpose(1, 2, 0)
    for cell in range(grid * grid):
        top, left = cell // grid * side, cell % grid * side
        box = canvas[top : top + side, left : left + side]
        if cell < count:
            tile = tiles[cell] if layout == "NHWC" else tiles[cell].transpose(1, 2, 0)
            assert np.array_equal(box, tile)
        else:
            assert not box.any()


@settings(max_examples=50, deadline=None)
@given(grid=st.integers(1, 4), layout=st.sampled_from(["NHWC", "NCHW"]), data=st.data())
def test_free_boxes_show_the_first_items_mirrored(grid: int, layout: str, data: st.DataObject) -> None:
    side = 3
    plain, code = (
        Collage(grid, side, ScoreForm(2), pixels=Pixels(layout), mirrored=mirrored) for mirrored in (False, True)
    )
    count = data.draw(st.integers(1, grid * grid))
    tiles = [noise(*code.pixels.shape(side, side), seed=number) for number in range(count)]
    axis = 1 if layout == "NHWC" else 2
    shown = tiles + [np.flip(tile, axis) for tile in tiles][: grid * grid - count]
    (task,) = code.spares(tiles)
    assert task.covers == tuple(range(count))
    assert np.array_equal(task.inputs, plain.spares(shown)[0].inputs)


def test_an_item_in_two_cells_is_answered_by_both() -> None:
    code = Collage(2, 4, ScoreForm(2), mirrored=True)
    cells = np.array([[[4.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 6.0]]], np.float32)
    assert [code.decode(2, {2: cells})[item].value.tolist() for item in range(2)] == [[2.0, 0.5], [0.0, 4.0]]
    assert [code.decode(3, {3: cells})[item].value.tolist() for item in range(3)] == [
        [2.0, 3.0],
        [0.0, 2.0],
        [0.0, 1.0],
    ]
    assert code.decode(4, {4: cells})[0].value.tolist() == [4.0, 0.0]


@pytest.mark.parametrize(("broken", "left"), [((), [2.0, 0.5]), ((0,), [0.0, 1.0]), ((2,), [4.0, 0.0]), ((0, 2), None)])
def test_a_cell_that_is_not_there_leaves_the_answer_to_the_other(broken: tuple[int, ...], left: list[float]) -> None:
    cells = np.array([[[4.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 6.0]]], np.float32)
    for cell, what in zip(broken, (np.inf, -np.inf), strict=False):
        cells[0, cell] = what
    found = Collage(2, 4, ScoreForm(2), mirrored=True).decode(2, {2: cells})
    assert (found[0].value.tolist() if 0 in found else None) == left
    assert found[1].value.tolist() == [0.0, 4.0]


@pytest.mark.parametrize(("layout", "shape"), [("NHWC", (4, 4, 3)), ("NCHW", (3, 4, 4))])
@pytest.mark.parametrize(("datatype", "dtype"), [("UINT8", np.uint8), ("FP32", np.float32)])
def test_a_tile_is_kept_without_a_copy(layout: str, shape: tuple[int, ...], datatype: str, dtype: type) -> None:
    tile = noise(*shape).astype(dtype)
    assert Collage(3, 4, ScoreForm(2), pixels=Pixels(layout, datatype)).prepare(tile) is tile


def test_a_tile_of_another_datatype_or_layout_is_made_over() -> None:
    floats = noise(4, 4, 3).astype(np.float32) + 0.3
    tile = Collage(2, 4, ScoreForm(2)).prepare(floats)
    assert tile.dtype == np.uint8
    assert np.array_equal(tile, np.rint(floats).clip(0, 255))
    cube = noise(3, 3, 3)  # has the shape of a tile in both layouts
    turned = Collage(2, 3, ScoreForm(2), pixels=Pixels("NHWC", item_layout="NCHW")).prepare(cube)
    assert np.array_equal(turned, cube.transpose(1, 2, 0))


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_items_are_shrunk_as_the_card_says(name: str) -> None:
    item = noise(20, 20, 3)
    tile = Collage.from_card(replace(CARD, interpolation=name)).prepare(item)
    expected = Image.fromarray(item).resize((4, 4), Image.Resampling[name.upper()])
    assert np.array_equal(tile, np.asarray(expected))


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[::2] = 200
    assert set(np.unique(Collage(2, 4, ScoreForm(2)).prepare(stripes))) <= set(range(85, 116))


def test_float_items_are_shrunk_like_bytes() -> None:
    item = noise(20, 20, 3)
    floats = Collage(3, 4, ScoreForm(2), pixels=Pixels(datatype="FP32")).prepare(item.astype(np.float32))
    bytes_ = Collage(3, 4, ScoreForm(2)).prepare(item)
    assert floats.dtype == np.float32
    assert np.abs(floats.clip(0, 255) - bytes_).max() <= 1.5  # Pillow rounds bytes after each of its two passes
    back = Collage(3, 4, ScoreForm(2)).prepare(item.astype(np.float64))
    assert back.dtype == np.uint8
    assert np.abs(back.astype(int) - bytes_).max() <= 1


@pytest.mark.parametrize("shape", [(4, 10, 3), (10, 4, 3), (5, 9, 3), (9, 30, 3)])
def test_an_item_that_is_not_square_is_cropped_to_its_centre(shape: tuple[int, int, int]) -> None:
    item = noise(*shape)
    side = min(shape[:2])
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    code = Collage(2, 4, ScoreForm(2))
    assert np.array_equal(code.prepare(item), code.prepare(item[top : top + side, left : left + side]))


def test_items_may_come_in_another_layout_than_the_canvas() -> None:
    item = noise(20, 20, 3)
    plain = Collage.from_card(CARD).prepare(item)
    turned = Collage.from_card(CARD, item_layout="NCHW").prepare(np.ascontiguousarray(item.transpose(2, 0, 1)))
    assert np.array_equal(plain, turned)
    tile = noise(3, 4, 4)  # tile-sized, but not in the canvas's layout
    assert np.array_equal(Collage.from_card(CARD, item_layout="NCHW").prepare(tile), tile.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (np.zeros((8, 8), np.uint8), r"shape \[height, width, 3\]"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \[height, width, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \[height, width, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \[height, width, 3\]"),
        (np.zeros((8, 8, 3), np.int32), "uint8 or floating-point"),
        (np.full((4, 4, 3), np.nan, np.float32), "not finite"),
        (np.full((8, 8, 3), np.inf, np.float32), "not finite"),
    ],
)
def test_what_is_no_item_is_refused(item: np.ndarray, why: str) -> None:
    with pytest.raises(CodeError, match=why):
        Collage(3, 4, ScoreForm(2), pixels=Pixels(datatype="FP32")).prepare(item)


@pytest.mark.parametrize("tile", [np.zeros((5, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_items_that_were_not_prepared_are_refused(tile: np.ndarray) -> None:
    with pytest.raises(CodeError, match="prepare items before"):
        Collage(3, 4, ScoreForm(2)).spares([np.zeros((4, 4, 3), np.uint8), tile])


def test_a_cell_answers_with_its_scores_and_calibrated_confidence() -> None:
    scores = np.random.default_rng(3).normal(0, 5, (1, 9, 2)).astype(np.float32)
    answers = Collage.from_card(CARD).decode(5, {5: scores})
    assert set(answers) == set(range(5))
    for cell, answer in answers.items():
        assert answer.source == "collage"
        assert np.array_equal(answer.value, scores[0, cell])
        assert answer.confidence == pytest.approx(confidence(scores[0, cell], 1.5), abs=1e-12)
        assert type(answer.confidence) is float


def test_probabilities_are_calibrated_through_their_logarithm() -> None:
    logits = np.random.default_rng(3).normal(0, 3, (1, 9, 2))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    probabilities[0, 8] = (1, 0)
    logits[0, 8] = (100, 0)
    ours = Collage.from_card(replace(CARD, scores="probabilities")).decode(9, {9: probabilities})
    theirs = Collage.from_card(CARD).decode(9, {9: logits})
    for cell in range(9):
        assert ours[cell].confidence == pytest.approx(theirs[cell].confidence, abs=1e-6)


def test_a_cell_that_is_not_finite_is_no_answer() -> None:
    scores = np.ones((1, 9, 2), np.float32)
    scores[0, 1, 0] = np.nan
    scores[0, 3, 1] = np.inf
    scores[0, 8, 1] = np.nan  # not in use below
    assert set(Collage.from_card(CARD).decode(6, {6: scores})) == {0, 2, 4, 5}


def test_scores_too_large_for_float32_are_no_answer() -> None:
    scores = np.ones((1, 9, 2))
    scores[0, 1] = (1e300, 0)
    assert 1 not in Collage.from_card(CARD).decode(2, {2: scores})


def test_the_card_decides() -> None:
    code = Collage.from_card(CARD)
    assert (code.grid, code.tile_side, code.max_items, code.model, code.name) == (3, 4, 9, "collage3", "collage3x3")
    assert code.scores == ScoreForm(2, 1.5)


def test_a_classifiers_card_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs a card of kind 'collage'"):
        Collage.from_card(replace(CARD, kind="classifier", grid=1, tile_side=0))


@pytest.mark.parametrize("grid", [0, -1, 2.0, True])
def test_a_grid_is_a_whole_number_above_zero(grid: object) -> None:
    with pytest.raises(ConfigurationError, match="grid must be a whole number above zero"):
        Collage(grid, 4, ScoreForm(2))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"layout": "HWC"}, "layout must be"),
        ({"item_layout": "HWC"}, "layout must be"),
        ({"datatype": "INT8"}, "datatype must be"),
        ({"interpolation": "box"}, "interpolation must be one of nearest"),
        ({"normalise": True}, "need datatype FP32"),
    ],
)
def test_pixels_that_contradict_themselves_are_refused(wrong: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        Pixels(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"temperature": float("nan")}, {"kind": "votes"}, {"classes": 0}]
)
def test_scores_that_cannot_be_read_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        ScoreForm(**{"classes": 2, **wrong})


# The mistakes of the authors' public code that concern the canvas; the others are in test_boxes.py.


def test_public_mistake_4_two_grids_in_one_process() -> None:
    three, four = Collage.from_card(CARD), Collage.from_card(replace(CARD, grid=4, height=16, width=16))
    tile = noise(4, 4, 3)
    assert three.spares([tile])[0].inputs.shape == (1, 12, 12, 3)
    assert four.spares([tile])[0].inputs.shape == (1, 16, 16, 3)
    assert len(three.decode(9, {9: np.zeros((1, 9, 2), np.float32)})) == 9
    assert len(four.decode(16, {16: np.zeros((1, 16, 2), np.float32)})) == 16
    with pytest.raises(CodeError, match=r"expected scores of shape \[1, 9, 2\], found \[1, 16, 2\]"):
        three.decode(9, {9: np.zeros((1, 16, 2), np.float32)})


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("side", [4, 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_public_mistake_5_normalisation_is_neither_forgotten_nor_doubled(layout: str, side: int, dtype: type) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    outside = replace(CARD, layout=layout, datatype="FP32", mean=mean, std=std, normalisation_inside=False)
    item = noise(side, side, 3).astype(dtype)
    given_item = item if layout == "NHWC" else item.transpose(2, 0, 1)
    raw = Collage.from_card(replace(outside, normalisation_inside=True)).prepare(given_item)
    assert raw.max() > 100  # pixel values as they came
    normalised = Collage.from_card(outside).prepare(given_item)
    upright = raw if layout == "NHWC" else raw.transpose(1, 2, 0)
    expected = (upright / 255 - np.array(mean)) / np.array(std)
    found = normalised if layout == "NHWC" else normalised.transpose(1, 2, 0)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
