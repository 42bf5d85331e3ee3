"""The reducer over a switch: what it does when the switch dies, comes back, waits for nobody, or rounds its sums."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.low_rank import LowRank
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import ConfigurationError, ReducerError
from evenkeel.reducers.process_group import ProcessGroup
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.group_collectives import GroupCollectives
from evenkeel.reducers.ranks.local_ranks import local_ranks
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from evenkeel.reducers.switch import SwitchReducer
from evenkeel.switch.peers import ExchangeState, PeerDesk, PeerStream
from evenkeel.switch.server import SwitchServer
from evenkeel.training.hook.hook_state import HookState
from switch_helpers import server_address, serving
from training_helpers import SHAPES, Model, in_threads, run

LENGTH = 60_000
CODE = THC(bits=4, block=1024)


def vector(rank: int, step: int, length: int = LENGTH) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(100 * step + rank))


def one_round(reducer: SwitchReducer, step: int, code: SumCode = CODE) -> tuple[Total, Tensor, Tensor]:
    """Total, its lanes, and the lanes that all messages have together."""
    ranks = reducer.ranks
    this_round = Round(ranks.rank, ranks.world, step)
    mine = vector(ranks.rank, step)
    stats = ranks.largest(code.measure(mine, this_round))
    wire, lanes = code.wire(ranks.world), code.lanes(LENGTH, this_round)
    message = code.encode(mine, stats, this_round)
    everyone = [wire.unpack(each, lanes) for each in ranks.gather(message)]
    total = reducer.total(wire, message, lanes, this_round)
    return total, wire.lanes_of(total, lanes).long(), torch.stack(everyone).sum(0, dtype=torch.int64)


def check_rounds(reducer: SwitchReducer, steps: range) -> None:
    for step in steps:
        total, found, expected = one_round(reducer, step)
        assert torch.equal(found, expected)
        assert total.count == reducer.ranks.world


def stopped_when(condition: Callable[[SwitchServer], bool], server: SwitchServer) -> None:
    """Serves until something has happened, and is gone then."""
    while not condition(server):
        server.serve(0.001)
    server.close()


def test_the_switch_dies_between_two_rounds_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    turns = threading.Barrier(3)
    first = SwitchServer()
    address = first.address

    def work(ranks: Collectives) -> None:
        reducer = SwitchReducer("{}:{}".format(*address), ranks, timeout_s=30, silence_s=0.3)
        check_rounds(reducer, range(3))
        assert reducer.stats().through_switch == 3
        turns.wait()  # the server is ended
        turns.wait()
        check_rounds(reducer, range(3, 6))
        assert reducer.stats().down
        assert reducer.fell_back == reducer.stats().over_shares == 3
        turns.wait()  # another one is started
        turns.wait()
        check_rounds(reducer, range(6, 40))
        stats = reducer.stats()
        assert (stats.falls, stats.returns, stats.down) == (1, 1, False)
        assert stats.through_switch + stats.over_shares == 40
        assert stats.through_switch > 10
        reducer.close()

    def others() -> None:
        stop = threading.Event()
        serve = threading.Thread(target=first.run, args=(stop,))
        serve.start()
        turns.wait()
        stop.set()
        serve.join()
        first.close()
        turns.wait()
        turns.wait()
        second = SwitchServer(*address)
        threading.Thread(target=second.run, args=(threading.Event(),), daemon=True).start()
        turns.wait()

    conductor = threading.Thread(target=others)
    conductor.start()
    with caplog.at_level(logging.WARNING):
        in_threads(2, work)
    conductor.join()
    said = [record.message for record in caplog.records if "switch" in record.message]
    assert len(said) == 2
    assert "is gone" in said[0]
    assert "is back" in said[1]


@pytest.mark.parametrize("results", [1, 10, 25, 37])
def test_the_switch_dies_within_a_round(results: int) -> None:
    """Some sums are out: whether a rank has all of them or none, all ranks end the round with the same exact sum."""
    server = SwitchServer(loss_out=0.3, seed=results)
    thread = threading.Thread(
        target=stopped_when, args=(lambda each: each.counters()["results"] >= results, server), daemon=True
    )
    thread.start()

    def work(ranks: Collectives) -> tuple[int, int]:
        reducer = SwitchReducer("{}:{}".format(*server.address), ranks, timeout_s=30, silence_s=0.3)
        check_rounds(reducer, range(4))
        stats = reducer.stats()
        reducer.close()
        return stats.through_switch, stats.over_shares

    done = in_threads(3, work)
    assert len(set(done)) == 1
    assert sum(done[0]) == 4
    assert done[0][1] >= 1
    thread.join()


def test_a_switch_that_is_not_there_at_first() -> None:
    with serving() as gone:
        address = "{}:{}".format(*gone.address)

    def work(ranks: Collectives) -> None:
        reducer = SwitchReducer(address, ranks, timeout_s=20, silence_s=0.1)
        check_rounds(reducer, range(2))
        assert reducer.stats().down
        reducer.close()

    in_threads(2, work)


def test_a_rank_that_goes_away_is_an_error_on_every_other() -> None:
    def work(ranks: Collectives) -> None:
        reducer = SwitchReducer(server_address(), ranks, timeout_s=1.0, silence_s=0.2)
        one_round(reducer, 0)
        if ranks.rank == 2:
            reducer.close()
            return
        this_round = Round(ranks.rank, ranks.world, 1)
        message = CODE.encode(vector(ranks.rank, 1), torch.ones(-(-LENGTH // 1024)), this_round)
        for _ in range(2):
            with pytest.raises(ReducerError):
                reducer.total(CODE.wire(3), message, CODE.lanes(LENGTH, this_round), this_round)

    in_threads(3, work)


def test_without_deadline_the_averages_are_those_over_the_group() -> None:
    for one, other in local_ranks(2, averages, server_address()):
        assert one == other


def averages(address: str) -> list[list[float]]:
    ranks = GroupCollectives(timeout_s=30)
    found: list[list[float]] = [[], []]
    for each, reducer in zip(found, (SwitchReducer(address, ranks, timeout_s=30), ProcessGroup(ranks)), strict=True):
        for code in (THC(block=64), FixedPoint(bits=8, block=64), LowRank(rank=2, inner=THC(block=64))):
            state = HookState(code, reducer=reducer, skip=None)
            steps = run(state, Model(SHAPES), ranks.rank, range(5))
            each += [number for step in steps for average in step for number in average.flatten().tolist()]
            assert state.stats().fell_back == 0
    return found


def test_several_jobs_at_once_share_a_server() -> None:
    def job() -> None:
        in_threads(2, lambda ranks: check_rounds(SwitchReducer(server_address(), ranks, timeout_s=30), range(3)))

    jobs = [threading.Thread(target=job) for _ in range(4)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join()


def test_a_late_rank_is_left_out_and_told() -> None:
    def work(ranks: Collectives) -> None:
        reducer = SwitchReducer(server_address(), ranks, timeout_s=30, deadline=0.05)
        meet = thread_barrier
        this_round = Round(ranks.rank, 3, 0)
        stats = torch.full([-(-LENGTH // 1024)], 40.0)
        lanes, wire = CODE.lanes(LENGTH, this_round), CODE.wire(3)
        messages = [CODE.encode(vector(rank, 0), stats, Round(rank, 3, 0)) for rank in range(3)]
        first = reducer.total(wire, messages[ranks.rank], lanes, this_round)  # opens the job
        assert wire.lanes_of(first, lanes).numel() == lanes
        meet.wait()
        if ranks.rank == 2:
            meet.wait()  # until the others are done
        total = reducer.total(wire, messages[ranks.rank], lanes, this_round)
        if ranks.rank != 2:
            meet.wait()
        expected = (wire.unpack(messages[0], lanes).long() + wire.unpack(messages[1], lanes).long()).tolist()
        assert wire.lanes_of(total, lanes).tolist() == expected
        granules = -(-lanes // 1024)
        assert isinstance(total.count, Tensor)
        assert total.count.tolist() == [2] * granules
        assert (total.lost is not None) == (ranks.rank == 2)
        if total.lost is not None:
            assert total.lost.tolist() == [True] * granules
            assert reducer.stats().left_out == granules  # one in each packet
        mean = CODE.decode(total, stats, LENGTH, this_round)
        true = (vector(0, 0) + vector(1, 0)) / 2
        assert float((mean - true).square().sum() / true.square().sum()) < 0.2

    thread_barrier = threading.Barrier(3)
    in_threads(3, work)


def test_a_deadline_needs_blocks_that_fit_a_packet() -> None:
    def work(ranks: Collectives) -> None:
        reducer = SwitchReducer(server_address(), ranks, deadline=0.1)
        with pytest.raises(ConfigurationError, match="block=1024"):
            one_round(reducer, 0, THC(bits=4))
        reducer.close()

    in_threads(2, work)


@pytest.mark.parametrize(("recode", "most"), [(4, 0.02), (5, 0.006), (6, 0.001)])
def test_rounded_sums_are_alike_on_all_ranks_and_near(recode: int, most: float) -> None:
    def work(ranks: Collectives) -> list[int]:
        reducer = SwitchReducer(server_address(), ranks, timeout_s=30, recode=recode)
        _, found, exact = one_round(reducer, 0)
        assert len(found.unique()) <= 1 << recode
        centred = (exact - exact.double().mean()).double()
        assert float((found - exact).double().square().mean() / centred.square().mean()) < most
        assert reducer.stats().transport.bad == 0
        reducer.close()
        numbers: list[int] = found.tolist()
        return numbers

    done = in_threads(4, work)
    assert all(each == done[0] for each in done)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"deadline": 0.0}, "deadline"),
        ({"at_least": 1}, "deadline"),
        ({"recode": 8}, "recode"),
        ({"mtu": 9000}, "mtu"),
        ({"silence_s": 100.0}, "silence_s"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        SwitchReducer("127.0.0.1:9", thread_collectives(1)[0], **options)


def test_ranks_with_other_settings_are_told() -> None:
    def work(ranks: Collectives) -> None:
        reducer = SwitchReducer(server_address(), ranks, deadline=0.1 + ranks.rank)
        with pytest.raises(ConfigurationError, match="differ in their SwitchReducer"):
            one_round(reducer, 0)
        reducer.close()

    in_threads(2, work)


class _Host:
    """As much of a transport as a desk sees."""

    class terms:
        job = 7

    down_bytes = 8

    @staticmethod
    def get(fragment: int) -> tuple[int, bytes] | None:
        return (3, bytes([fragment] * 8)) if fragment == 5 else None


def two_desks() -> tuple[list[PeerDesk], list[PeerStream]]:
    desks = [PeerDesk("127.0.0.1", worker, 2) for worker in range(2)]
    streams = [PeerStream(_Host()) for _ in desks]  # type: ignore[arg-type]
    for desk, stream in zip(desks, streams, strict=True):
        desk.open(99, [each.address for each in desks])
        desk.add(stream)
    return desks, streams


def heard(desk: PeerDesk, count: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(50):
        found += desk.answers(0.1)
        if len(found) >= count:
            break
    return found


def test_a_worker_gives_the_sums_that_it_has() -> None:
    desks, streams = two_desks()
    streams[1].finish(0, np.arange(32, dtype=np.uint8), np.full(4, 3, np.uint32))
    desks[0].ask(streams[0], 0, [1, 2])
    answers = heard(desks[0], 3)
    assert answers[0].state == ExchangeState.DONE
    assert answers[0].total is None
    assert [(each.fragment, each.bitmap, each.total) for each in answers[1:]] == [
        (1, 3, bytes(range(8, 16))),
        (2, 3, bytes(range(16, 24))),
    ]
    for desk in desks:
        desk.close()


def test_who_is_not_done_gives_nothing_to_who_is_frozen() -> None:
    desks, streams = two_desks()
    desks[0].ask(streams[0], 4, [5])
    assert [each.total for each in heard(desks[0], 2)] == [None, bytes([5] * 8)]
    streams[0].frozen = 4
    desks[0].ask(streams[0], 4, [5])
    assert [(each.state, each.total) for each in heard(desks[0], 1)] == [(ExchangeState.WORKING, None)]
    assert desks[1].frozen_by_another(7, 4)
    assert not desks[1].frozen_by_another(7, 5)
    for desk in desks:
        desk.close()


def test_strangers_are_not_answered() -> None:
    import socket

    desks, streams = two_desks()
    stranger = PeerDesk("127.0.0.1", 1, 2)
    stranger.open(98, [each.address for each in desks])
    stranger.add(streams[1])
    stranger.ask(streams[1], 0, [1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", desks[0].address)
    desks[1].ask(streams[1], 0, [])
    assert len(heard(desks[1], 1)) == 1  # so desk 0 has seen what came before
    assert desks[0].dropped == 2
    assert stranger.answers(0.01) == []
    for desk in (*desks, stranger):
        desk.close()
