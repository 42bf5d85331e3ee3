"""One task at a time, first in first out, with delays: on the virtual clock, so to the exact second."""

import re

import numpy as np
import pytest

from backend_helpers import ScriptedDelay, doubling, raising
from evenkeel.backends.worker.model import Model
from evenkeel.backends.worker.task_runner import TaskRunner
from evenkeel.clock import VirtualClock

ROWS = np.ones((2, 3), np.float32)


class Owner:
    """Notes what each ticket got, and when."""

    def __init__(self, clock):
        self._clock = clock
        self.got = []

    def done(self, ticket, outputs, service_s):
        self.got.append((self._clock.time(), ticket, "done", round(service_s, 9)))

    def failed(self, ticket, message):
        self.got.append((self._clock.time(), ticket, "failed", message))

    def refused(self, ticket, message):
        self.got.append((self._clock.time(), ticket, "refused", message))

    def cancelled(self, ticket):
        self.got.append((self._clock.time(), ticket, "cancelled", None))


@pytest.fixture
def clock():
    return VirtualClock(100.0)


@pytest.fixture
def owner(clock):
    return Owner(clock)


def test_tasks_run_in_order_and_never_from_inside_submit(clock, owner):
    order = []
    model = Model("m", lambda rows: order.append(int(rows[0, 0])) or rows)
    runner = TaskRunner([model], clock)
    for ticket in range(1, 6):
        runner.submit(owner, ticket, 0, 0, np.full((1, 1), ticket))
    assert order == []
    clock.run()
    assert order == [1, 2, 3, 4, 5]
    assert [ticket for _, ticket, what, _ in owner.got if what == "done"] == order
    assert runner.empty


def batching(limit, seen, clock=None):
    """A model that doubles its rows and notes how many it was given; a pass takes a second."""

    def run(rows):
        seen.append(len(rows))
        if clock is not None:
            clock.run(clock.time() + 1.0)
        return rows * 2

    return Model("m", run, (3,), (3,), "float32", batch=limit)


def test_tasks_that_wait_share_a_pass_and_one_alone_waits_for_none(clock, owner):
    seen = []
    runner = TaskRunner([batching(4, seen, clock)], clock)
    runner.submit(owner, 1, 0, 0, ROWS[:1])
    clock.run(clock.time() + 0.5)
    for ticket in range(2, 9):
        runner.submit(owner, ticket, 0, 0, ROWS[:1] * ticket)
    clock.run()
    assert seen == [1, 4, 3]
    assert [ticket for _, ticket, what, _ in owner.got if what == "done"] == list(range(1, 9))
    assert {service_s for *_, service_s in owner.got} == {1.0}  # that of its pass, for each of them
    assert runner.empty


def test_each_task_of_a_shared_pass_gets_its_own_rows(clock):
    outputs = {}

    class Keeper(Owner):
        def done(self, ticket, rows, service_s):
            outputs[ticket] = rows

    runner = TaskRunner([batching(8, [])], clock)
    for ticket in (1, 2, 3):
        runner.submit(Keeper(clock), ticket, 0, 0, np.full((ticket, 3), ticket, np.float32))
    clock.run()
    assert {ticket: rows.tolist() for ticket, rows in outputs.items()} == {
        ticket: [[2.0 * ticket] * 3] * ticket for ticket in (1, 2, 3)
    }


def test_what_cannot_share_a_pass_keeps_its_turn(clock, owner):
    seen = []
    models = [batching(4, seen), Model("other", lambda rows: seen.append(-len(rows)) or rows)]
    runner = TaskRunner(models, clock)
    for ticket, (model, rows) in enumerate([(0, 2), (0, 3), (1, 1), (0, 1), (0, 4), (0, 9)], start=1):
        runner.submit(owner, ticket, 0, model, np.ones((rows, 3), np.float32))
    clock.run()
    assert seen == [2, 3, -1, 1, 4, 9]
    assert [ticket for _, ticket, _, _ in owner.got] == [1, 2, 3, 4, 5, 6]


def test_a_task_that_breaks_a_shared_pass_fails_alone(clock, owner):
    def run(rows):
        if (rows == 13).any():
            raise ValueError("thirteen")
        return rows

    runner = TaskRunner([Model("m", run, (3,), (3,), "float32", batch=8)], clock)
    for ticket in (1, 13, 2):
        runner.submit(owner, ticket, 0, 0, np.full((1, 3), ticket, np.float32))
    clock.run()
    assert [(ticket, what) for _, ticket, what, _ in owner.got] == [(1, "done"), (13, "failed"), (2, "done")]


def test_cancelled_tasks_are_in_no_pass_and_no_more_bytes_are_counted(clock, owner):
    seen = []
    runner = TaskRunner([batching(8, seen)], clock, max_queued_bytes=3 * ROWS[:1].nbytes)
    for ticket in (1, 2, 3):
        runner.submit(owner, ticket, 0, 0, ROWS[:1])
    runner.cancel(owner, 2)
    clock.run()
    assert seen == [2]
    for ticket in (4, 5, 6):  # there is room for all three again
        runner.submit(owner, ticket, 0, 0, ROWS[:1])
    clock.run()
    assert seen == [2, 3]


def test_an_injected_delay_is_drawn_for_each_task_alone(clock, owner):
    runner = TaskRunner([batching(8, [])], clock, delay=ScriptedDelay({1: 3.0, 2: 0.5}))
    for key in (1, 2):
        runner.submit(owner, key, key, 0, ROWS)
    clock.run()
    assert [(at_s, ticket) for at_s, ticket, *_ in owner.got] == [(103.0, 1), (103.5, 2)]


def test_a_delay_keeps_the_worker_busy_until_it_is_over(clock, owner):
    delay = ScriptedDelay({1: 3.0, 2: 0.5, 3: 1.0})
    runner = TaskRunner([doubling()], clock, delay=delay, worker=4)
    for key in (1, 2, 3):
        runner.submit(owner, key, key, 0, ROWS)
    clock.run()
    assert owner.got == [(103.0, 1, "done", 3.0), (103.5, 2, "done", 0.5), (104.5, 3, "done", 1.0)]
    assert delay.drawn == [(1, 4), (2, 4), (3, 4)]


def test_the_longer_of_own_time_and_delay_counts(clock, owner):
    slow = Model("slow", lambda rows: clock.run(clock.time() + 2.0) or rows)
    runner = TaskRunner([slow], clock, delay=ScriptedDelay({1: 0.5, 2: 3.0}))
    runner.submit(owner, 1, 1, 0, ROWS)
    runner.submit(owner, 2, 2, 0, ROWS)
    clock.run()
    assert owner.got == [(102.0, 1, "done", 2.0), (105.0, 2, "done", 3.0)]


@pytest.mark.parametrize(("delay_cost", "seconds"), [(None, [2.0, 1.0]), (0.25, [0.5, 0.5])])
def test_a_pass_is_delayed_by_its_model_s_cost_or_the_worker_s(clock, owner, delay_cost, seconds):
    models = [doubling("base"), doubling("collage", relative_cost=0.5)]
    runner = TaskRunner(models, clock, delay=ScriptedDelay({0: 2.0}), delay_cost=delay_cost)
    runner.submit(owner, 1, 0, 0, ROWS)
    runner.submit(owner, 2, 0, 1, ROWS)
    clock.run()
    assert [service_s for *_, service_s in owner.got] == seconds


def test_draws_are_told_the_time_since_the_experiment_began(clock, owner):
    class Clockwatcher(ScriptedDelay):
        def draw(self, key, worker, now_s):
            self.drawn.append(now_s)
            return 1.5

    delay = Clockwatcher()
    runner = TaskRunner([doubling()], clock, delay=delay, delay_epoch_s=90.0)
    runner.submit(owner, 1, 0, 0, ROWS)
    runner.submit(owner, 2, 0, 0, ROWS)
    clock.run()
    assert delay.drawn == [10.0, 11.5]


def test_a_waiting_task_can_be_cancelled_and_a_running_one_goes_on(clock, owner):
    runner = TaskRunner([doubling()], clock, delay=ScriptedDelay({0: 1.0}))
    for ticket in (1, 2, 3):
        runner.submit(owner, ticket, 0, 0, ROWS)
    clock.run(100.5)
    for ticket in (2, 1, 1, 99):
        runner.cancel(owner, ticket)
    clock.run()
    assert owner.got == [(100.5, 2, "cancelled", None), (101.0, 1, "done", 1.0), (102.0, 3, "done", 1.0)]


def test_an_owner_cannot_cancel_another_s_task(clock, owner):
    other = Owner(clock)
    runner = TaskRunner([doubling()], clock)
    runner.submit(owner, 1, 0, 0, ROWS)
    runner.cancel(other, 1)
    clock.run()
    assert [what for _, _, what, _ in owner.got] == ["done"]
    assert other.got == []


def test_what_waits_for_an_owner_that_went_away_is_dropped(clock, owner):
    other = Owner(clock)
    ran = []
    runner = TaskRunner([Model("m", lambda rows: ran.append(1) or rows)], clock)
    for ticket in (1, 2):
        runner.submit(owner, ticket, 0, 0, ROWS)
        runner.submit(other, ticket, 0, 0, ROWS)
    runner.forget(owner)
    clock.run()
    assert owner.got == []
    assert [ticket for _, ticket, *_ in other.got] == [1, 2]
    assert len(ran) == 2


def test_the_queue_is_bounded(clock, owner):
    runner = TaskRunner([doubling()], clock, max_queued=2, delay=ScriptedDelay({0: 1.0}))
    runner.submit(owner, 1, 0, 0, ROWS)
    clock.run(100.5)  # it runs; two more may wait
    for ticket in (2, 3, 4):
        runner.submit(owner, ticket, 0, 0, ROWS)
    assert owner.got == [(100.5, 4, "refused", "queue full: 2 tasks wait; send the task elsewhere")]
    runner.cancel(owner, 2)  # which makes room
    runner.submit(owner, 5, 0, 0, ROWS)
    clock.run()
    assert [ticket for _, ticket, what, _ in owner.got if what == "done"] == [1, 3, 5]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (raising(), "model 'raise' raised RuntimeError: no such layer"),
        (Model("m", lambda rows: rows[:1]), r"gave shape \(1, 3\) for 2 rows"),
        (Model("m", lambda rows: rows, output_shape=(4,)), r"gave rows of shape \(3,\) instead of \(4,\)"),
        (Model("m", lambda rows: None), "gave a NoneType instead of an array"),
        (Model("m", lambda rows: np.float32(1.0)), "gave shape"),
        (doubling(input_shape=(3, 3)), r"takes rows of shape \(3, 3\), got \(3,\)"),
        (doubling(dtype="uint8"), "takes uint8, got float32"),
    ],
)
def test_a_task_that_cannot_be_done_fails_and_the_worker_lives_on(clock, owner, model, says):
    runner = TaskRunner([model, doubling("well")], clock)
    runner.submit(owner, 1, 0, 0, ROWS)
    runner.submit(owner, 2, 0, 1, ROWS)
    runner.submit(owner, 3, 0, 2, ROWS)
    clock.run()
    got = {ticket: (what, detail) for _, ticket, what, detail in owner.got}
    assert got[1][0] == "failed"
    assert re.search(says, got[1][1])
    assert got[2][0] == "done"
    assert got[3] == ("failed", "no model number 2; the worker holds 2")


def test_a_failing_task_is_delayed_too(clock, owner):
    runner = TaskRunner([raising()], clock, delay=ScriptedDelay({0: 2.0}))
    runner.submit(owner, 1, 0, 0, ROWS)
    clock.run()
    assert owner.got[0][0] == 102.0


def test_stopping_finishes_what_waits_and_takes_nothing_new(clock, owner):
    emptied = []
    runner = TaskRunner([doubling()], clock, delay=ScriptedDelay({0: 1.0}))
    runner.submit(owner, 1, 0, 0, ROWS)
    runner.submit(owner, 2, 0, 0, ROWS)
    clock.run(100.5)
    runner.stop(lambda: emptied.append(clock.time()))
    runner.submit(owner, 3, 0, 0, ROWS)
    clock.run()
    assert [(ticket, what) for _, ticket, what, _ in owner.got] == [(3, "refused"), (1, "done"), (2, "done")]
    assert emptied == [102.0]


def test_stopping_an_idle_runner_is_over_at_once(clock):
    emptied = []
    TaskRunner([doubling()], clock).stop(lambda: emptied.append(1))
    assert emptied == [1]
