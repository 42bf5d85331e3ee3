"""Waits that share a timer."""

from hypothesis import given, strategies as st

from evenkeel.clock import VirtualClock
from evenkeel.serving.front.sweeper import Sweeper


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3) | st.none()), max_size=12))
def test_what_stays_is_called_once_in_time_and_what_is_removed_before_never(waits):
    clock = VirtualClock()
    sweeper = Sweeper(1.0, lambda: clock)
    called = {}

    def add(number, removed_after):
        added = clock.time()

        def callback():
            assert number not in called
            called[number] = clock.time() - added

        sweeper.add(callback)
        if removed_after is not None:
            clock.call_at(added + removed_after, sweeper.remove, callback)

    now = 0.0
    for number, (gap, removed_after) in enumerate(waits):
        now += gap
        clock.call_at(now, add, number, removed_after)
    clock.run()  # ends: with nothing left to look at there is no timer
    assert all(1 - 1e-9 <= waited <= 2 + 1e-9 for waited in called.values())
    for number, (_, removed_after) in enumerate(waits):
        if removed_after is None or removed_after > 2.001:
            assert number in called
        elif removed_after < 0.999:
            assert number not in called
