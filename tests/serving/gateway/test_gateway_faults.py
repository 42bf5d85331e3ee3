"""Faults that would spread: items that break workers, replicas that are full, replies that are lost."""

from itertools import pairwise

import numpy as np
import pytest

from evenkeel.backends.backend import Reply
from evenkeel.errors import (
    BackendBusyError,
    BackendError,
    BackendLostError,
    DeadlineError,
    OverloadedError,
    PoisonItemError,
    TaskRefusedError,
)
from evenkeel.serving.gateway.policy import Trigger
from gateway_helpers import GRIDS, Scene, answer, picture

POISON = 7


def poisoned(scene, how, restart_s=2.0, workers=None):
    """Have the pass of item 7 kill or freeze each worker that does it; workers are started again.

    One that hangs is killed three seconds after the gateway suspected it, as our own workers are; one that is slow goes
    on after ten seconds.
    """
    broken = []

    def end(fake):
        fake.kill()
        scene.later(scene.clock.time() + restart_s, fake.restore)

    for fake in scene.fakes if workers is None else workers:

        def run(model, inputs, fake=fake):
            if (inputs == POISON).any():
                broken.append(fake.name)
                getattr(fake, how)()
                scene.later(scene.clock.time() + restart_s, fake.restore if how == "kill" else fake.thaw)
                raise BackendLostError(f"{fake.name} broke")
            return answer(model, inputs)

        def submit(model, inputs, on_reply, key=0, fake=fake, submit=fake.submit):
            if (inputs == POISON).any():
                broken.append(fake.name)
                fake.freeze()
                if how == "slow":
                    scene.later(scene.clock.time() + 10.0, fake.thaw)
            return submit(model, inputs, on_reply, key)

        if how == "slow":
            fake.submit = submit
        elif how == "hang":
            fake.submit = submit
            fake.suspect = lambda fake=fake: scene.later(scene.clock.time() + 3.0, end, fake)
        else:
            fake._answer = run
    return broken


@pytest.mark.parametrize("policy", ["none", "hedge", "collage+hedge"])
@pytest.mark.parametrize("replicas", [1, 2, 3, 9])
def test_an_item_that_kills_its_worker_is_tried_once_more_and_then_ends_in_its_own_error(policy, replicas):
    scene = Scene(policy, replicas=replicas, backups=int("collage" in policy), deadline_s=60.0)
    broken, sheds = poisoned(scene, "kill"), []
    for number in range(40):
        scene.later(number * 1.0, offer, scene, sheds)
    scene.run()
    assert len(broken) <= 2
    assert len(sheds) <= 5 * (replicas == 1)  # while the only worker is started again
    outcomes = {number: outcome for number, outcome in scene.outcomes.items() if number != POISON}
    assert all(outcome.error is None for outcome in outcomes.values())
    assert len(outcomes) + 1 + scene.stats.shed == 40
    assert isinstance(scene.outcomes[POISON].error, PoisonItemError)
    scene.assert_nothing_left()


@pytest.mark.parametrize("how", ["hang", "slow"])
@pytest.mark.parametrize(
    ("policy", "replicas", "backups", "attempts"),
    [
        ("none", 1, 0, 2),
        ("none", 2, 0, 2),
        ("none", 9, 0, 2),
        ("hedge", 2, 0, 3),  # both at once, which may be the fleet's fault; then one of them again
        ("hedge", 3, 0, 2),
        ("collage", 1, 1, 3),  # the same
        ("collage", 2, 1, 2),
        ("collage", 9, 1, 2),
        ("collage", 9, 3, 3),
        ("collage+hedge", 1, 1, 3),
        ("collage+hedge", 2, 1, 2),
        ("collage+hedge", 3, 1, 2),
        ("collage+hedge", 9, 1, 3),  # a third of the replicas
    ],
)
def test_an_item_that_hangs_its_workers_costs_few_of_them_and_no_other_item(policy, replicas, backups, attempts, how):
    changes = {"hedge_after": Trigger(fixed_s=1.5), "max_extra_load": 1.0} if policy == "hedge" else {}
    changes |= {"fill_after": Trigger(fixed_s=1.5)} if policy == "collage" else {}
    scene = Scene(policy, replicas=replicas, backups=backups, deadline_s=120.0, **changes)
    broken = poisoned(scene, how)
    for number in range(60):
        scene.later(number * 1.5, scene.send)  # refused by an error, which would end the test
    scene.run()
    assert len(broken) <= attempts
    assert len(set(broken)) <= max(2, replicas // 3)
    poison = scene.outcomes.pop(POISON)
    assert isinstance(poison.error, PoisonItemError) if how == "hang" else poison.answer.source in ("exact", "hedge")
    assert len(scene.outcomes) == 59
    assert all(outcome.error is None for outcome in scene.outcomes.values())
    scene.assert_nothing_left()


def test_a_second_item_that_hangs_costs_a_large_fleet_no_third_worker():
    scene = Scene(replicas=9, backups=1, deadline_s=60.0)
    broken = poisoned(scene, "hang")
    for number in range(80):
        scene.later(number * 0.5, scene.send)
    scene.run(40.0)
    assert len(broken) == 3
    broken.clear()
    scene.gateway._poison._until_s = {b"another": 80.0}
    scene.later(50.0, lambda: scene.gateway.submit(picture(POISON), lambda outcome: None))
    scene.run()
    assert len(broken) == 2
    scene.assert_nothing_left()


def test_while_workers_come_back_that_an_item_may_have_broken_clients_wait_as_long_as_there_is_room():
    scene = Scene("none", replicas=1, backups=0, max_outstanding=4, deadline_s=60.0)
    poisoned(scene, "kill", restart_s=5.0)
    scene.sent = POISON
    scene.send()
    scene.run(2.0)
    assert not scene.gateway.ready
    scene.gateway.check_room(3)
    with pytest.raises(OverloadedError):
        scene.gateway.check_room(4)
    scene.send(3)
    with pytest.raises(OverloadedError):
        scene.send()
    scene.run()
    assert isinstance(scene.outcomes.pop(POISON).error, PoisonItemError)
    assert [outcome.error for outcome in scene.outcomes.values()] == [None] * 3


def test_an_item_that_kills_its_worker_takes_nobody_with_it_that_waited_there():
    scene = Scene("none", replicas=3, backups=0)
    poisoned(scene, "kill")
    scene.send(30)
    scene.run()
    assert [number for number, outcome in scene.outcomes.items() if outcome.error] == [POISON]
    assert len(scene.outcomes) == 30


def test_an_item_that_kills_backups_is_not_passed_on_in_a_smaller_group():
    scene = Scene(replicas=3, backups=2)
    broken = poisoned(scene, "kill", workers=scene.fakes[3:])
    scene.slow(0, 1, 2, seconds=5.0)
    scene.send(9)
    scene.run()
    scene.assert_everything_answered()
    assert len(broken) <= 1  # the replicas answer it, late


@pytest.mark.parametrize("how", ["kill", "hang"])
@pytest.mark.parametrize(("replicas", "backups"), [(2, 1), (3, 1), (5, 2)])
def test_a_poison_item_that_a_backup_had_too_costs_two_workers(replicas, backups, how):
    scene = Scene("collage", fill_after=Trigger(quantile=0.95), replicas=replicas, backups=backups, deadline_s=60.0)
    for number in range(40):
        scene.later(number * 1.0, scene.send)
    scene.run(60.0)
    broken = poisoned(scene, how, restart_s=1.0)
    scene.outcomes.clear()
    scene.sent = POISON
    scene.send()
    for number in range(5):
        scene.later(60.5 + number, scene.send)
    scene.run()
    assert len(broken) == 2
    assert isinstance(scene.outcomes.pop(POISON).error, PoisonItemError)
    assert len(scene.outcomes) == 5
    assert all(outcome.error is None for outcome in scene.outcomes.values())
    scene.assert_nothing_left()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("policy", "replicas", "backups"),
    [("none", 1, 0), ("hedge", 2, 0), ("replicate-all", 2, 0), ("replicate-all", 3, 0)]
    + [("collage+hedge", replicas, 1) for replicas in (1, 2, 3)],
)
def test_no_item_is_lost_when_all_workers_are_killed_at_once(policy, replicas, backups, exact):
    changes = {"hedge_after": Trigger(fixed_s=0.2), "max_extra_load": 1.0} if policy == "hedge" else {}
    scene = Scene(policy, replicas=replicas, backups=backups, deadline_s=60.0, **changes)
    scene.send(5, exact=exact)
    for fake in scene.fakes:
        scene.later(0.5, fake.kill)
        scene.later(3.0, fake.restore)
    scene.run()
    scene.assert_everything_answered()
    scene.assert_nothing_left()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("policy", ["none", "hedge", "collage+hedge", "replicate-all"])
@pytest.mark.parametrize("backups_too", [False, True])
def test_nothing_is_called_poison_because_the_fleet_is_frozen(policy, backups_too, exact):
    scene = Scene(policy, replicas=3, backups=1 if "collage" in policy else 0, deadline_s=20.0)
    for number in range(30):
        scene.later(number * 1.0, scene.send)
    scene.run(40.0)
    for fake in scene.fakes if backups_too else scene.fakes[:3]:
        fake.freeze()
    for number in range(4):
        scene.later(40.0 + number * 0.3, lambda: scene.send(exact=exact))
    scene.run(100.0)
    outcomes = [scene.outcomes[number] for number in range(30, 34)]
    if policy == "collage+hedge" and not backups_too:  # the backup holds the classifier
        assert [outcome.answer.source for outcome in outcomes] == ["exact"] * 4 or not exact
        # A hedged one is for a backup only when all replicas count as silent, after eight of their usual seconds.
        assert max(outcome.latency_s for outcome in outcomes) < (12.0 if exact else 7.0)
    else:
        assert all(isinstance(outcome.error, DeadlineError) for outcome in outcomes)
        assert all(outcome.latency_s == 20.0 for outcome in outcomes)
    for fake in scene.fakes:
        fake.thaw()
    scene.run()
    scene.assert_nothing_left()


def test_items_at_work_in_a_frozen_fleet_are_answered_when_it_is_started_again():
    scene = Scene("none", replicas=3, backups=0, deadline_s=60.0)
    for number in range(30):
        scene.later(number * 1.0, scene.send)
    scene.run(40.0)
    for fake in scene.fakes:
        fake.freeze()
        scene.later(52.0, fake.kill)  # as our own workers are, after three seconds of silence
        scene.later(53.0, fake.restore)
    scene.send(6)
    scene.run()
    scene.assert_everything_answered()
    scene.assert_nothing_left()
    assert scene.stats.readmissions == 3


def offer(scene, sheds):
    """Send an item, as a client that may be sent away."""
    try:
        scene.send()
    except OverloadedError as shed:
        sheds.append(shed)


def failing_with(error):
    def run(model, inputs):
        raise error

    return run


def test_a_replica_that_says_the_request_is_wrong_is_believed_and_keeps_its_work():
    scene = Scene("none", backups=0)
    asked = []
    for fake in scene.fakes:

        def run(model, inputs, fake=fake):
            asked.append(fake.name)
            raise TaskRefusedError("the server answered 400: no such shape")

        fake._answer = run
    for number in range(20):
        scene.later(number * 2.0, scene.send)
    scene.run()
    assert len(asked) == 20  # each once
    assert all(isinstance(outcome.error, TaskRefusedError) for outcome in scene.outcomes.values())
    assert not scene.stats.ejections
    assert not scene.gateway.replicas.any_ejected


def test_replicas_without_room_are_asked_no_more_than_the_budget_allows_and_clients_are_sent_away_politely():
    scene = Scene("hedge", backups=0, max_extra_load=0.1)
    asked = []
    for fake in scene.fakes:

        def run(model, inputs, fake=fake):
            asked.append(fake.name)
            raise BackendBusyError("the server answered 503", retry_after_s=0.5)

        fake._answer = run
    sheds = []
    for number in range(100):
        scene.later(number * 1.0, offer, scene, sheds)
    scene.run()
    assert all(shed.retry_after_s for shed in sheds)
    taken = 100 - len(sheds)
    assert taken > 20
    assert len(asked) <= taken * 1.1 + 10  # the budget's first allowance
    errors = [outcome.error for outcome in scene.outcomes.values()]
    assert all(isinstance(error, OverloadedError) and error.retry_after_s == 0.5 for error in errors)
    assert scene.gateway.ready  # a full replica is not a broken one


def test_a_replica_that_is_full_gets_nothing_before_it_said():
    scene = Scene("none", replicas=2, backups=0)
    busy = []

    def run(model, inputs):
        busy.append(scene.clock.time())
        raise BackendBusyError("full", retry_after_s=10.0)

    scene.fakes[0]._answer = run
    for number in range(30):
        scene.later(number * 0.9, scene.send)
    scene.run()
    assert all(outcome.error is None for outcome in scene.outcomes.values())
    assert len(busy) <= 4
    assert all(later - earlier >= 10.0 for earlier, later in pairwise(busy))


def test_a_model_whose_every_pass_fails_is_not_ready():
    scene = Scene("none", backups=0)
    for fake in scene.fakes:
        fake._answer = failing_with(BackendError("the model broke"))
    scene.gateway.watch(picture(0))
    for number in range(40):
        scene.later(number * 0.5, scene.send)
    scene.run(21.0)
    assert not scene.gateway.ready
    for fake in scene.fakes:
        fake._answer = answer
    scene.run(120.0)
    assert scene.gateway.ready  # found out by trial passes, without traffic


@pytest.mark.parametrize("backup_too", [False, True])
def test_a_reply_that_is_lost_costs_its_item_a_time_limit_and_its_worker_nothing(backup_too):
    scene = Scene(replicas=3, backups=1, deadline_s=300.0)
    lose = [scene.fakes[0]] + ([scene.backup] if backup_too else [])
    for fake in lose:
        submit = fake.submit

        def losing(model, inputs, on_reply, key=0, submit=submit, fake=fake):
            fake.submit = submit
            return submit(model, inputs, lambda reply: None, key)

        fake.submit = losing
    for number in range(120):
        scene.later(number * 1.0, scene.send)
    scene.run()
    scene.assert_everything_answered()
    assert max(scene.latencies) < 40
    late = [number for number, latency in enumerate(scene.latencies) if number > 60 and latency > 3]
    assert not late
    scene.assert_nothing_left()


def test_a_cancellation_that_nobody_asked_for_is_a_failed_attempt():
    scene = Scene("none", backups=0)
    asked = []

    def submit(model, inputs, on_reply, key=0):
        asked.append(key)
        scene.clock.call_soon(on_reply, Reply(error=BackendError("cancelled"), cancelled=True))
        return 0

    scene.nodes[0].submit = submit
    for number in range(9):
        scene.later(number * 2.0, scene.send)
    scene.run()
    assert asked
    scene.assert_everything_answered()
    assert max(scene.latencies) < 3


def test_with_all_replicas_gone_an_idle_backup_that_holds_the_classifier_answers_exactly():
    scene = Scene(replicas=2, backups=1)
    for fake in scene.fakes[:2]:
        fake.kill()
    scene.send(4)
    scene.run()
    scene.assert_everything_answered()
    assert scene.sources == ["exact"] * 4
    assert max(scene.latencies) <= 4.0
    scene.assert_nothing_left()


def test_losses_and_ejections_are_logged_with_worker_and_reason(caplog):
    scene = Scene("none", backups=0)
    scene.fakes[1]._answer = failing_with(BackendError("CUDA error: no kernel image"))
    for number in range(60):
        scene.later(number * 0.4, scene.send)
    scene.run(30.0)
    assert "node1 could not do an item: CUDA error" in caplog.text
    assert "node1 gets no work: it is failing: CUDA error" in caplog.text
    assert np.isfinite(scene.latencies).all()


def test_a_replica_that_is_lost_at_every_probe_and_back_at_once_is_probed_after_pauses():
    scene = Scene("none", backups=0)
    probed = []

    def run(model, inputs):
        probed.append(scene.clock.time())
        scene.fakes[0].kill()
        scene.later(scene.clock.time() + 0.05, scene.fakes[0].restore)
        raise BackendLostError("lost")

    scene.fakes[0].kill()
    scene.fakes[0]._answer = run
    scene.gateway.watch(picture(0))
    scene.later(1.0, scene.fakes[0].restore)
    scene.run(60.0)
    assert 4 <= len(probed) <= 8
    pauses = [later - earlier for earlier, later in pairwise(probed)]
    assert pauses == sorted(pauses)


def test_a_backup_goes_on_although_an_item_could_not_be_prepared(monkeypatch):
    scene = Scene(replicas=3, backups=1)
    for code in GRIDS:
        monkeypatch.setattr(code, "is_prepared", lambda item: False)
    broken = iter([True, True, True])

    def prepare(item):
        if next(broken, False):
            raise MemoryError("no room for a tile")
        return item

    for code in GRIDS:
        monkeypatch.setattr(code, "prepare", prepare)
    for number in range(6):
        scene.later(number * 3.0, scene.send)
    scene.run()
    scene.assert_everything_answered()
    assert sum(scene.stats.passes.values()) >= 3


def test_a_client_that_sends_a_poison_item_again_breaks_no_more_workers_for_a_minute():
    scene = Scene(replicas=3, backups=1, deadline_s=20.0)
    broken = poisoned(scene, "kill")

    def send_poison():
        scene.sent = POISON
        scene.outcomes.pop(POISON, None)
        scene.send()

    for second in (0.0, 10.0, 11.0, 30.0):
        scene.later(second, send_poison)
    scene.run(50.0)
    at_first = len(broken)
    assert 1 <= at_first <= 3
    assert isinstance(scene.outcomes[POISON].error, PoisonItemError)
    scene.later(200.0, send_poison)  # by then whatever was wrong may have been mended
    scene.run()
    assert len(broken) > at_first
    scene.assert_nothing_left()


@pytest.mark.parametrize("batch", [1, 3])
def test_whatever_may_be_in_the_pass_of_a_silent_worker_is_suspect(batch):
    """Those behind it only waited."""
    scene = Scene("none", replicas=2, backups=0, deadline_s=60.0)
    for number in range(20):
        scene.later(number * 1.0, scene.send)
    scene.run(30.0)
    scene.fakes[0].freeze()
    blamed = []
    blame = scene.gateway._blame
    scene.gateway._blame = lambda item, *rest: (blamed.append(item.number), blame(item, *rest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(scene.nodes[0]), "batch", batch)
        scene.send(10)
        had = [attempt.item.number for attempt in scene.gateway.replicas.all[0].open]
        scene.later(45.0, scene.fakes[0].kill)
        scene.later(46.0, scene.fakes[0].restore)
        scene.run()
    assert len(had) == 5
    assert blamed[:batch] == had[:batch]
    assert len(blamed) == batch
    scene.assert_everything_answered()


def test_a_frozen_worker_is_found_by_its_first_passes_where_there_were_too_few_for_a_quantile():
    scene = Scene("none", replicas=2, backups=0, deadline_s=60.0)
    assert scene.gateway.replicas.stall_after_s == 10.0
    scene.slow(0, 1, seconds=0.01)
    scene.send(2)
    scene.run()
    assert scene.gateway.replicas.stall_after_s == 1.0
    scene.slow(0, 1, seconds=0.1)
    scene.send(2)
    scene.run()
    assert scene.gateway.replicas.stall_after_s == pytest.approx(5.0)
