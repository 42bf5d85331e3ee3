"""Packets hold whole intervals, scattered; parity makes good a loss; a seal opens for its key alone."""

import pytest
from hypothesis import given, strategies as st

from evenkeel.backends.lossy.packets import (
    MAX_PAYLOAD,
    OVERHEAD,
    ImagePacket,
    PacketKind,
    Seal,
    interval_numbers,
    laid_out,
    read_intervals,
    recovered,
    session_keys,
)
from evenkeel.errors import ProtocolError

INTERVALS = st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=80)


@given(INTERVALS, st.integers(1, 20), st.integers(100, 1200), st.sampled_from([0.0, 0.25, 1.0]))
def test_what_is_laid_out_is_read_again(intervals, columns, payload, parity):
    bodies, parities = laid_out(intervals, columns, payload, parity)
    assert all(len(body) + OVERHEAD <= payload for body in bodies + parities)
    places = interval_numbers(columns, len(intervals), len(bodies))
    found = {}
    for body, numbers in zip(bodies, places, strict=True):
        found |= read_intervals(body, numbers)
    # Only what has no room in any packet is left out.
    room = payload - OVERHEAD - (4 if parity else 0)
    too_long = {number for number, one in enumerate(intervals) if len(one) + (1 if len(one) < 128 else 2) > room}
    assert set(range(len(intervals))) - set(found) == too_long


@given(INTERVALS, st.integers(1, 20), st.sampled_from([0.2, 0.5, 1.0]), st.randoms(use_true_random=False))
def test_parity_makes_good_one_loss_in_each_group(intervals, columns, parity, chance):
    bodies, parities = laid_out(intervals, columns, 250, parity)
    groups = len(parities)
    lost = {chance.choice(range(group, len(bodies), groups)) for group in range(groups)}
    here = {index: body for index, body in enumerate(bodies) if index not in lost}
    found = recovered(len(bodies), here, dict(enumerate(parities)))
    assert {index: bodies[index] for index in lost} == found


def test_neighbours_share_no_packet():
    columns, rows, packets = 8, 8, 8
    of = {number: place for place, ones in enumerate(interval_numbers(columns, 64, packets)) for number in ones}
    for number in range(64):
        row, column = divmod(number, columns)
        assert column == columns - 1 or of[number] != of[number + 1]
        assert row == rows - 1 or of[number] != of[number + columns]


@given(st.binary(max_size=100), st.integers(1, 10))
def test_garbage_bodies_are_refused_or_read(body, count):
    try:
        found = read_intervals(body, range(count))
    except ProtocolError:
        return
    assert set(found) <= set(range(count))


@given(
    st.dictionaries(st.integers(0, 9), st.binary(max_size=30)),
    st.dictionaries(st.integers(0, 9), st.binary(max_size=30)),
)
def test_garbage_parity_is_no_exception(bodies, parities):
    recovered(10, bodies, parities)


def test_a_changed_packet_does_not_open():
    there, back = session_keys(b"k" * 16, b"a" * 16, b"b" * 16)
    data = Seal(there).close(ImagePacket(PacketKind.DATA, 7, 1, 3, 55, b"body"))
    assert Seal(there).open(data) == ImagePacket(PacketKind.DATA, 7, 1, 3, 55, b"body")
    for place in range(len(data)):
        with pytest.raises(ProtocolError):
            Seal(there).open(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :])
    other, _ = session_keys(b"k" * 16, b"a" * 16, b"c" * 16)
    for seal in (Seal(back), Seal(other), Seal(b"")):
        with pytest.raises(ProtocolError, match="seal"):
            seal.open(data)
    with pytest.raises(ProtocolError, match="bytes"):
        Seal(there).open(data + bytes(MAX_PAYLOAD))
    with pytest.raises(ProtocolError, match="bytes"):
        Seal(there).open(b"")
