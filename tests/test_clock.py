"""Virtual time, and that a real loop has the same three methods."""

import asyncio

from hypothesis import given, strategies as st

from evenkeel.clock import LoopClock, VirtualClock


@given(st.lists(st.floats(0, 10), max_size=30))
def test_calls_come_in_order_of_time_and_equal_times_in_the_order_they_were_asked_for(times):
    clock = VirtualClock()
    called = []
    for number, when in enumerate(times):
        clock.call_at(when, lambda when=when, number=number: called.append((clock.time(), when, number)))
    clock.run()
    assert [(when, number) for _, when, number in called] == sorted((when, number) for number, when in enumerate(times))
    assert all(now == when for now, when, _ in called)


def test_run_stops_at_its_end_and_goes_on_from_there():
    clock, called = VirtualClock(), []
    for when in (1.0, 2.0, 3.0):
        clock.call_at(when, called.append, when)
    clock.run(2.0)
    assert (called, clock.time()) == ([1.0, 2.0], 2.0)
    clock.run(2.5)
    assert clock.time() == 2.5
    clock.run()
    assert (called, clock.time()) == ([1.0, 2.0, 3.0], 3.0)


def test_call_soon_comes_before_time_moves_on_but_not_from_inside():
    clock, called = VirtualClock(5.0), []

    def first():
        clock.call_soon(called.append, "soon")
        called.append("first")

    clock.call_at(5.0, first)
    clock.call_at(5.1, called.append, "later")
    clock.run()
    assert called == ["first", "soon", "later"]


def test_what_is_past_comes_now_and_time_never_goes_back():
    clock, seen = VirtualClock(), []
    clock.call_at(2.0, lambda: clock.call_at(1.0, lambda: seen.append(clock.time())))
    clock.run()
    assert seen == [2.0]


def test_a_cancelled_call_never_comes_and_does_not_move_time():
    clock, called = VirtualClock(), []
    timer = clock.call_at(9.0, called.append, 9.0)
    clock.call_at(1.0, timer.cancel)
    clock.run()
    assert (called, clock.time()) == ([], 1.0)


def test_a_real_loop_calls_soon_and_at_its_time():
    async def scenario():
        clock = LoopClock(asyncio.get_running_loop())
        called, done = [], asyncio.Event()
        began = clock.time()
        clock.call_at(began + 0.002, done.set)
        cancelled = clock.call_at(began, called.append, "cancelled")
        clock.call_at(began - 1.0, called.append, "past")
        clock.call_soon(called.append, "soon")
        cancelled.cancel()
        assert called == []
        await done.wait()
        return called, clock.time() - began

    called, passed_s = asyncio.run(scenario())
    assert sorted(called) == ["past", "soon"]
    assert passed_s > 0.0015
