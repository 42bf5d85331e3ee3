"""The simulator beside the C code of hosts and servers, on a network in virtual time: one job, links of 100 Mbit/s."""

from dataclasses import dataclass

import numpy as np
import pytest

from evenkeel.switch.aggregator import Event, Rule, SlotPolicy
from evenkeel.switch.packet import LaneType
from evenkeel.switch.simulator import LayerLoad, SimulatedNetwork, TrainingJob, simulate
from evenkeel.switch.terms import Terms
from switch_packets import needs_compiler
from virtual_transport import MS, Transport, Weather, Worker

pytestmark = needs_compiler

LANES, FRAGMENTS, WINDOW = 64, 800, 64
PACKET_BYTES = 4 * LANES + 32 + 42  # lanes, our header, those of UDP, IP and Ethernet
RATE_BPS, LATENCY_S, COMPUTE_MS = 100e6, 20e-6, 10


@dataclass(frozen=True)
class Measured:
    """What an exchange took, and which share of its fragments the switch completed."""

    step_s: float
    in_switch: float


def rule_of(policy: str, slots: int) -> Rule:
    chosen = SlotPolicy.of(policy)
    return Rule.of(chosen, 4096 if chosen == SlotPolicy.UNLIMITED else slots, words=LANES // 2)


def really(policy: str, workers: int, slots: int, late_ms: int) -> Measured:
    """The second exchange of two: the ranks begin the first one as they are welcomed."""
    terms = [Terms(300, 99, worker, workers, LaneType.INTS, LANES, window=WINDOW) for worker in range(workers)]
    net = Transport(
        *(terms, FRAGMENTS, 2, "kernel", rule_of(policy, slots)),
        *(Weather(rate_bps=RATE_BPS, latency_ns=round(1e9 * LATENCY_S), queue_ns=10**12), 1),
        compute_ns=lambda worker, _: (COMPUTE_MS + late_ms * (worker == workers - 1)) * MS,
    )
    before: list[int] = []
    begin = net._begin

    def noted(worker: Worker) -> None:
        if worker.exchange == 1 and not before and net.table is not None:
            before.append(net.table.counts.get(Event.COMPLETED, 0))
        begin(worker)

    net._begin = noted  # type: ignore[method-assign]
    net.run(60_000 * MS)
    assert net.table is not None
    completed = net.table.counts.get(Event.COMPLETED, 0) - before[0]
    ends = [max(worker.finished_ns[exchange] for worker in net.workers) for exchange in range(2)]
    net.close()
    return Measured((ends[1] - ends[0]) / 1e9, completed / FRAGMENTS)


def simulated(policy: str, workers: int, slots: int, late_ms: int) -> Measured:
    packet_s = PACKET_BYTES * 8 / RATE_BPS
    network = SimulatedNetwork(
        rate_bps=RATE_BPS,
        fragment_bytes=PACKET_BYTES,
        worker_delay_s=LATENCY_S,
        server_delay_s=LATENCY_S,
        window_round_trips=WINDOW * packet_s / (4 * LATENCY_S),
    )
    factors = np.ones((2, workers))
    factors[:, -1] = 1 + late_ms / COMPUTE_MS
    layer = LayerLoad(FRAGMENTS * PACKET_BYTES, COMPUTE_MS / 2e3, COMPUTE_MS / 2e3)
    run = simulate(policy, [TrainingJob(0.0, (layer,), factors)], network, slots)
    return Measured(float(run.times_s[0]) / 2, run.in_switch / (2 * FRAGMENTS))


@pytest.mark.parametrize("workers", [4, 8])
@pytest.mark.parametrize("late_ms", [0, 5])
def test_with_memory_enough_they_are_one(workers: int, late_ms: int) -> None:
    one, other = (find("unlimited", workers, 64, late_ms) for find in (really, simulated))
    assert one.step_s == pytest.approx(other.step_s, rel=0.01)
    assert one.in_switch == other.in_switch == 1


@pytest.mark.parametrize("policy", ["atp-free", "esa", "assoc"])
def test_where_nobody_is_late_no_slot_is_missed(policy: str) -> None:
    one, other = (find(policy, 4, 64, 0) for find in (really, simulated))
    assert one.step_s == pytest.approx(other.step_s, rel=0.01)
    assert one.in_switch == other.in_switch == 1


@pytest.mark.parametrize("slots", [16, 64])
def test_as_many_fragments_find_no_slot_that_is_held_for_the_server(slots: int) -> None:
    one, other = (find("atp", 4, slots, 1) for find in (really, simulated))
    assert one.in_switch == pytest.approx(other.in_switch, abs=0.06)


@pytest.mark.parametrize(("workers", "late_ms"), [(4, 1), (8, 1), (4, 5)])
def test_sets_of_slots_lose_as_little(workers: int, late_ms: int) -> None:
    one, other = (find("assoc", workers, 64, late_ms) for find in (really, simulated))
    assert one.step_s == pytest.approx(other.step_s, rel=0.12)
    assert one.in_switch == pytest.approx(other.in_switch, abs=0.15)
