"""Who gets the next item, and who is out."""

import numpy as np
from hypothesis import given, strategies as st

from evenkeel.backends.backend import Reply
from evenkeel.backends.fake import FakeBackend
from evenkeel.clock import VirtualClock
from evenkeel.errors import BackendError
from evenkeel.serving.gateway.health import HealthSettings
from evenkeel.serving.gateway.quantile import LiveQuantiles
from evenkeel.serving.gateway.replicas import Replicas
from evenkeel.serving.gateway.stats import Stats
from gateway_helpers import answer

DONE = Reply(outputs=np.zeros((1, 10), np.float32))
FAILED = Reply(error=BackendError("broke"))
CANCELLED = Reply(error=BackendError("cancelled"), cancelled=True)


def fleet(count=4, known=True, **settings):
    clock = VirtualClock()
    replicas = Replicas(
        [FakeBackend(f"r{number}", clock, answer) for number in range(count)],
        HealthSettings(**settings),
        LiveQuantiles(),
        Stats(),
    )
    if known:
        for _ in range(20):
            replicas._service_times.add(1.0)
    return replicas


def send(replica, sent_s=0.0):
    """Sends a task, to which `give_back` replies."""
    return replica.submit("classifier", np.zeros((1, 1, 1, 3), np.uint8), 0, sent_s, lambda attempt, reply: None)


def give_back(attempt, back_s, reply=DONE):
    attempt.reply(reply)
    attempt.node.back(back_s, attempt.since_s, reply)


def work(replica, sent_s, back_s, reply=DONE):
    give_back(send(replica, sent_s), back_s, reply)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.sets(st.integers(0, 7)))
def test_the_choice_is_a_least_loaded_one_that_was_not_tried(loads, tried):
    replicas = fleet(len(loads))
    for replica, load in zip(replicas.all, loads, strict=True):
        for _ in range(load):
            send(replica)
    avoid = [replica for number, replica in enumerate(replicas.all) if number in tried]
    chosen = replicas.choose(avoid)
    left = [replica.outstanding for replica in replicas.all if replica not in avoid]
    if chosen is None:
        assert not left
    else:
        assert chosen not in avoid
        assert chosen.outstanding == min(left)


def test_an_idle_fleet_shares_the_work_evenly():
    replicas = fleet(3)
    chosen = [replicas.choose() for _ in range(9)]
    assert all(chosen.count(replica) == 3 for replica in replicas.all)


def test_replicas_that_are_gone_or_out_are_not_chosen_as_long_as_there_are_others():
    replicas = fleet(3)
    replicas.all[0].backend.kill()
    replicas.all[1].health.eject("slow", 0.0)
    replicas.refresh()
    assert {replicas.choose() for _ in range(6)} == {replicas.all[2]}
    replicas.all[2].health.eject("stalled", 0.0)
    replicas.refresh()
    assert {replicas.choose() for _ in range(6)} == {replicas.all[1]}  # slow is better than silent
    replicas.all[1].backend.kill()
    replicas.refresh()
    assert {replicas.choose() for _ in range(6)} == {replicas.all[2]}  # silent is better than nobody
    replicas.all[2].backend.kill()
    replicas.refresh()
    assert replicas.choose() is None


def test_time_in_a_serial_workers_queue_is_not_service_time():
    replicas = fleet(1, known=False)
    (replica,) = replicas.all
    for number, attempt in enumerate([send(replica) for _ in range(20)]):
        give_back(attempt, number + 1.0)
    assert replicas._service_times.quantile(0.99) == 1.0
    assert replica.outstanding == 0


def test_time_in_the_queue_of_a_worker_that_does_several_at_once_cannot_be_told_apart():
    replicas = fleet(1, known=False)
    (replica,) = replicas.all
    replica.backend.serial = False
    for number, attempt in enumerate([send(replica) for _ in range(20)]):
        give_back(attempt, number + 1.0)
    assert replicas._service_times.quantile(0.99) == 20.0


def test_a_task_given_up_before_it_began_tells_nothing():
    replicas = fleet(1)
    (replica,) = replicas.all
    work(replica, 0.0, 50.0, CANCELLED)
    assert len(replicas._service_times._samples) == 20
    assert replica.outstanding == 0


def test_late_tasks_that_were_stopped_keep_the_quantile_up():
    replicas = fleet(2)
    stopped = Reply(error=BackendError("cancelled"), cancelled=True, service_s=1.0)
    for number in range(1000):  # one in ten takes long, and is stopped once it outlasts the quantile
        late_s = replicas._service_times.quantile(0.95)
        if number % 10:
            work(replicas.all[0], 0.0, 0.5)
        else:
            work(replicas.all[0], 0.0, late_s, Reply(error=stopped.error, cancelled=True, service_s=late_s))
    assert replicas._service_times.quantile(0.95) == 1.0


def test_a_slow_replica_is_ejected_but_never_most_of_the_fleet():
    replicas = fleet(3)
    for replica in replicas.all:
        for number in range(10):
            work(replica, 10.0 * number, 10.0 * number + 5.0)
    assert sum(replica.health.ejected for replica in replicas.all) == 1
    assert replicas._stats.ejections == {"slow": 1}


def test_a_failing_replica_is_ejected():
    replicas = fleet(4, max_failures=3)
    for _ in range(3):
        work(replicas.all[1], 0.0, 0.1, FAILED)
    assert replicas.all[1].health.ejected_for == "failing"


def test_a_replica_that_died_is_not_called_failing():
    replicas = fleet(4, max_failures=1)
    replicas.all[1].backend.kill()
    work(replicas.all[1], 0.0, 0.1, FAILED)
    assert not replicas.all[1].health.ejected


def test_silence_with_work_is_a_stall_and_silence_without_is_not():
    replicas = fleet(2, min_stall_s=1.0, stall_factor=3.0)
    send(replicas.all[0])
    assert replicas.eject_stalled(3.0) == []
    assert replicas.eject_stalled(3.01) == [replicas.all[0]]
    assert replicas.any_stalled
    assert replicas.eject_stalled(100.0) == []


def test_a_slow_replica_can_still_be_found_stalled():
    replicas = fleet(2, min_stall_s=1.0, stall_factor=3.0)
    replicas.all[0].health.eject("slow", 0.0)
    send(replicas.all[0])
    assert replicas.eject_stalled(4.0) == [replicas.all[0]]


def test_a_stalled_replica_is_back_with_its_next_reply_which_does_not_count_as_usual():
    replicas = fleet(2, min_stall_s=1.0, stall_factor=3.0)
    replica = replicas.all[0]
    given_up, done = send(replica), send(replica)
    given_up.cancel()
    replicas.eject_stalled(10.0)
    give_back(given_up, 11.0, CANCELLED)
    assert replica.health.ejected
    give_back(done, 12.0)
    assert not replica.health.ejected
    assert not replicas.any_stalled
    assert replicas._stats.readmissions == 1
    assert len(replicas._service_times._samples) == 20


def test_while_nothing_is_known_nobody_is_called_stalled_soon():
    replicas = fleet(2, known=False)
    send(replicas.all[0])
    assert replicas.eject_stalled(9.9) == []
    assert replicas.eject_stalled(10.1) == [replicas.all[0]]


def test_probes_go_to_ejected_replicas_that_are_there():
    replicas = fleet(3, pause_s=1.0, probes=1)
    for replica in replicas.all[:2]:
        replica.health.eject("slow", 0.0)
    replicas.all[1].backend.kill()
    replicas.refresh()
    assert replicas.wanting_probe(0.5) == []
    assert replicas.wanting_probe(1.0) == [replicas.all[0]]
    replicas.all[0].health.probe_sent()
    probe = send(replicas.all[0], 1.0)
    assert replicas.all[0].outstanding == 1
    probe.reply(DONE)
    replicas.all[0].probe_back(2.0, 1.0, DONE)
    assert replicas.all[0].outstanding == 0
    assert not replicas.all[0].health.ejected
    assert replicas._stats.readmissions == 1
