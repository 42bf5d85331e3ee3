"""The Hadamard rotation against its matrix."""

import pytest
import torch

from evenkeel.coding.sums.counter_hash import signs
from evenkeel.coding.sums.rotation import hadamard, padded_length, rotate, rotate_back


def matrix(size: int) -> "torch.Tensor":
    """Sylvester's construction."""
    grown = torch.ones(1, 1)
    while len(grown) < size:
        grown = torch.cat((torch.cat((grown, grown), 1), torch.cat((grown, -grown), 1)), 0)
    return grown


@pytest.mark.parametrize(("length", "lanes"), [(0, 0), (1, 1), (2, 2), (3, 4), (16, 16), (17, 17), (25, 32), (37, 40)])
def test_short_blocks_are_padded_to_a_power_of_two(length: int, lanes: int) -> None:
    assert padded_length(length, 16) == lanes


@pytest.mark.parametrize("lanes", [0, 1, 4, 16, 32, 40])
def test_each_block_is_multiplied_by_its_matrix(lanes: int) -> None:
    vector = torch.randn(lanes, generator=torch.Generator().manual_seed(0))
    blocks = [matrix(len(part)) @ part for part in vector.split(16) if len(part)]
    expected = torch.cat(blocks) if blocks else vector
    torch.testing.assert_close(hadamard(vector, 16), expected)


def test_whole_numbers_stay_whole() -> None:
    vector = torch.randint(-136, 137, (8192,), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(hadamard(hadamard(vector, 4096), 4096), 4096 * vector)


def test_rotating_back_undoes_rotating_and_keys_differ() -> None:
    vector = torch.randn(40, generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([16.0] * 32 + [8.0] * 8)
    torch.testing.assert_close(rotate_back(rotate(vector, 16, 77), 16, 77) / sizes, vector)
    assert not torch.equal(rotate(vector, 16, 77), rotate(vector, 16, 78))
    torch.testing.assert_close(rotate(vector, 16, 77), hadamard(vector * signs(40, 77, vector.device), 16))


def test_energy_is_spread_evenly() -> None:
    constant = torch.ones(4096)  # without signs, one coordinate would get it all
    spread = rotate(constant, 4096, 5) / 64
    assert float(spread.square().mean()) == pytest.approx(1, abs=1e-4)
    assert float(spread.abs().max()) < 5
