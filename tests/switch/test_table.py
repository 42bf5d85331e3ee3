"""The C rule does bit for bit what the Python rule does."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.errors import PacketError
from evenkeel.switch.aggregator import Event, Job
from evenkeel.switch.build import load
from evenkeel.switch.packet import Kind, LaneType, Packet, Reason, parse, write
from evenkeel.switch.table import COUNTERS, NativeJob, NativeRule, NativeSlot, Table, _NativeTable
from switch_packets import JOBS, RULES, PlainTable, arrivals, filled, honest


@pytest.mark.parametrize("policy", RULES)
@settings(max_examples=40, deadline=None)
@given(came=arrivals(hostile=True))
def test_c_and_python_agree_after_every_packet(policy, came):
    plain, table = filled(PlainTable(RULES[policy])), filled(Table(RULES[policy]))
    for each in came:
        assert table.step(each.data, each.sender, each.now_ns) == plain.step(each.data, each.sender, each.now_ns)
        assert table.slots == plain.slots
        assert table.tombs == plain.tombs
        assert table.epochs == plain.epochs
        assert table.counts == plain.counts


def reason_of(data: bytes) -> int:
    try:
        parse(data)
    except PacketError as error:
        return error.reason
    return 0


@settings(max_examples=200, deadline=None)
@given(packet=honest(), changes=st.lists(st.tuples(st.integers(0, 47), st.integers(0, 255)), max_size=3), cut=st.data())
def test_the_parsers_reject_the_same_bytes_for_the_same_reason(packet, changes, cut):
    data = bytearray(write(packet))
    for place, value in changes:
        if place < len(data):
            data[place] = value
    data = bytes(data[: cut.draw(st.sampled_from([len(data), len(data), len(data), 31, len(data) - 1]))])
    assert load("rule").ek_check_packet(data, len(data)) == reason_of(data)


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=80))
def test_the_parsers_agree_on_noise(data):
    assert load("rule").ek_check_packet(data, len(data)) == reason_of(data)


def test_the_structures_are_as_c_has_them():
    kinds = (NativeJob, NativeSlot, NativeRule, _NativeTable)
    assert [load("rule").ek_sizes(which) for which in range(5)] == [*map(ctypes.sizeof, kinds), COUNTERS]


def test_jobs_of_different_lengths_share_a_table():
    """A long fragment evicts a short one, and the other way round."""
    rule = replace(RULES["esa"], sets=1, words=6)
    jobs = {0: JOBS[0], 1: replace(JOBS[0], token=5, words=6)}
    plain, table = filled(PlainTable(rule), jobs), filled(Table(rule), jobs)
    for priority, number in ((1, 0), (2, 1), (3, 0)):
        job = jobs[number]
        payload = bytes([priority] * 8 * job.words)
        data = write(Packet(Kind.GRADIENT, LaneType.BYTES, number, job.token, 0, 1, 0, priority, payload))
        sent = table.step(data, 0, 0)
        assert sent == plain.step(data, 0, 0)
        assert table.slots == plain.slots
    assert parse(sent[1]).payload == bytes([2] * 48)


@settings(max_examples=200, deadline=None)
@given(
    lanes=st.sampled_from([LaneType.BYTES, LaneType.SHORTS, LaneType.INTS]),
    words=st.integers(1, 5),
    place=st.integers(0, 100),
    off=st.integers(-2, 2),
    data=st.data(),
)
def test_a_lane_beyond_the_bound_is_found_wherever_it_is(lanes, words, place, off, data):
    largest = data.draw(st.integers(1, (1 << lanes.sum_bits) - 1))
    table = Table(replace(RULES["esa"], words=words))
    table.register(0, Job(7, 1, lanes, words, largest))
    kind = {8: np.uint8, 16: np.uint16, 32: np.uint32}[lanes.sum_bits]
    values = np.full(8 * words // kind().itemsize, largest, kind)
    values[place % len(values)] = max(0, min(largest + off, (1 << lanes.sum_bits) - 1))
    too_large = int(values.max()) > largest
    table.step(write(Packet(Kind.GRADIENT, lanes, 0, 7, 0, 1, payload=values.tobytes())), 0, 0)
    assert table.counts == {Reason.BOUND if too_large else Event.COMPLETED: 1}
