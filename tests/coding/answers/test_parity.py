"""Parity: what the parity item holds, and when subtraction may answer."""

import numpy as np
import pytest
from PIL import Image

from evenkeel.coding.answers import ConcatEncoder, Parity, Pixels, ScoreForm, SumEncoder
from evenkeel.coding.answers.scores import confidence
from evenkeel.errors import CodeError, ConfigurationError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def row(*scores: float) -> np.ndarray:
    return np.array([scores], np.float32)


def test_the_sum_leaves_the_range_of_bytes() -> None:
    code = Parity(SumEncoder(3), ScoreForm(2))
    items = [noise(4, 5, 3, seed=number) for number in range(3)]
    (task,) = code.spares([code.prepare(item) for item in items])
    assert task.inputs.dtype == np.float32
    assert np.array_equal(task.inputs[0], sum(item.astype(int) for item in items))
    assert task.covers == (0, 1, 2)


def test_the_sum_is_of_normalised_items_where_the_model_does_not_normalise() -> None:
    pixels = Pixels("NCHW", "FP32", normalise=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    code = Parity(SumEncoder(2, pixels), ScoreForm(2))
    items = [noise(3, 4, 4, seed=number) for number in range(2)]
    (task,) = code.spares([code.prepare(item) for item in items])
    mean, std = (np.array(values)[:, None, None] for values in (pixels.mean, pixels.std))
    expected = sum((item / 255 - mean) / std for item in items)
    np.testing.assert_allclose(task.inputs[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("k", "cell"), [(2, (9, 4)), (4, (4, 4)), (9, (3, 3))])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_concatenation_keeps_the_original_size(k: int, cell: tuple[int, int], layout: str) -> None:
    """9 x 8 pixels: halves of 9 x 4, quadrants of 4 x 4 with a blank row, ninths of 3 x 2 ... whatever fits."""
    height, width = (9, 8) if k < 9 else (11, 10)
    code = Parity(ConcatEncoder(k, height, width, Pixels(layout)), ScoreForm(2))
    pictures = [noise(height, width, 3, seed=number) for number in range(k)]
    items = pictures if layout == "NHWC" else [picture.transpose(2, 0, 1).copy() for picture in pictures]
    (task,) = code.spares([code.prepare(item) for item in items])
    found = task.inputs[0] if layout == "NHWC" else task.inputs[0].transpose(1, 2, 0)
    columns = {2: 2, 4: 2, 9: 3}[k]
    expected = np.zeros((height, width, 3), np.uint8)
    for number, picture in enumerate(pictures):
        small = Image.fromarray(picture).resize(cell[::-1], Image.Resampling.LANCZOS)
        top, left = number // columns * cell[0], number % columns * cell[1]
        expected[top : top + cell[0], left : left + cell[1]] = np.asarray(small)
    assert np.array_equal(found, expected)


def test_a_partial_group_leaves_cells_blank() -> None:
    code = Parity(ConcatEncoder(4, 8, 8), ScoreForm(2))
    (task,) = code.spares([code.prepare(np.full((8, 8, 3), 9, np.uint8))])
    assert (task.inputs[0, :4, :4] == 9).all()
    assert task.inputs.sum() == 9 * 4 * 4 * 3


def test_subtraction_answers_the_last_missing_item() -> None:
    code = Parity(SumEncoder(3), ScoreForm(2, temperature=2.0))
    replies = {3: row(6, 9), 0: row(1, 2)}
    assert set(code.decode(3, replies)) == {0}  # two are missing
    answers = code.decode(3, {**replies, 2: row(2, 3)})
    assert answers[1].value.tolist() == [3, 4]
    assert answers[1].source == "decoded"
    assert answers[1].confidence == pytest.approx(confidence(np.array([3, 4]), 2.0))
    assert code.decode(3, {**replies, 2: row(2, 3), 1: row(7, 7)})[1].source == "exact"


def test_a_primary_that_is_not_finite_counts_as_missing() -> None:
    code = Parity(SumEncoder(2), ScoreForm(2))
    answers = code.decode(2, {0: row(np.nan, 1), 1: row(1, 1), 2: row(5, 3)})
    assert answers[0].source == "decoded"
    assert answers[0].value.tolist() == [4, 2]


def test_what_parity_survives() -> None:
    code = Parity(SumEncoder(3), ScoreForm(2))
    assert code.survives(3, {1})
    assert code.survives(3, {3})
    assert not code.survives(3, {1, 3})
    assert not code.survives(3, {0, 1})


def test_items_of_different_sizes_have_no_sum() -> None:
    code = Parity(SumEncoder(2), ScoreForm(2))
    with pytest.raises(CodeError, match="must be alike"):
        code.spares([code.prepare(noise(4, 4, 3)), code.prepare(noise(5, 4, 3))])


def test_encoders_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs a parity model of datatype FP32"):
        SumEncoder(2, Pixels())
    with pytest.raises(ConfigurationError, match="max_items must be"):
        SumEncoder(0)
    with pytest.raises(ConfigurationError, match="takes 2, 4 or 9 items"):
        ConcatEncoder(3, 32, 32)
    with pytest.raises(ConfigurationError, match="do not fit"):
        ConcatEncoder(9, 2, 32)


def test_names_tell_the_codes_apart() -> None:
    assert Parity(SumEncoder(3), ScoreForm(2)).name == "parity_sum3"
    assert Parity(ConcatEncoder(4, 8, 8), ScoreForm(2)).name == "parity_concat4"
