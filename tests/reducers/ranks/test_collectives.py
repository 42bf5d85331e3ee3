"""The exchanges that reducers are built from: the same checks between threads and between Gloo processes."""

import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from evenkeel.errors import ConfigurationError, ReducerError
from evenkeel.reducers.ranks import group_collectives
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.group_collectives import GroupCollectives
from evenkeel.reducers.ranks.local_ranks import local_ranks
from evenkeel.reducers.ranks.thread_collectives import thread_collectives


def check_exchanges(ranks: Collectives) -> None:
    """Each exchange gives on every rank what its docstring says, and counts its bytes."""
    rank, world = ranks.rank, ranks.world
    everyone = range(world)

    def sent_by(call: Callable[[], object]) -> int:
        before = ranks.sent_bytes
        call()
        return ranks.sent_bytes - before

    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float32):
        base = torch.arange(4).to(dtype)
        size = base.element_size()
        assert torch.equal(ranks.largest(base * (rank + 1)), base * world)
        assert torch.equal(ranks.add(base * (rank + 1)), base * sum(r + 1 for r in everyone))
        assert sent_by(lambda base=base: ranks.add(base)) == 2 * (world - 1) * 4 * size // world

        # Rank a has b + 1 elements for rank b, none where b is 1.
        parts = [torch.full([to + 1 if to != 1 else 0], 10 * rank + to).to(dtype) for to in everyone]
        size_here = rank + 1 if rank != 1 else 0
        swapped = ranks.swap(parts, [size_here] * world)
        for source, row in enumerate(swapped):
            assert torch.equal(row, torch.full([size_here], 10 * source + rank).to(dtype))
        to_others = sum(len(part) for to, part in enumerate(parts) if to != rank)
        assert sent_by(lambda parts=parts, size=size_here: ranks.swap(parts, [size] * world)) == to_others * size

        for row, source in zip(ranks.gather(base + rank), everyone, strict=True):
            assert torch.equal(row, base + source)
        uneven = ranks.gather(base[:rank], [min(4, source) for source in everyone])
        assert [row.tolist() for row in uneven] == [base[:source].tolist() for source in everyone]
        assert sent_by(lambda base=base: ranks.gather(base)) == (world - 1) * 4 * size

        overwritten = base + rank
        sent = sent_by(lambda overwritten=overwritten: ranks.broadcast(overwritten))
        assert torch.equal(overwritten, base)
        assert int(ranks.add(torch.tensor([sent])).item()) == (world - 1) * 4 * size
    infinite = torch.tensor([torch.inf if rank == world - 1 else 1.0])
    assert ranks.largest(infinite).item() == torch.inf
    assert ranks.add(torch.tensor([torch.nan if rank == 0 else 1.0])).isnan().item()
    kept = torch.ones(3)
    ranks.add(kept)
    assert torch.equal(kept, torch.ones(3))
    assert ranks.exchanged_s > 0


@pytest.mark.parametrize("world", [1, 2, 5])
def test_exchanges_between_threads(world: int) -> None:
    with ThreadPoolExecutor(world) as pool:
        list(pool.map(check_exchanges, thread_collectives(world)))


def test_a_thread_that_leaves_is_noticed_at_once() -> None:
    first, second, third = thread_collectives(3, timeout_s=60)
    third.close()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(ranks.add, torch.ones(1)) for ranks in (first, second)]
        for call in calls:
            with pytest.raises(ReducerError, match=r"ranks \[2\] are gone"):
                call.result()
    with pytest.raises(ReducerError, match="cannot exchange gradients any more"):
        first.add(torch.ones(1))
    with pytest.raises(ReducerError, match="closed"):
        third.add(torch.ones(1))


def test_a_thread_that_stays_silent_is_given_up() -> None:
    first, _ = thread_collectives(2, timeout_s=0.01)
    with pytest.raises(ReducerError, match=r"ranks \[1\] stayed silent"):
        first.gather(torch.ones(1))


def test_a_process_group_must_be_there() -> None:
    with pytest.raises(ConfigurationError, match="init_process_group"):
        GroupCollectives().add(torch.ones(1))


@pytest.mark.parametrize("timeout_s", [0, -1, 1e10, float("inf"), float("nan"), "300", True])
def test_a_timeout_that_is_none_is_refused_at_once(timeout_s: object) -> None:
    with pytest.raises(ConfigurationError, match=f"timeout_s.*, found {re.escape(repr(timeout_s))}$"):
        GroupCollectives(timeout_s=timeout_s)


def check_times() -> None:
    """Unless another time is given, a peer may be silent as long as in the group, or in the default one."""
    import torch.distributed as dist

    hour = dist.new_group(timeout=timedelta(hours=1))
    assert group_collectives._timeout_of(hour) == 3600
    assert group_collectives._timeout_of(dist.group.WORLD) == dist.default_pg_timeout.total_seconds()
    waits, wait = [], dist.Work.wait

    def note(work: object, *times: timedelta) -> bool:
        waits.extend(times)
        return wait(work, *times)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.Work, "wait", note)
        for collectives in (GroupCollectives(), GroupCollectives(hour), GroupCollectives(hour, timeout_s=7)):
            collectives.add(torch.ones(1))
    assert waits == [dist.default_pg_timeout, timedelta(hours=1), timedelta(seconds=7)]


def check_forks() -> None:
    """A process that was forked off does not touch the group's connections."""
    import torch.distributed as dist

    given, opened = GroupCollectives(dist.new_group()), GroupCollectives()
    opened.add(torch.ones(1))
    child = os.fork()
    if not child:
        found = []
        for collectives in (given, opened):
            try:
                collectives.add(torch.ones(1))
            except ConfigurationError as error:
                found.append("was forked" in str(error))
        os._exit(0 if found == [True, True] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    given.add(torch.ones(1))


def on_gloo() -> str:
    import torch.distributed as dist

    check_exchanges(GroupCollectives())
    members = [0, 2]
    subgroup = dist.new_group(members)
    rank = dist.get_rank()
    if rank in members:
        part = GroupCollectives(subgroup, timeout_s=20)
        assert (part.rank, part.world) == (members.index(rank), 2)
        check_exchanges(part)
        part.close()
        with pytest.raises(ReducerError, match="closed"):
            part.add(torch.ones(1))
    check_times()
    check_forks()
    # Last: rank 2 dies and the others hear of it at once, also rank 0, which is no neighbour of it in Gloo's ring.
    # Then rank 1 freezes, which rank 0 knows when the time is over.
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    dying = GroupCollectives(timeout_s=60)
    pids = [int(row) for row in dying.gather(torch.tensor([os.getpid()]))]
    if rank == 2:
        os._exit(1)
    begin = time.monotonic()
    with pytest.raises(ReducerError, match="lost a peer"):
        dying.add(torch.ones(1))
    freezing = GroupCollectives(pair, timeout_s=0.5)
    freezing.add(torch.ones(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(ReducerError, match=r"timeout_s=0\.5"):
        freezing.add(torch.ones(1))
    with pytest.raises(ReducerError, match="any more"):
        freezing.add(torch.ones(1))
    os.kill(pids[1], signal.SIGKILL)
    return "noticed in time" if time.monotonic() - begin < 30 else "too late"


def test_exchanges_between_processes() -> None:
    assert local_ranks(3, on_gloo) == ["noticed in time", None, None]


def fails(message: str) -> None:
    raise ValueError(message)


def test_a_failing_rank_is_shown() -> None:
    with pytest.raises(ReducerError, match=r"rank 0 of 1 failed:\n(.|\n)*ValueError: what it said"):
        local_ranks(1, fails, "what it said")
