"""The models that come with the package do what their cards say. Needs no torch."""

import hashlib
import os
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import load_card
from evenkeel.models.shipped import COLLAGES, IMAGES, NAMES, card_path, model_path


def run(name: str, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(str(model_path(name)), options, providers=["CPUExecutionProvider"])
    card = load_card(card_path(name))
    scores: NDArray[np.float32] = session.run([card.output_name], {card.input_name: images})[0]
    return scores


def canvases(images: NDArray[np.uint8], grid: int) -> NDArray[np.uint8]:
    """Collages written out cell by cell, as a second opinion on the layout that training used."""
    side, cells = images.shape[1], grid * grid
    count = len(images) // cells
    drawn = np.zeros((count, grid * side, grid * side, 3), np.uint8)
    for place in range(count * cells):
        row, column = divmod(place % cells, grid)
        drawn[place // cells, row * side : (row + 1) * side, column * side : (column + 1) * side] = images[place]
    return drawn


@pytest.fixture(scope="module")
def shipped() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with np.load(IMAGES, allow_pickle=False) as file:
        return file["images"], file["labels"]


def test_the_images_are_four_hundred_of_all_classes_mixed(
    shipped: tuple[NDArray[np.uint8], NDArray[np.int64]],
) -> None:
    images, labels = shipped
    assert images.shape == (400, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (400,)
    assert labels.dtype == np.int64
    assert set(labels.tolist()) == set(range(10))
    assert len(np.unique(images.reshape(400, -1), axis=0)) == 400
    assert (labels[1:] == labels[:-1]).mean() < 0.2  # sorted by class it would be 0.98


@pytest.mark.parametrize("name", NAMES)
def test_a_card_fits_its_file(name: str) -> None:
    card = load_card(card_path(name))
    assert card.name == name
    assert card_path(name).parent / card.file == model_path(name)
    assert hashlib.sha256(model_path(name).read_bytes()).hexdigest() == card.sha256
    assert card.normalisation_inside
    assert len(card.classes) == 10
    assert card.accuracy is not None
    assert card.accuracy.low < card.accuracy.value < card.accuracy.high
    assert card.macs > 0
    assert card.parameters > 0
    assert card.latency_ms > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 5])
def test_a_model_gives_the_promised_shapes(name: str, count: int) -> None:
    card = load_card(card_path(name))
    scores = run(name, np.zeros((count, *card.input_shape), np.uint8))
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    assert scores.shape == ((count, card.cells, 10) if card.kind == "collage" else (count, 10))


def test_the_collage_models_cover_the_promised_grids() -> None:
    cards = [load_card(card_path(name)) for name in COLLAGES]
    assert [(card.grid, card.tile_side) for card in cards] == [(2, 32), (3, 32), (4, 32)]


def test_a_three_by_three_pass_costs_at_most_six_tenths_of_a_base_pass() -> None:
    assert load_card(card_path("cifar10-collage-3x3")).relative_cost <= 0.6


def test_the_base_model_is_right(shipped: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    images, labels = shipped
    assert (run("cifar10-base", images).argmax(axis=1) == labels).mean() >= 0.85


@pytest.mark.parametrize("name", COLLAGES)
def test_full_collages_are_right(name: str, shipped: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    images, labels = shipped
    grid = load_card(card_path(name)).grid
    found = run(name, canvases(images, grid)).argmax(axis=2).reshape(-1)
    assert (found == labels[: len(found)]).mean() >= 0.75


def test_nearly_empty_collages_are_right(shipped: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    images, labels = shipped
    drawn = np.zeros((120, 96, 96, 3), np.uint8)
    cells = np.arange(120) % 9
    for place, cell in enumerate(cells):
        row, column = divmod(int(cell), 3)
        drawn[place, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = images[place]
    found = run("cifar10-collage-3x3", drawn)[np.arange(120), cells].argmax(axis=1)
    assert (found == labels[:120]).mean() >= 0.7


def test_the_files_are_small() -> None:
    assert sum(os.path.getsize(model_path(name)) for name in NAMES) < 40_000_000


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="cifar10-base"):
        model_path("resnet")
