"""The backends without workers keep the laws of `backend.py`, whatever happens to them."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.backends.delayed import Delayed
from evenkeel.backends.fake import FakeBackend
from evenkeel.clock import VirtualClock
from evenkeel.delays.laws import Constant, MarkovBursts, attempt_key
from evenkeel.errors import BackendError, BackendLostError

ROW = np.ones((1, 2), np.float32)


def double(model, inputs):
    if model == "broken":
        raise BackendError("the model broke")
    return inputs * 2


class Bench:
    """A backend on a virtual clock, and what it replied, when."""

    def __init__(self, delay=None, start_s=0.0, **changes):
        self.clock = VirtualClock(start_s)
        self.fake = FakeBackend("fake", self.clock, double)
        self.backend = self.fake if delay is None else Delayed(self.fake, self.clock, delay, **changes)
        self.replies = {}
        self.changes = []
        self.backend.on_change = lambda: self.changes.append(self.backend.ready)

    def submit(self, model="double", key=0):
        number = len(self.replies)
        self.replies[number] = []
        inside = [True]

        def on_reply(reply):
            assert not inside, "replied from inside submit"
            self.replies[number].append((self.clock.time(), reply))

        ticket = self.backend.submit(model, ROW, on_reply, key)
        inside.clear()
        return ticket

    def told(self, number):
        ((at, reply),) = self.replies[number]
        kind = "done" if reply.outputs is not None else "cancelled" if reply.cancelled else type(reply.error).__name__
        return at, kind


BOTH = pytest.mark.parametrize("delay", [None, Constant(1.0)], ids=["fake", "delayed"])


@BOTH
def test_a_task_is_done(delay):
    bench = Bench(delay)
    bench.submit()
    bench.clock.run()
    ((_, reply),) = bench.replies[0]
    assert reply.outputs.tolist() == [[2.0, 2.0]]


@BOTH
def test_an_error_of_the_model_is_the_reply(delay):
    bench = Bench(delay)
    bench.submit("broken")
    bench.clock.run()
    ((_, reply),) = bench.replies[0]
    assert str(reply.error) == "the model broke"
    assert not reply.cancelled


@BOTH
def test_unknown_and_finished_tickets_may_be_cancelled(delay):
    bench = Bench(delay)
    ticket = bench.submit()
    bench.clock.run()
    bench.backend.cancel(ticket)
    bench.backend.cancel(12345)
    bench.clock.run()
    assert bench.told(0)[1] == "done"


@BOTH
def test_a_killed_worker_loses_what_it_has_and_says_so(delay):
    bench = Bench(delay)
    bench.submit()
    bench.submit()
    bench.fake.kill()
    assert not bench.backend.ready
    bench.submit()
    bench.clock.run()
    assert [bench.told(number)[1] for number in range(3)] == ["BackendLostError"] * 3
    bench.fake.restore()
    assert bench.changes == [False, True]
    bench.submit()
    bench.clock.run()
    assert bench.told(3)[1] == "done"


@BOTH
def test_a_frozen_worker_says_nothing_until_it_thaws(delay):
    bench = Bench(delay)
    bench.fake.freeze()
    bench.submit()
    bench.submit()
    bench.clock.run(100.0)
    assert bench.replies == {0: [], 1: []}
    assert bench.backend.ready
    bench.backend.suspect()
    assert bench.fake.suspected == 1
    bench.fake.thaw()
    bench.clock.run()
    assert [bench.told(number)[1] for number in range(2)] == ["done"] * 2


def test_a_frozen_worker_does_not_even_say_that_it_cancelled():
    bench = Bench()
    bench.fake.freeze()
    ticket = bench.submit()
    bench.backend.cancel(ticket)
    bench.clock.run(10.0)
    assert bench.replies == {0: []}
    bench.fake.thaw()
    bench.clock.run()
    assert bench.told(0) == (10.0, "cancelled")


@BOTH
def test_close_loses_what_is_open(delay):
    bench = Bench(delay)
    bench.submit()
    asyncio.run(bench.backend.close())
    bench.clock.run()
    assert bench.told(0)[1] == "BackendLostError"


def test_a_delayed_worker_does_one_task_at_a_time_in_order():
    bench = Bench(Constant(1.0))
    for _ in range(3):
        bench.submit()
    bench.clock.run()
    assert [bench.told(number) for number in range(3)] == [(1.0, "done"), (2.0, "done"), (3.0, "done")]


def test_a_task_that_waits_can_be_cancelled_and_takes_no_time():
    bench = Bench(Constant(1.0))
    tickets = [bench.submit() for _ in range(3)]
    bench.backend.cancel(tickets[1])
    bench.clock.run()
    assert [bench.told(number) for number in range(3)] == [(1.0, "done"), (0.0, "cancelled"), (2.0, "done")]


def test_a_task_that_has_begun_cannot_be_cancelled():
    bench = Bench(Constant(1.0))
    ticket = bench.submit()
    bench.clock.run(0.5)
    bench.backend.cancel(ticket)
    bench.clock.run()
    assert bench.told(0) == (1.0, "done")


def test_a_reply_that_is_only_held_back_is_lost_with_its_worker_at_once():
    bench = Bench(Constant(1.0))
    bench.submit()
    bench.clock.call_at(0.4, bench.fake.kill)
    bench.clock.run()
    assert bench.told(0) == (0.4, "BackendLostError")


def test_a_worker_that_is_back_before_its_lost_task_is_told_goes_on_with_the_next():
    bench = Bench(Constant(1.0))
    bench.submit()
    bench.submit()

    def restart():
        bench.fake.kill()
        bench.fake.restore()

    bench.clock.call_at(0.4, restart)
    bench.clock.run()
    assert bench.told(0) == (0.4, "BackendLostError")
    assert bench.told(1) == (1.4, "done")


def test_models_may_cost_more_or_less_than_the_law_says():
    bench = Bench(Constant(1.0), costs={"small": 0.5})
    bench.submit("small")
    bench.submit("double")
    bench.clock.run()
    assert [bench.told(number)[0] for number in range(2)] == [0.5, 1.5]


def test_the_law_is_asked_for_the_attempt_the_worker_and_the_time_since_the_experiment_began():
    asked = []

    class Recording(Constant):
        def draw(self, key, worker, now_s):
            asked.append((key, worker, now_s))
            return 1.0

    bench = Bench(Recording(1.0), start_s=1000.0, worker=3)
    bench.submit(key=7)
    bench.submit(key=attempt_key(7, 1))
    bench.clock.run()
    assert asked == [(7, 3, 0.0), (attempt_key(7, 1), 3, 1.0)]


SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "broken", "cancel", "kill", "restore", "freeze", "thaw"]),
        st.integers(0, 5),
        st.sampled_from([0.0, 0.3, 1.0]),
    ),
    max_size=30,
)


@given(SCRIPTS, st.sampled_from([None, Constant(1.0), MarkovBursts(seed=1)]))
def test_whatever_happens_every_task_gets_one_reply(script, delay):
    bench = Bench(delay)
    tickets = []

    def act(kind, which):
        if kind in ("submit", "broken"):
            tickets.append(bench.submit("double" if kind == "submit" else "broken", key=len(tickets)))
        elif kind == "cancel":
            if which < len(tickets):
                bench.backend.cancel(tickets[-1 - which])
        else:
            getattr(bench.fake, kind)()

    at = 0.0
    for kind, which, pause in script:
        at += pause
        bench.clock.call_at(at, act, kind, which)
    bench.clock.run()
    bench.fake.thaw()
    bench.clock.run()
    assert all(len(replies) == 1 for replies in bench.replies.values())
    assert all(
        isinstance(reply.error, BackendError) or reply.outputs is not None
        for replies in bench.replies.values()
        for _, reply in replies
    )
    assert issubclass(BackendLostError, BackendError)
