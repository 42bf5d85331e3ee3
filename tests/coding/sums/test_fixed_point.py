"""Fixed point: what the lanes are, and where they end. The laws are in tests/laws."""

from typing import Any

import pytest
import torch

from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import ConfigurationError
from sum_rounds import lanes_of


def test_lanes_are_multiples_of_the_largest_over_all_ranks_shifted_to_be_positive() -> None:
    code, this_round = FixedPoint(bits=4, block=8), Round(0, 2)
    vector = torch.tensor([0.0, 7.0, -7.0, 14.0, -14.0, 2.9])
    stats = torch.maximum(code.measure(vector, this_round), torch.tensor([14.0]))
    message = lanes_of(code, vector, stats, this_round)
    assert message.tolist() == [7, 11, 3, 14, 0, 8]  # steps of 2; halves go to the even neighbour
    decoded = code.decode(Total(message, 1), stats, 6, this_round)
    assert decoded.tolist() == [0.0, 8.0, -8.0, 14.0, -14.0, 2.0]


def test_a_block_that_is_small_everywhere_keeps_its_precision() -> None:
    code, this_round = FixedPoint(bits=8, block=8), Round(0, 1)
    vector = torch.cat((torch.full((8,), 1e6), torch.tensor([1e-6, -5e-7])))
    stats = code.measure(vector, this_round)
    decoded = code.decode(Total(lanes_of(code, vector, stats, this_round), 1), stats, 10, this_round)
    torch.testing.assert_close(decoded, vector, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("bits", "world"), [(2, 127), (8, 1), (8, 2), (16, 100), (16, 32768)])
def test_the_largest_sums_are_exact(bits: int, world: int) -> None:
    code, this_round = FixedPoint(bits), Round(0, world)
    ones = torch.ones(3)
    stats = code.measure(ones, this_round)
    message = lanes_of(code, ones, stats, this_round)
    total = message.long() * world
    assert int(total.max()) <= torch.iinfo(message.dtype).max
    wire = code.wire(world)
    assert torch.equal(wire.unpack_total(wire.pack_total(total), 3).long(), total)
    torch.testing.assert_close(code.decode(Total(total, world), stats, 3, this_round), ones)


def test_numbers_at_the_ends_of_float32_survive() -> None:
    code, this_round = FixedPoint(bits=16, block=8), Round(0, 1)
    for size in (2.0**-126, 2.0**125):
        vector = torch.tensor([size, -size, size / 2])
        stats = code.measure(vector, this_round)
        decoded = code.decode(Total(lanes_of(code, vector, stats, this_round), 1), stats, 3, this_round)
        torch.testing.assert_close(decoded, vector, rtol=1e-4, atol=0)
    tiny = code.measure(torch.tensor([2.0**-127]), this_round)
    assert tiny.tolist() == [0.0]
    assert code.measure(torch.tensor([2.0**126]), this_round).tolist() == [float("inf")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits: must be a whole number from 2 to 16, found 1"),
        ({"bits": 17}, "bits: must be a whole number from 2 to 16, found 17"),
        ({"bits": 8.5}, "bits: must be a whole number from 2 to 16, found 8.5"),
        ({"block": 8.0}, "block: must be a whole number, found 8.0"),
        ({"block": 12}, "block: must be a multiple of 8, found 12"),
        ({"block": 0}, "block: must be a multiple of 8, found 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FixedPoint(**settings)
