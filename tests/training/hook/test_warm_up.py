"""Kernels are compiled when a state is made, not in its first steps."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numba
import pytest

import evenkeel
from evenkeel.coding.sum_code import SumCode
from evenkeel.coding.sums.kernels import cpu, threads, twins_only
from evenkeel.reducers.ranks.collectives import Collectives
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from evenkeel.training.hook import warm_up as warming
from training_helpers import SHAPES, Model, in_threads, run


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Loops that ran, and for which types Numba compiles them."""
    found: set[tuple[str, str]] = set()

    def share_out(kernel: Any, parts: int, part_lanes: int, *arguments: Any) -> None:
        found.add((kernel.__name__, str([numba.typeof(argument) for argument in arguments])))
        threads.share_out(kernel, parts, part_lanes, *arguments)

    monkeypatch.setattr(cpu, "share_out", share_out)
    return found


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    warming._announce.cache_clear()
    yield
    warming._announce.cache_clear()


@pytest.mark.parametrize("reducer", [evenkeel.Sharded, evenkeel.ProcessGroup])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        evenkeel.THC,
        lambda: evenkeel.THC(bits=8),
        lambda: evenkeel.FixedPoint(bits=6),
        lambda: evenkeel.GradiVeQ(evenkeel.THC()),
        lambda: evenkeel.LowRank(2, evenkeel.THC(block=512)),
    ],
    ids=["thc", "thc8", "fixed_point", "gradiveq", "low_rank"],
)
def test_no_step_compiles_anything(
    compiled: set[tuple[str, str]], reducer: type, feedback: bool, make: Callable[[], SumCode]
) -> None:
    def make_state(ranks: Collectives) -> evenkeel.HookState:
        return evenkeel.HookState(make(), error_feedback=feedback, reducer=reducer(ranks))

    states = in_threads(2, lambda ranks: (ranks.rank, make_state(ranks)))
    ready = set(compiled)
    assert ready
    compiled.clear()
    run_both = lambda ranks: run(states[ranks.rank][1], Model(SHAPES), ranks.rank, range(17))
    in_threads(2, run_both)
    assert compiled
    assert compiled <= ready


def test_a_process_group_that_is_opened_later_finds_lanes_of_both_types_ready(compiled: set[tuple[str, str]]) -> None:
    evenkeel.HookState(evenkeel.THC()).close()
    ready = set(compiled)
    for world in (2, 64):
        compiled.clear()
        evenkeel.HookState(evenkeel.THC(), reducer=evenkeel.Sharded(thread_collectives(world)[0])).close()
        assert compiled
        assert compiled <= ready


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="evenkeel"):
        for code in (evenkeel.THC(), evenkeel.FixedPoint(), None):
            evenkeel.HookState(code, reducer=evenkeel.Sharded(thread_collectives(1)[0])).close()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "seconds of processor time when a machine does it for the first time" in caplog.text


def test_nothing_is_said_where_nothing_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="evenkeel"):
        evenkeel.HookState(None, reducer=evenkeel.Sharded(thread_collectives(1)[0])).close()
        with twins_only():
            evenkeel.HookState(evenkeel.THC(), reducer=evenkeel.Sharded(thread_collectives(1)[0])).close()
    assert not caplog.records


def test_a_world_that_is_too_large_is_left_to_the_first_step_to_refuse() -> None:
    code = evenkeel.FixedPoint(bits=4)
    code.max_workers = 1
    evenkeel.HookState(code, reducer=evenkeel.Sharded(thread_collectives(2)[0])).close()
