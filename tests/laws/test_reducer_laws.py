"""The laws of `evenkeel.reducers.reducer`, over every reducer, between threads and between Gloo processes.

To add a reducer: what makes it from a rank's exchanges, in `REDUCERS`.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings, strategies as st

from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.fixed_point import FixedPoint
from evenkeel.coding.sums.float32 import Plain
from evenkeel.coding.sums.thc import THC
from evenkeel.coding.wire import Round, Total
from evenkeel.errors import ReducerError
from evenkeel.reducers.fake import FakeReducer
from evenkeel.reducers.process_group import ProcessGroup
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.group_collectives import GroupCollectives
from evenkeel.reducers.ranks.local_ranks import local_ranks
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from evenkeel.reducers.reducer import Reducer
from evenkeel.reducers.sharded import Sharded, shares_of
from evenkeel.reducers.switch import SwitchReducer
from switch_helpers import server_address, use_server


def switched(ranks: Collectives) -> Reducer:
    return SwitchReducer(server_address(), ranks, timeout_s=30)


REDUCERS: list[Callable[[Collectives], Reducer]] = [FakeReducer, ProcessGroup, Sharded, switched]
CODES = [
    Plain(),
    FixedPoint(bits=4, block=8),
    FixedPoint(bits=12, block=16),
    THC(bits=4),
    THC(bits=6, block=16),
]


def whole_numbers(rank: int, length: int) -> torch.Tensor:
    """A vector whose sums are exact in float32, too."""
    generator = torch.Generator().manual_seed(1000 * length + rank)
    return torch.randint(-50, 50, [length], generator=generator).to(torch.float32)


def one_round(
    reducer: Reducer, code: SumCode, length: int, bucket: int = 0
) -> tuple[Total, torch.Tensor, torch.Tensor]:
    """The total, this rank's message in lanes and the mean of a round with `whole_numbers`."""
    ranks = reducer.ranks
    this_round = Round(ranks.rank, ranks.world, 3, bucket)
    vector = whole_numbers(ranks.rank, length)
    stats = code.measure(vector, this_round)
    stats = ranks.largest(stats) if stats.numel() else stats
    lanes = code.lanes(length, this_round)
    packed = code.encode(vector, stats, this_round)
    before = packed.clone()
    wire = code.wire(ranks.world)
    total = reducer.total(wire, packed, lanes, this_round)
    assert torch.equal(packed, before)
    return total, wire.unpack(packed, lanes), code.decode(total, stats, length, this_round)


def lanes_of(total: Total, code: SumCode, world: int, lanes: int) -> torch.Tensor:
    return code.wire(world).lanes_of(total, lanes)


def check_total(reducer: Reducer, code: SumCode, length: int, bucket: int = 0) -> None:
    """Total and count are exact and alike on all ranks, and the mean is one of the vectors."""
    ranks = reducer.ranks
    total, message, mean = one_round(reducer, code, length, bucket)
    wide = torch.int64 if not message.is_floating_point() else torch.float64
    everyone = torch.stack(ranks.gather(message.to(wide)))
    assert torch.equal(lanes_of(total, code, ranks.world, message.numel()).to(wide), everyone.sum(0))
    for theirs in ranks.gather(total.sums):
        assert torch.equal(theirs, total.sums)
    assert (total.count, total.lost) == (ranks.world, None)
    for theirs in ranks.gather(mean):
        assert torch.equal(theirs, mean)
    true_mean = torch.stack([whole_numbers(rank, length) for rank in range(ranks.world)]).mean(0)
    energy = sum(float(whole_numbers(rank, length).square().mean()) for rank in range(ranks.world)) / ranks.world
    assert float((mean - true_mean).square().mean()) <= 0.05 * energy + 1e-6


def in_threads(world: int, work: Callable[[Collectives], object]) -> None:
    with ThreadPoolExecutor(world) as pool:
        list(pool.map(work, thread_collectives(world)))


@pytest.mark.parametrize("code", CODES, ids=repr)
@pytest.mark.parametrize("make", REDUCERS)
@settings(max_examples=8, deadline=None)
@given(world=st.integers(1, 5), length=st.integers(1, 200), bucket=st.integers(0, 3))
def test_total_is_the_exact_sum(
    make: Callable[[Collectives], Reducer], code: SumCode, world: int, length: int, bucket: int
) -> None:
    in_threads(world, lambda ranks: check_total(make(ranks), code, length, bucket))


@pytest.mark.parametrize("make", REDUCERS)
def test_a_peer_that_left_is_an_error_from_then_on(make: Callable[[Collectives], Reducer]) -> None:
    ranks, leaving = thread_collectives(2)
    reducer, code = make(ranks), FixedPoint(bits=4, block=8)
    make(leaving).close()
    this_round = Round(0, 2)
    packed = code.encode(torch.ones(4), torch.ones(1), this_round)
    for _ in range(2):
        with pytest.raises(ReducerError):
            reducer.total(code.wire(2), packed, 4, this_round)


def test_sharded_sends_what_it_says() -> None:
    def check(ranks: Collectives) -> None:
        code, length = FixedPoint(bits=4, block=8), 8 * 4 * 25
        reducer, this_round = Sharded(ranks), Round(ranks.rank, 4)
        packed = code.encode(whole_numbers(ranks.rank, length), torch.full([100], 50.0), this_round)
        before = ranks.sent_bytes
        wire = code.wire(4)
        total = reducer.total(wire, packed, length, this_round)
        assert wire.down_width == 6  # 4 times 14
        assert total.packed
        assert total.sums.numel() == length * 6 // 8
        assert ranks.sent_bytes - before == 3 * length * (4 + 6) // 8 // 4

    in_threads(4, check)


@pytest.mark.parametrize("length", [180, 900])
def test_sharded_never_unpacks_a_message_or_a_total(length: int) -> None:
    pytest.importorskip("numba", reason="the twins unpack, to add and to decode")

    def check(ranks: Collectives) -> None:
        code = THC(bits=4, block=64)
        wire = code.wire(ranks.world)
        for way in ("unpack", "unpack_total", "lanes_of"):
            setattr(wire, way, None)
        code.wire = lambda world: wire  # type: ignore[method-assign]
        reducer, this_round = Sharded(ranks), Round(ranks.rank, ranks.world)
        vector = whole_numbers(ranks.rank, length)
        stats = ranks.largest(code.measure(vector, this_round))
        message = code.encode(vector, stats, this_round)
        total = reducer.total(wire, message, code.lanes(length, this_round), this_round)
        mean = code.decode(total, stats, length, this_round)
        true = torch.stack([whole_numbers(rank, length) for rank in range(3)]).mean(0)
        assert float((mean - true).square().sum()) <= 0.05 * float(stats.square().sum())

    in_threads(3, check)


def test_all_reduce_widens_lanes_only_where_sums_need_it() -> None:
    def check(ranks: Collectives) -> None:
        for bits, dtype in ((4, torch.uint8), (12, torch.int32)):
            total, _, _ = one_round(ProcessGroup(ranks), FixedPoint(bits=bits, block=8), 9)
            assert total.sums.dtype == dtype
            assert not total.packed

    in_threads(3, check)


@given(lanes=st.integers(0, 500), granule=st.integers(1, 40), world=st.integers(1, 9), first=st.integers(0, 20))
def test_shares_are_whole_granules_and_even(lanes: int, granule: int, world: int, first: int) -> None:
    shares = shares_of(lanes, granule, world, first)
    assert len(shares) == world
    assert sum(shares) == lanes
    ends = [sum(shares[: rank + 1]) for rank in range(world)]
    assert all(end % granule == 0 or end == lanes for end in ends)
    granules = [-(-share // granule) for share in shares]
    assert max(granules) - min(granules) <= 1


def test_left_over_granules_are_spread() -> None:
    assert [shares_of(5, 8, 4, first).index(5) for first in range(5)] == [0, 1, 2, 3, 0]


def lose(this_round: Round, granules: int) -> torch.Tensor:
    """Rank 1 loses granule 0, ranks 1 and 2 lose granule 1, everyone granule 2."""
    lost = torch.zeros(granules, dtype=torch.bool)
    lost[0] = this_round.rank == 1
    lost[1] = this_round.rank in {1, 2}
    lost[2] = True
    return lost


def test_the_fake_loses_as_its_script_says() -> None:
    def check(ranks: Collectives) -> None:
        code, length = FixedPoint(bits=16, block=8), 30
        total, _, mean = one_round(FakeReducer(ranks, lose), code, length)
        assert total.count.tolist() == [2, 1, 0, 3]
        vectors = torch.stack([whole_numbers(rank, length) for rank in range(3)])
        expected = vectors.mean(0)
        expected[:8] = vectors[[0, 2], :8].mean(0)
        expected[8:16] = vectors[0, 8:16]
        expected[16:24] = 0
        assert torch.allclose(mean, expected, atol=0.01)
        assert total.lost.tolist() == lose(Round(ranks.rank, 3), 4).tolist()

    in_threads(3, check)


def test_the_fake_tells_only_those_who_lost() -> None:
    def check(ranks: Collectives) -> None:
        only_last = lambda this_round, granules: torch.full([granules], this_round.rank == 1)
        total, _, _ = one_round(FakeReducer(ranks, only_last), CODES[1], 20)
        assert total.count.tolist() == [1, 1, 1]
        assert (total.lost is not None) == (ranks.rank == 1)

    in_threads(2, check)


def on_gloo(address: str) -> int:
    use_server(address)
    ranks = GroupCollectives(timeout_s=20)
    for make in REDUCERS:
        for code in CODES:
            for length, bucket in ((1, 0), (7, 1), (300, 2), (9000, 0)):
                check_total(make(ranks), code, length, bucket)
    return ranks.rank


def test_reducers_between_processes() -> None:
    assert local_ranks(3, on_gloo, server_address()) == [0, 1, 2]
