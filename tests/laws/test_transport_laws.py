"""What the transport of a switch keeps to in a network that loses, doubles and reorders, while nodes restart."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from evenkeel.switch.aggregator import Rule, SlotPolicy
from evenkeel.switch.packet import LaneType
from evenkeel.switch.terms import THC_TABLE, Terms
from switch_packets import needs_compiler
from virtual_transport import MS, Transport, Weather

pytestmark = needs_compiler

LANES = 64
LONGEST_NS = 20_000 * MS
_TABLE = np.array(THC_TABLE, np.uint8)


@dataclass(frozen=True)
class Case:
    """One run."""

    where: str
    policy: SlotPolicy
    world: int
    lane_type: LaneType
    fragments: int
    exchanges: int
    weather: Weather
    seed: int
    restarts: tuple[tuple[int, int], ...]  # when, in ms; which worker, or -1: the server
    deadline_s: float
    slow_ms: int  # how long the last worker computes


@st.composite
def cases(draw: st.DrawFn, where: str, deadlines: bool) -> Case:
    shares = st.sampled_from([0.0, 0.01, 0.1, 0.25])
    world = draw(st.integers(1, 4))
    policies = [policy for policy in SlotPolicy if where == "user" or policy != SlotPolicy.SWITCHML]
    deadline = draw(st.sampled_from([0.003, 0.02])) if deadlines else 0.0
    nodes = [] if deadlines else [-1, *range(world)]
    moments = st.tuples(st.integers(0, 60), st.sampled_from(nodes or [0]))
    return Case(
        where,
        draw(st.sampled_from(policies)),
        world,
        draw(st.sampled_from([LaneType.THC, LaneType.INTS])),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 3)),
        Weather(draw(shares), draw(shares), draw(shares)),
        draw(st.integers(0, 10**6)),
        tuple(draw(st.lists(moments, max_size=2))) if nodes else (),
        deadline,
        draw(st.sampled_from([0, 0, 5, 60])),
    )


def transport(case: Case) -> Transport:
    few: dict[str, int] = {"sets": 16}
    if case.policy == SlotPolicy.ASSOC:
        few = {"sets": 2, "ways": 4, "tombs": 64}
    elif case.policy == SlotPolicy.SWITCHML:
        few = {"sets": 2048}
    words = LANES * case.lane_type.sum_bits // 64
    bits = 7 if case.lane_type == LaneType.THC else 0
    terms = [
        Terms(
            *(300, 99, worker, case.world, case.lane_type, LANES, bits),
            deadline_s=case.deadline_s,
            at_least=max(1, case.world - 1) if case.deadline_s else 0,
            window=32,
        )
        for worker in range(case.world)
    ]
    return Transport(
        *(terms, case.fragments, case.exchanges, case.where, Rule(case.policy, words=words, **few)),
        *(case.weather, case.seed),
        compute_ns=lambda worker, _: case.slow_ms * MS * (worker == case.world - 1),
    )


def numbers(row: NDArray[np.uint8], lane_type: LaneType) -> NDArray[np.int64]:
    """What a message's lanes stand for."""
    if lane_type == LaneType.INTS:
        return row.view(np.uint32).astype(np.int64)
    return _TABLE[np.stack([row & 15, row >> 4], 1).reshape(-1)].astype(np.int64)


def sums(totals: NDArray[np.uint8], lane_type: LaneType, bits: int) -> NDArray[np.int64]:
    if lane_type == LaneType.INTS:
        return totals.view(np.uint32).astype(np.int64)
    if not bits:
        return totals.astype(np.int64)
    return np.unpackbits(totals, bitorder="little").reshape(-1, bits) @ (1 << np.arange(bits))


def check(case: Case) -> Transport:
    """Runs a case: every worker gets every sum, of exactly the workers that it is said to hold, each once."""
    net = transport(case)
    for moment, node in case.restarts:
        net.after(moment * MS, net.restart_server if node < 0 else lambda node=node: net.restart_worker(node))
    messages: dict[tuple[int, int], NDArray[np.uint8]] = {}
    begin = net._begin

    def noted(worker) -> None:
        begin(worker)
        messages[worker.number, worker.exchange] = numbers(worker.message, case.lane_type)

    net._begin = noted  # type: ignore[method-assign]
    for worker in net.workers:
        messages[worker.number, 0] = numbers(worker.message, case.lane_type)
    net.run(LONGEST_NS)
    try:
        assert [worker.exchange for worker in net.workers] == [case.exchanges] * case.world
        everyone = (1 << case.world) - 1
        for exchange in range(case.exchanges):
            first = net.workers[0].past[exchange]
            held = np.zeros((case.fragments, LANES), np.int64)
            for worker in range(case.world):
                within = (first[2] >> worker & 1).astype(np.int64)[:, None]
                held += messages[worker, exchange].reshape(case.fragments, LANES) * within
            for worker in net.workers:
                _, totals, bitmaps = worker.past[exchange]
                assert np.array_equal(bitmaps, first[2])
                assert np.array_equal(sums(totals, case.lane_type, net.sum_bits), held.reshape(-1))
                assert case.deadline_s or (bitmaps == everyone).all()
        return net
    finally:
        net.close()


@pytest.mark.parametrize("where", ["user", "kernel", "alone"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_sum_holds_every_worker_once_whatever_happens(where: str, data: st.DataObject) -> None:
    check(data.draw(cases(where, deadlines=False)))


@pytest.mark.parametrize("where", ["user", "kernel", "alone"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_with_a_deadline_all_get_one_sum_of_those_that_were_there(where: str, data: st.DataObject) -> None:
    check(data.draw(cases(where, deadlines=True)))
