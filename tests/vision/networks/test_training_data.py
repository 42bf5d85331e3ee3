"""Laws of the collages and augmentations that training uses."""

import itertools

import numpy as np
import pytest
import torch

from evenkeel.errors import ConfigurationError
from evenkeel.images.image_set import ImageSet
from evenkeel.vision.networks.data import (
    alternating_flip,
    as_images,
    collage,
    random_blanks,
    translate,
)


def some_tiles(count: int, seed: int = 0) -> "torch.Tensor":
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("grid", [1, 2, 3, 4])
def test_cell_i_holds_item_i_and_blank_cells_are_zero(grid: int) -> None:
    generator = torch.Generator().manual_seed(grid)
    cells = grid * grid
    tiles = some_tiles(6 * cells, grid)
    blank = random_blanks(6, grid, generator)
    canvases = collage(tiles, grid, blank)
    assert canvases.shape == (6, 3, grid * 32, grid * 32)
    assert canvases.dtype == torch.uint8
    for canvas in range(6):
        for cell in range(cells):
            row, column = divmod(cell, grid)
            found = canvases[canvas, :, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
            if blank[canvas, cell]:
                assert not found.any()
            else:
                assert torch.equal(found, tiles[canvas * cells + cell])


def test_blanks_come_at_every_place_and_count_but_never_everywhere() -> None:
    blank = random_blanks(4000, 3, torch.Generator().manual_seed(0), full_share=0.5)
    counts = blank.sum(1).bincount(minlength=9)
    assert len(counts) == 9  # never all nine
    assert (counts > 80).all()
    assert 0.45 < counts[0] / 4000 < 0.62
    places = blank.float().mean(0)
    assert places.max() - places.min() < 0.05


def test_translation_moves_by_whole_pixels_and_reflects_at_edges() -> None:
    tiles = some_tiles(64)
    moved = translate(tiles, 2, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(tiles.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    windows = [padded[:, :, y : y + 32, x : x + 32] for y in range(5) for x in range(5)]
    same = torch.stack([(window == moved).flatten(1).all(1) for window in windows])
    assert same.any(0).all()
    assert same.any(1).sum() > 15  # most of the 25 shifts occur among 64


def test_alternating_flips_show_both_ways_in_any_two_epochs() -> None:
    tiles, indices = some_tiles(200), torch.arange(200)
    epochs = [alternating_flip(tiles, indices, epoch, seed=0) for epoch in range(4)]
    mirrored = [(epoch == tiles.flip(3)).flatten(1).all(1) for epoch in epochs]
    for early, late in itertools.pairwise(mirrored):
        assert torch.equal(early, ~late)
    assert 0.35 < mirrored[0].float().mean() < 0.65


def test_images_come_for_torch_with_their_labels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    found = as_images(ImageSet(pixels, np.array([2, 0, 1])))
    assert found.labels.tolist() == [2, 0, 1]
    assert np.array_equal(found.pixels.numpy(), pixels.transpose(0, 3, 1, 2))
    with pytest.raises(ConfigurationError, match="labels are needed"):
        as_images(ImageSet(pixels))


@pytest.mark.parametrize("shape", [(20, 36), (36, 20)])
def test_images_that_are_not_square_keep_their_shape_when_they_are_moved(shape: tuple[int, int]) -> None:
    images = torch.arange(40 * 3 * 20 * 36).reshape(40, 3, *shape)
    moved = translate(images, 2, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images.double(), (2, 2, 2, 2), mode="reflect").long()
    windows = [padded[:, :, y : y + shape[0], x : x + shape[1]] for y in range(5) for x in range(5)]
    assert torch.stack([(window == moved).flatten(1).all(1) for window in windows]).any(0).all()
