"""The transport between workers and a server, over loopback: sums are exact whatever gets lost."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError
from evenkeel.switch.aggregator import Rule, SlotPolicy
from evenkeel.switch.host import StepEnd, SwitchHost, resolve
from evenkeel.switch.packet import HEADER_BYTES, Kind, LaneType, Packet, parse, write
from evenkeel.switch.server import SwitchServer
from evenkeel.switch.terms import THC_TABLE, Control, Terms, control_packet, fit_terms, hello, read_control
from switch_helpers import serving

_TABLE = np.array(THC_TABLE, np.uint8)
_FRAGMENTS = 300
_LIMIT = 600  # steps of 50 ms


def terms_of(world: int, worker: int, table: tuple[int, ...] | None = THC_TABLE, **more: Any) -> Terms:
    bits = (17 * world).bit_length() if table else 0
    lane_type, lanes, _ = fit_terms(table, 4 if table else 16, bits or 20, world, 1, 1500, bits)
    return Terms(0, 0x1234567890, worker, world, lane_type, lanes, bits, **more)


def message(worker: int, size: int, turn: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng((worker, turn)).integers(0, 256, size, dtype=np.uint8)


def lanes_of(row: NDArray[np.uint8]) -> NDArray[np.int64]:
    """What the places in a row of nibbles stand for."""
    return _TABLE[np.stack([row & 15, row >> 4], 1).reshape(-1)].astype(np.int64)


def sums_of(totals: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    return np.unpackbits(totals, bitorder="little").reshape(-1, bits) @ (1 << np.arange(bits))


def exchange(host: SwitchHost, row: NDArray[np.uint8], first: int) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    totals, bitmaps = host.begin(row, first)
    for _ in range(_LIMIT):
        outcome = host.step(0.05)
        if outcome == StepEnd.FINISHED:
            return totals, bitmaps
        if outcome == StepEnd.UNKNOWN:
            assert host.hello(5)
            host.anew()
    raise AssertionError(f"not finished: {host.missing()[:5]}, {host.counters()}")


def in_threads(world: int, work: Callable[[int], object]) -> list[Any]:
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, range(world)))


def rounds(server: SwitchServer, world: int, turns: int = 3) -> None:
    """Exchanges with random messages, whose sums must be exact."""

    def work(worker: int) -> None:
        host = SwitchHost([server.address], terms_of(world, worker), silence_s=10)
        try:
            assert host.hello(5)
            size = _FRAGMENTS * host.terms.up_bytes
            for turn in range(turns):
                totals, bitmaps = exchange(host, message(worker, size, turn), turn * _FRAGMENTS)
                expected = sum(lanes_of(message(each, size, turn)) for each in range(world))
                assert np.array_equal(sums_of(totals, host.sum_bits), expected)
                assert (bitmaps == (1 << world) - 1).all()
        finally:
            host.close()

    in_threads(world, work)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_sums_are_exact(world: int) -> None:
    with serving() as server:
        rounds(server, world)
        assert server.counters()["results"] == 3 * _FRAGMENTS


@pytest.mark.parametrize(("loss_in", "loss_out"), [(0.1, 0.0), (0.0, 0.1), (0.2, 0.2)])
def test_sums_are_exact_whatever_gets_lost(loss_in: float, loss_out: float) -> None:
    with serving(loss_in=loss_in, loss_out=loss_out, seed=5) as server:
        rounds(server, 3)
        counted = server.counters()
        assert counted["results"] == 3 * _FRAGMENTS
        assert (counted["injected_in"] > 0) == (loss_in > 0)
        assert (counted["injected_out"] > 0) == (loss_out > 0)


def test_wide_lanes_and_sums_that_are_not_packed() -> None:
    with serving(rule=None) as server:

        def work(worker: int) -> None:
            host = SwitchHost([server.address], terms_of(2, worker, None), silence_s=10)
            assert host.hello(5)
            assert host.terms.lane_type == LaneType.INTS
            row = np.arange(3 * host.terms.lanes, dtype=np.uint32) * (worker + 1)
            totals, _ = exchange(host, row.view(np.uint8), 0)
            assert np.array_equal(totals.view(np.uint32), np.arange(3 * host.terms.lanes, dtype=np.uint32) * 3)
            host.close()

        in_threads(2, work)


def test_several_servers_share_the_fragments() -> None:
    with serving(loss_in=0.05, seed=1) as one, serving(loss_out=0.05, seed=2) as other:

        def work(worker: int) -> None:
            host = SwitchHost([one.address, other.address], terms_of(2, worker), silence_s=10)
            assert host.hello(5)
            size = _FRAGMENTS * host.terms.up_bytes
            totals, _ = exchange(host, message(worker, size), 0)
            expected = lanes_of(message(0, size)) + lanes_of(message(1, size))
            assert np.array_equal(sums_of(totals, host.sum_bits), expected)
            host.close()

        in_threads(2, work)
        assert one.counters()["results"] == other.counters()["results"] == _FRAGMENTS // 2


def test_a_server_that_forgot_everything_is_told_again() -> None:
    """As after a restart: nobody has said hello to it, and it says so."""
    with serving() as old, serving() as new:

        def work(worker: int) -> None:
            host = SwitchHost([old.address], terms_of(2, worker), silence_s=10)
            assert host.hello(5)
            size = 50 * host.terms.up_bytes
            exchange(host, message(worker, size, 0), 0)
            moved = SwitchHost([new.address], host.terms, silence_s=10)
            moved._settle(host.sum_bits, 1000)  # as if the new one had the old one's address
            moved._low = moved._fragments = 50
            totals, _ = exchange(moved, message(worker, size, 1), 50)
            expected = lanes_of(message(0, size, 1)) + lanes_of(message(1, size, 1))
            assert np.array_equal(sums_of(totals, host.sum_bits), expected)
            host.close()
            moved.close()

        in_threads(2, work)
        assert new.counters()["job"] > 0


def test_a_later_epoch_sums_nothing_of_the_earlier_one() -> None:
    with serving() as server:
        stays, restarts = (SwitchHost([server.address], terms_of(2, worker), silence_s=10) for worker in range(2))
        assert stays.hello(5)
        assert restarts.hello(5)
        size = 4 * stays.terms.up_bytes
        restarts.begin(message(7, size), 0)
        restarts.step(0.02)  # it has sent, and dies
        restarts.close()
        again = SwitchHost([server.address], terms_of(2, 1), silence_s=10)
        for host in (stays, again):
            host.epoch = 1
            assert host.hello(5)
            host.anew(1)
        rows = [message(0, size), message(1, size)]
        done = in_threads(2, lambda worker: exchange((stays, again)[worker], rows[worker], 0))
        for totals, _ in done:
            assert np.array_equal(sums_of(totals, stays.sum_bits), lanes_of(rows[0]) + lanes_of(rows[1]))
        late = SwitchHost([server.address], terms_of(2, 1), silence_s=10)
        with pytest.raises(ConfigurationError, match="later epoch"):
            late.hello(5)
        for host in (stays, again, late):
            host.close()


def test_late_workers_are_left_out_and_get_the_sum() -> None:
    with serving() as server:
        hosts = [
            SwitchHost([server.address], terms_of(3, worker, deadline_s=0.02, at_least=2), silence_s=10)
            for worker in range(3)
        ]
        for host in hosts:
            assert host.hello(5)
        size = 40 * hosts[0].terms.up_bytes
        rows = [message(worker, size) for worker in range(3)]
        done = in_threads(2, lambda worker: exchange(hosts[worker], rows[worker], 0))
        done.append(exchange(hosts[2], rows[2], 0))
        for totals, bitmaps in done:
            assert np.array_equal(sums_of(totals, hosts[0].sum_bits), lanes_of(rows[0]) + lanes_of(rows[1]))
            assert (bitmaps == 0b011).all()
        # In the next exchange it is on time.
        done = in_threads(3, lambda worker: exchange(hosts[worker], rows[worker], 40))
        assert all((bitmaps == 0b111).sum() >= 1 for _, bitmaps in done)
        assert server.counters()["left_out"] >= 40
        for host in hosts:
            host.close()


def test_a_fragment_that_a_later_one_has_overtaken_is_ended_at_its_deadline_too() -> None:
    with serving(rule=None) as server:
        hosts = [
            SwitchHost([server.address], terms_of(3, worker, deadline_s=0.01, at_least=2), silence_s=10)
            for worker in range(3)
        ]
        for host in hosts:
            assert host.hello(5)
        terms = hosts[0].terms
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
            ear.bind(("127.0.0.1", 0))
            ear.settimeout(5)
            ear.sendto(hello(terms, None, 0, 0, 0, 1, 0), server.address)
            for fragment in (5, 0):
                for worker in range(2):
                    packet = Packet(Kind.GRADIENT, terms.lane_type, terms.job, terms.token, fragment, 1 << worker)
                    ear.sendto(write(replace(packet, payload=bytes(terms.up_bytes))), server.address)
                while (result := parse(ear.recv(65536))).kind != Kind.RESULT:
                    pass
                assert (result.fragment, result.bitmap) == (fragment, 0b011)
        for host in hosts:
            host.close()


def test_a_welcome_of_an_earlier_epoch_is_none() -> None:
    with serving() as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
        ear.settimeout(5)
        terms = terms_of(2, 0)
        ear.sendto(hello(terms, None, 3, 0, 0, 1, 0), server.address)
        welcome = ear.recv(65536)
        assert read_control(welcome, terms, 4) is None
        found = read_control(welcome, terms, 3)
        assert found is not None
        assert found[0] == Control.WELCOME
        # Who asks in an epoch that the server does not know is told so.
        first = control_packet(terms, 4, Control.QUERY, 1, bytes(4))
        ear.sendto(first, server.address)
        refused = read_control(ear.recv(65536), terms, 4)
        assert refused is not None
        assert refused[0] == Control.REFUSED


def test_what_does_not_fit_is_counted_and_dropped() -> None:
    with serving() as server:
        host, other = (SwitchHost([server.address], terms_of(2, worker), silence_s=10) for worker in range(2))
        assert host.hello(5)
        assert other.hello(5)
        terms = host.terms
        whole = bytes(terms.up_bytes)
        good = Packet(Kind.GRADIENT, terms.lane_type, terms.job, terms.token, 0, 1, 0, payload=whole)
        packets = {
            "short": write(good)[: HEADER_BYTES - 1],
            "version": b"\x45\x4b\x09" + write(good)[3:],
            "kind": write(replace(good, kind=Kind.RESULT)),
            "length": write(replace(good, payload=bytes(16))),
            "bitmap": write(replace(good, bitmap=1 << 5)),
            "job": write(replace(good, token=99)),
            "epoch": write(replace(good, epoch=7)),
            "ahead": write(replace(good, fragment=1 << 30)),
        }
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for packet in packets.values():
                sender.sendto(packet, server.address)
        assert host.hello(5)  # the server has seen what came before
        counted = server.counters()
        assert {name: counted[name] for name in packets} == dict.fromkeys(packets, 1)
        assert counted["results"] == 0
        host.close()
        other.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"world": 33}, "1 to 32 workers"),
        ({"worker": 2}, "numbered from 0"),
        ({"lanes": 100}, "not added here"),
        ({"world": 16}, "does not hold the sums"),
        ({"at_least": 3}, "at_least"),
    ],
)
def test_wrong_terms_are_refused_with_the_reason(change: dict[str, int], why: str) -> None:
    with serving() as server:
        host = SwitchHost([server.address], replace(terms_of(2, 0), **change), silence_s=10)
        with pytest.raises(ConfigurationError, match=why):
            host.hello(5)
        host.close()


def test_workers_that_differ_are_refused() -> None:
    with serving() as server:
        one = SwitchHost([server.address], terms_of(2, 0), silence_s=10)
        other = SwitchHost([server.address], replace(terms_of(2, 1), deadline_s=1.0, at_least=1), silence_s=10)
        assert one.hello(5)
        with pytest.raises(ConfigurationError, match="differ in their terms"):
            other.hello(5)
        one.close()
        other.close()


def test_a_spoofed_result_is_not_taken() -> None:
    with serving() as server:
        host = SwitchHost([server.address], terms_of(2, 0), silence_s=10)
        assert host.hello(5)
        terms, port = host.terms, host._socket.getsockname()[1]
        down = bytes(terms.down_bytes(host.sum_bits))
        fake = Packet(Kind.RESULT, terms.lane_type, terms.job, terms.token, 0, 3, 0, payload=down)
        totals, _ = host.begin(message(0, terms.up_bytes), 0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for packet in (
                replace(fake, token=1),
                replace(fake, epoch=1),
                replace(fake, bitmap=1),
                replace(fake, payload=down[8:]),
                replace(fake, lanes=LaneType.BYTES),
            ):
                sender.sendto(write(packet), ("127.0.0.1", port))
        assert host.step(0.05) == StepEnd.GOES_ON
        assert host.counters().bad == 5
        assert host.missing() == [0]
        del totals
        host.close()


def test_a_silent_server_is_noticed() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", 0))
        host = SwitchHost([deaf.getsockname()], terms_of(2, 0), silence_s=0.1)
        assert not host.hello(0.05)
        host._settle(6, 1000)
        host.begin(message(0, host.terms.up_bytes), 0)
        outcomes = [host.step(0.05) for _ in range(10)]
        assert StepEnd.SILENT in outcomes
        host.close()


def test_packets_carry_the_priority_of_their_exchange() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        host = SwitchHost([server.getsockname()], terms_of(2, 0), silence_s=10)
        host._settle(6, 1000)
        for first, priority in ((0, 77), (1, 200)):
            host.begin(message(0, host.terms.up_bytes), first, priority)
            host.step(0.01)
            while (sent := parse(server.recv(65536))).kind != Kind.GRADIENT:
                pass  # it asks for what is overdue
            assert (sent.fragment, sent.priority) == (first, priority)
        host.close()


def test_an_address_that_is_taken_or_wrong() -> None:
    with serving() as server, pytest.raises(ConfigurationError, match="another switch"):
        SwitchServer(*server.address)
    for wrong in ("somewhere", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:99999"):
        with pytest.raises(ConfigurationError, match="host:port"):
            resolve(wrong)
    assert len(hello(terms_of(2, 0), None, 0, 0, 0, 1, 0)) % 8 == 0


@pytest.mark.parametrize("policy", list(SlotPolicy), ids=lambda policy: policy.name)
def test_every_policy_gives_the_exact_sums_with_few_slots_and_losses(policy: SlotPolicy) -> None:
    few = {"sets": 16, "regions": 1} if policy != SlotPolicy.SWITCHML else {"sets": 1024}
    more: dict[str, int] = {"sets": 4, "ways": 4, "tombs": 64} if policy == SlotPolicy.ASSOC else few
    with serving(rule=Rule(policy, **more), loss_in=0.05, loss_out=0.05, seed=9) as server:
        rounds(server, 3, turns=2)
        assert server.counters()["results"] == 2 * _FRAGMENTS
