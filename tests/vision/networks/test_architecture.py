"""The networks: shapes, cost, and that a tile's answer depends on that tile alone."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from evenkeel.vision.networks.architecture import ClassifierNet, CollageNet, TileNet, count_macs, count_parameters
from evenkeel.vision.networks.export import fold_norms
from fit_helpers import trained_a_little

SMALL = (8, 8, 16)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@given(grid=st.integers(1, 5), side=st.sampled_from([32, 48, 64]), coarse=st.booleans(), canvases=st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_every_cell_of_any_grid_gets_the_scores_of_its_tile_alone(
    grid: int, side: int, coarse: bool, canvases: int
) -> None:
    tiles = trained_a_little(TileNet(7, SMALL, side, coarse))
    network = CollageNet(tiles, grid, side)
    canvas = torch.randn(canvases, 3, grid * side, grid * side)
    with torch.no_grad():
        scores = network(canvas)
        assert scores.shape == (canvases, grid * grid, 7)
        for row in range(grid):
            for column in range(grid):
                tile = canvas[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
                assert torch.allclose(scores[:, row * grid + column], tiles(tile), atol=1e-4)


def test_blanks_and_neighbours_change_nothing() -> None:
    network = CollageNet(trained_a_little(TileNet(10, SMALL)), 3, 32)
    canvas = torch.randn(1, 3, 96, 96)
    other = torch.randn(1, 3, 96, 96)
    other[:, :, 32:64, 64:] = canvas[:, :, 32:64, 64:]  # the same tile in cell 5
    with torch.no_grad():
        assert torch.equal(network(canvas)[:, 5], network(other)[:, 5])
        assert not torch.equal(network(canvas)[:, 4], network(other)[:, 4])


def test_costs_are_counted_by_hand() -> None:
    assert count_macs(torch.nn.Conv2d(3, 8, 3, padding=1), (3, 10, 10)) == 3 * 8 * 9 * 100
    assert count_parameters(torch.nn.Linear(5, 4)) == 24
    tiles = TileNet(10, SMALL)
    assert count_macs(CollageNet(tiles, 3, 32), (3, 96, 96)) == 9 * count_macs(tiles, (3, 32, 32))


def test_wider_blocks_and_larger_tiles_cost_more() -> None:
    plain = count_macs(TileNet(10, SMALL), (3, 32, 32))
    assert count_macs(TileNet(10, (8, 16, 16)), (3, 32, 32)) > plain
    large = count_macs(TileNet(10, SMALL, side=64), (3, 64, 64))
    assert plain < large < 2 * plain  # halved once before the first block
    assert count_macs(TileNet(10, SMALL, side=128), (3, 128, 128)) < 4 * plain  # and twice
    assert count_macs(TileNet(10, SMALL, coarse=True), (3, 32, 32)) < plain / 2


@pytest.mark.parametrize(
    ("make", "side"),
    [
        (ClassifierNet, 32),
        (lambda: TileNet(10), 32),
        (lambda: TileNet(10, coarse=True), 32),
        (lambda: TileNet(10, (16, 24, 40), 128), 128),
    ],
    ids=["base", "tile", "coarse tile", "large tile"],
)
def test_folded_norms_compute_the_same(make: "type[torch.nn.Module]", side: int) -> None:
    torch.manual_seed(1)
    network = trained_a_little(make())
    images = torch.randn(4, 3, side, side)
    folded = fold_norms(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        expected, found = network(images), folded(images)
    assert (expected - found).abs().max() < 5e-3 * expected.abs().max()  # half-precision weights
