"""Numbers of a few bits in bytes."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from evenkeel.coding.sums.integer_lanes import IntegerWire, max_workers, pack_bits, unpack_bits
from evenkeel.errors import CodeError, ConfigurationError


def stream(numbers: list[int], width: int) -> bytes:
    """The readable twin: one long integer."""
    whole = sum(number << (index * width) for index, number in enumerate(numbers))
    return whole.to_bytes(-(-len(numbers) * width // 8), "little")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), width=st.integers(1, 31))
def test_the_bytes_are_one_little_endian_stream(data: st.DataObject, width: int) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2**width - 1) | st.just(2**width - 1), max_size=20))
    packed = pack_bits(torch.tensor(numbers, dtype=torch.int32), width)
    assert bytes(packed.tolist()) == stream(numbers, width)
    unpacked = unpack_bits(packed, width, len(numbers))
    assert unpacked.tolist() == numbers
    assert unpacked.dtype == (torch.uint8 if width <= 8 else torch.int32)


def test_two_nibbles_share_a_byte_the_first_one_low() -> None:
    assert pack_bits(torch.tensor([1, 2, 15]), 4).tolist() == [0x21, 0x0F]


def test_wrong_widths_and_lengths_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="1 to 31 bits, found 0"):
        pack_bits(torch.tensor([1]), 0)
    with pytest.raises(CodeError, match="3 numbers of 5 bits take 2 bytes"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 5, 3)


def test_lanes_grow_before_they_overflow() -> None:
    wires = {world: IntegerWire(4, 17, 8, world) for world in (1, 4, 8, 15, 16, max_workers(17))}
    assert {wires[world].lane_type for world in (1, 4, 8, 15)} == {torch.uint8}
    assert {wires[world].lane_type for world in (16, max_workers(17))} == {torch.int32}
    assert [wires[world].down_width for world in (1, 4, 8, 15, 16)] == [5, 7, 8, 8, 9]
    assert 17 * max_workers(17) <= 2**31 - 1 < 17 * (max_workers(17) + 1)
    with pytest.raises(ConfigurationError, match="do not fit into 32 bits"):
        IntegerWire(4, 17, 8, max_workers(17) + 1)
