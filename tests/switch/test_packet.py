"""Packets are read as they were written, and what is none is refused for the reason that it has."""

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import ConfigurationError, PacketError
from evenkeel.switch.packet import (
    HEADER_BYTES,
    MAX_WORDS,
    Kind,
    LaneType,
    Packet,
    Reason,
    check_bound,
    parse,
    words_for_mtu,
    write,
)

GRADIENT = Packet(Kind.GRADIENT, LaneType.BYTES, 3, 2**64 - 5, 7, 0b100, 2, 200, bytes(range(16)))


def reason_of(data: bytes) -> Reason:
    with pytest.raises(PacketError) as caught:
        parse(data)
    return Reason(caught.value.reason)


def changed(place: int, value: int) -> bytes:
    data = bytearray(write(GRADIENT))
    data[place] = value
    return bytes(data)


@given(
    kind=st.sampled_from([Kind.GRADIENT, Kind.RESEND, Kind.PARTIAL, Kind.RESULT]),
    lanes=st.sampled_from([lanes for lanes in LaneType if lanes]),
    fields=st.tuples(*[st.integers(0, 2**32 - 1)] * 3),
    token=st.integers(0, 2**64 - 1),
    worker=st.integers(0, 31),
    priority=st.integers(0, 255),
    words=st.integers(1, MAX_WORDS),
)
def test_a_packet_is_read_as_it_was_written(kind, lanes, fields, token, worker, priority, words):
    job, fragment, epoch = fields
    packet = Packet(kind, lanes, job, token, fragment, 1 << worker, epoch, priority, bytes(8 * words))
    data = write(packet)
    assert len(data) == HEADER_BYTES + 8 * words
    assert parse(data) == packet


def test_the_layout_does_not_change():
    assert write(GRADIENT).hex(" ", 4) == (
        "454b0101 03c80200 fbffffff ffffffff 03000000 07000000 04000000 02000000 00010203 04050607 08090a0b 0c0d0e0f"
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.SHORT),
        (write(GRADIENT)[:31], Reason.SHORT),
        (changed(0, 0), Reason.MAGIC),
        (changed(2, 2), Reason.VERSION),
        (changed(3, 0), Reason.KIND),
        (changed(3, 8), Reason.KIND),
        (changed(4, 6), Reason.LANE_TYPE),
        (changed(4, 0), Reason.LANE_TYPE),
        (changed(3, Kind.CONTROL), Reason.LANE_TYPE),
        (changed(6, 3), Reason.LENGTH),
        (changed(7, 2), Reason.LENGTH),
        (write(GRADIENT) + b"\0", Reason.LENGTH),
        (write(GRADIENT)[:-8], Reason.LENGTH),
        (write(replace(GRADIENT, payload=b"")), Reason.LENGTH),
        (write(replace(GRADIENT, payload=bytes(8 * (MAX_WORDS + 1)))), Reason.LENGTH),
        (write(replace(GRADIENT, kind=Kind.NACK)), Reason.LENGTH),
        (changed(24, 0), Reason.BITMAP),
        (changed(24, 3), Reason.BITMAP),
        (write(replace(GRADIENT, kind=Kind.REMINDER, payload=b"")), Reason.BITMAP),
        (write(replace(GRADIENT, kind=Kind.NACK, bitmap=0, payload=b"")), Reason.BITMAP),
        (write(replace(GRADIENT, kind=Kind.RESULT, bitmap=0)), Reason.BITMAP),
    ],
)
def test_what_is_no_packet_is_refused_for_its_reason(data, reason):
    assert reason_of(data) == reason


def test_a_packet_fits_its_frame():
    assert words_for_mtu(1500) == 180
    assert words_for_mtu(3498) == MAX_WORDS
    for mtu in (0, 75, 3515, 9000):
        with pytest.raises(ConfigurationError, match="mtu: must be 76 to 3498"):
            words_for_mtu(mtu)


@pytest.mark.parametrize(
    ("lanes", "workers", "largest"),
    [
        (LaneType.NIBBLES, 17, 15),
        (LaneType.THC, 15, 17),
        (LaneType.BYTES, 1, 255),
        (LaneType.SHORTS, 32, 2047),
        (LaneType.INTS, 32, 2**27 - 1),
    ],
)
def test_the_bound_on_workers_is_the_largest_that_cannot_carry(lanes, workers, largest):
    check_bound(lanes, workers, largest)
    if workers < 32:
        with pytest.raises(ConfigurationError, match=f"use at most {workers} workers"):
            check_bound(lanes, workers + 1, largest)
    else:
        with pytest.raises(ConfigurationError, match="1 to 32 workers, found 33"):
            check_bound(lanes, workers + 1, largest)


@pytest.mark.parametrize(("lanes", "largest"), [(LaneType.THC, 15), (LaneType.BYTES, 0), (LaneType.NONE, 1)])
def test_a_largest_lane_that_the_type_cannot_have_is_refused(lanes, largest):
    with pytest.raises(ConfigurationError):
        check_bound(lanes, 2, largest)
