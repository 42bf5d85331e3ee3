"""How convolutions are cut."""

import pytest
import torch

from evenkeel.coding.sums.bucket_bases import ConvSlices


@pytest.mark.parametrize(
    ("shape", "longest", "size"),
    [
        ((16, 16, 3, 3), 768, 768),  # the paper's: 3 * 16 * 16
        ((16, 16, 3, 3), 700, 256),
        ((64, 3, 3, 3), 768, 576),
        ((64, 64, 3, 3), 768, 512),  # 64 * 64 is too long, so whole runs of filters
        ((512, 512, 3, 3), 768, 512),
        ((1000, 8, 1, 1), 768, 500),  # even one run of filters is too long
        ((6, 5, 7), 768, 210),
        ((1, 1, 1, 1), 768, 1),
        ((4, 2, 3, 3, 3), 24, 24),
    ],
)
def test_slices_are_the_largest_whole_parts_of_the_layer(shape: tuple[int, ...], longest: int, size: int) -> None:
    slices = ConvSlices(0, shape, longest)
    assert slices.size == size
    assert slices.count * size == slices.numel


def test_neighbours_are_filters_then_channels_then_space() -> None:
    weights = torch.arange(4 * 2 * 3 * 2.0).view(4, 2, 3, 2)
    cut = ConvSlices(5, (4, 2, 3, 2), 8).cut(torch.cat((torch.zeros(5), weights.reshape(-1), torch.ones(3))))
    expected = [[float(weights[f, c, y, x]) for c in range(2) for f in range(4)] for y in range(3) for x in range(2)]
    assert cut.tolist() == [expected]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("shape", [(4, 2, 3, 2), (3, 5, 4), (2, 3, 2, 2, 2), (7, 1, 1, 1)])
def test_putting_undoes_cutting(shape: tuple[int, ...], layers: int) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).reshape(-1)
    weights = torch.cat([weights + layer for layer in range(layers)])
    vector, put = torch.cat((torch.ones(3), weights, torch.ones(2))), torch.ones(len(weights) + 5)
    slices = ConvSlices(3, shape, 10, layers)
    slices.put(slices.cut(vector), put)
    assert torch.equal(put, vector)
