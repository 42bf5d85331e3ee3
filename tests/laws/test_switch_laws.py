"""What every policy and every form of the switch's rule keeps to."""

import pytest
from hypothesis import given, settings

from evenkeel.errors import PacketError
from evenkeel.switch.aggregator import Event, To
from evenkeel.switch.packet import Kind, Packet, Reason, parse, write
from evenkeel.switch.table import Table
from switch_packets import JOBS, RULES, PlainTable, arrivals, filled, lanes_of, needs_compiler, sum_over

SWITCHES = [PlainTable, pytest.param(Table, marks=needs_compiler)]
laws = pytest.mark.parametrize("policy", RULES)
forms = pytest.mark.parametrize("form", SWITCHES)


@laws
@forms
@settings(max_examples=25, deadline=None)
@given(came=arrivals(hostile=False))
def test_whatever_leaves_is_the_sum_of_exactly_the_workers_in_its_bitmap(form, policy, came):
    table = filled(form(RULES[policy]))
    for each in came:
        to, data = table.step(each.data, each.sender, each.now_ns)
        if to == To.NOBODY:
            continue
        packet = parse(data)
        if packet.kind in (Kind.PARTIAL, Kind.RESULT):
            assert packet.payload == sum_over(packet)
        if packet.kind == Kind.RESULT and each.sender < 32 and data != each.data:
            assert packet.bitmap == JOBS[packet.job].everyone


@laws
@forms
@settings(max_examples=25, deadline=None)
@given(came=arrivals(hostile=False))
def test_no_worker_is_lost_or_added_twice(form, policy, came):
    """Every gradient that came in is, once, in a slot or in what has left, unless it was dropped by name."""
    table = filled(form(RULES[policy]))
    inside: dict[tuple[int, int, int], int] = {}  # bits in slots, by what came and left
    for each in came:
        before = table.counts
        _, data = table.step(each.data, each.sender, each.now_ns)
        event = next(what for what, count in table.counts.items() if count > before.get(what, 0) and what <= 24)
        packet = parse(each.data)
        key = (packet.job, packet.epoch, packet.fragment)
        if event in (Event.INSTALLED, Event.ADDED, Event.EVICTED):
            assert not inside.get(key, 0) & packet.bitmap
            inside[key] = inside.get(key, 0) | packet.bitmap
        if event in (Event.EVICTED, Event.FLUSHED, Event.COMPLETED):
            left = parse(data)
            own = 0 if event == Event.EVICTED or packet.kind == Kind.REMINDER else packet.bitmap
            held = inside.pop((left.job, left.epoch, left.fragment), 0)
            assert left.bitmap == held | own
        if event == Event.FORWARDED and packet.kind == Kind.RESULT:
            inside.pop(key, None)
        held = {(s.job, s.epoch, s.fragment): s.bitmap for s in table.slots.values()}
        for held_key, bitmap in held.items():
            full = bitmap == JOBS[held_key[0]].everyone  # ATP and SwitchML keep it after it has left
            assert full or inside[held_key] == bitmap


@laws
@forms
@settings(max_examples=25, deadline=None)
@given(came=arrivals(hostile=True))
def test_a_packet_that_is_dropped_changes_nothing_but_a_count(form, policy, came):
    table = filled(form(RULES[policy]))
    for each in came:
        slots, tombs, epochs, counts = table.slots, table.tombs, table.epochs, table.counts
        to, _ = table.step(each.data, each.sender, each.now_ns)
        raised = {what for what, count in table.counts.items() if count > counts.get(what, 0)}
        assert sum(1 for what in raised if what <= Event.ANSWERED) == 1
        if any(isinstance(what, Reason) for what in raised):
            assert to == To.NOBODY
            assert (table.slots, table.tombs, table.epochs) == (slots, tombs, epochs)


@laws
@forms
@settings(max_examples=25, deadline=None)
@given(came=arrivals(hostile=True))
def test_only_what_parses_and_belongs_to_a_job_gets_anywhere(form, policy, came):
    table = filled(form(RULES[policy]))
    for each in came:
        to, _ = table.step(each.data, each.sender, each.now_ns)
        try:
            packet = parse(each.data)
        except PacketError:
            assert to == To.NOBODY
            continue
        job = JOBS.get(packet.job)
        if job is None or packet.token != job.token or each.sender > 32:
            assert to == To.NOBODY
        if to in (To.WORKERS, To.ALL) and packet.kind in (Kind.RESULT, Kind.NACK):
            assert each.sender == 32  # nobody but the server says what a result is


@laws
@forms
def test_all_workers_in_any_order_complete_a_fragment(form, policy):
    for number, job in JOBS.items():
        table = filled(form(RULES[policy]))

        for turn, worker in enumerate(reversed(range(job.workers))):
            raw = lanes_of(number, 0, 3, worker)
            data = write(Packet(Kind.GRADIENT, job.lanes, number, job.token, 3, 1 << worker, payload=raw))
            to, sent = table.step(data, worker, turn)
        packet = parse(sent)
        assert packet.bitmap == job.everyone
        assert packet.payload == sum_over(packet)
        echoed = policy == "atp" or (job.via_server and policy != "switchml")
        assert (to, packet.kind) == ((To.SERVER, Kind.PARTIAL) if echoed else (To.ALL, Kind.RESULT))
