"""Scenarios of the gateway on a virtual clock. A task takes a second; fills and hedges are due after one and a half."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.backends.fake import FakeBackend
from evenkeel.coding.answers.berrut import Berrut
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.replicate import Replicate
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.coding.code import Code
from evenkeel.errors import BackendError, ConfigurationError, DeadlineError, OverloadedError, TooLargeError
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.gateway.health import HealthSettings
from evenkeel.serving.gateway.policy import Trigger, preset
from gateway_helpers import FORM, GRIDS, Scene, answer, picture


def warm(scene, count=30):
    """Let the gateway learn what is usual: a second."""
    for number in range(count):
        scene.later(scene.clock.time() + 1.1 * number, scene.send)
    scene.run(scene.clock.time() + 1.1 * count + 1)
    return scene


# ---- answers ----


def test_an_exact_answer_is_as_sure_as_the_classifiers_card_says():
    scene = Scene("none")
    scene.gateway._scores = ScoreForm(10, temperature=20.0)
    scene.send()
    scene.run()
    assert scene.outcomes[0].answer.confidence == pytest.approx(1 / (1 + 9 * np.exp(-10 / 20)))


def test_a_default_that_is_no_class_is_refused():
    with pytest.raises(ConfigurationError, match="the model has 10 classes, found 10"):
        Scene(preset("none", default_label=10))


def test_while_replicas_are_faster_than_the_floor_no_spare_is_asked():
    scene = Scene(preset("collage", fill_after=Trigger(fixed_s=1.5, floor_s=1.5)))
    scene.send(3)
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.passes == {}
    assert scene.sources == ["exact"] * 3


def test_an_item_that_outlasts_the_floor_is_covered_then():
    scene = Scene(preset("collage", fill_after=Trigger(fixed_s=1.5, floor_s=1.5)))
    scene.slow(0, 1)
    scene.send(3)
    scene.run()
    scene.assert_everything_answered()
    assert sorted(scene.sources) == ["collage", "collage", "exact"]
    assert sorted(scene.latencies) == [1.0, 2.5, 2.5]
    assert scene.stats.passes == {"collage2x2": 1}
    scene.assert_nothing_left()


def test_an_item_is_answered_by_the_least_loaded_replica():
    scene = Scene("none")
    scene.send(3)
    scene.run()
    scene.assert_everything_answered()
    assert scene.latencies == [1.0, 1.0, 1.0]
    assert scene.sources == ["exact"] * 3
    scene.assert_nothing_left()


def test_nothing_is_answered_from_inside_submit():
    scene = Scene("none")
    scene.send()
    assert scene.outcomes == {}
    scene.run()
    assert len(scene.outcomes) == 1


def test_a_late_item_is_answered_by_the_fill_as_soon_as_fills_may_answer():
    scene = Scene(preset("collage", fill_after=Trigger(fixed_s=1.5)))
    scene.slow(0, 1, 2)
    scene.send(3)
    scene.run()
    scene.assert_everything_answered()
    assert scene.sources == ["collage"] * 3
    assert scene.latencies == [1.5] * 3
    assert scene.stats.fills == {"collage2x2": 3}
    scene.assert_nothing_left()


def test_a_fill_that_comes_after_fill_after_is_used_when_it_comes():
    scene = Scene(preset("collage", fill_after=Trigger(fixed_s=0.5)))
    scene.slow(0, 1, 2)
    scene.send(2)
    scene.run()
    assert scene.latencies == [1.0, 1.0]
    assert scene.sources == ["collage"] * 2


def test_an_exact_answer_from_the_backup_need_not_wait_to_be_late():
    scene = Scene()
    scene.slow(0, 1, 2)
    scene.send()
    scene.run()
    assert scene.sources == ["exact"]
    assert scene.latencies == [1.0]
    assert scene.stats.fills == {"replicate": 1}
    assert scene.stats.hedges == 0


def test_exact_requests_never_get_fills_but_a_backups_exact_pass_when_they_are_late():
    scene = Scene(preset("collage", fill_after=Trigger(fixed_s=0.5)))
    scene.slow(0, 1, 2, seconds=9.0)
    scene.send(3, exact=True)
    scene.run()
    assert scene.sources == ["exact"] * 3
    assert scene.latencies == [1.5, 2.5, 3.5]  # one after the other: they share no pass
    assert scene.stats.passes == {"replicate": 3}
    scene.assert_nothing_left()


def test_exact_requests_take_turns_with_groups_that_wait():
    scene = Scene(preset("collage", fill_after=Trigger(fixed_s=0.5)))
    scene.slow(0, 1, 2, seconds=9.0)
    scene.send()  # the backup takes it at once
    scene.later(0.1, lambda: scene.send(1, exact=True))
    scene.later(0.2, scene.send, 2)
    scene.later(0.3, lambda: scene.send(1, exact=True))
    scene.run()
    assert scene.sources == ["exact", "exact", "collage", "collage", "exact"]
    assert scene.latencies == [1.0, 1.9, 2.8, 2.8, 3.7]


def test_exact_requests_go_round_backups_that_hold_no_classifier():
    scene = Scene(preset("collage", fill_after=Trigger(fixed_s=0.5)), codes=GRIDS[1:])
    scene.slow(0, 1, 2, seconds=9.0)
    scene.send(3, exact=True)
    scene.run()
    assert scene.sources == ["exact"] * 3
    assert scene.latencies == [9.0] * 3
    assert scene.stats.passes == {}


def test_late_exact_replies_are_compared_with_the_fills():
    scene = Scene(preset("collage", fill_after=Trigger(fixed_s=1.5)))
    scene.backup._answer = lambda model, inputs: answer(model, inputs + 1)  # wrong in every cell
    scene.slow(0, 1, 2)
    scene.send(3)
    scene.run()
    assert scene.sources == ["collage"] * 3
    assert (scene.stats.fills_compared, scene.stats.fills_agreed) == (3, 0)


def test_a_late_item_without_a_fill_is_hedged_on_another_replica_once():
    scene = Scene(backups=0)
    scene.slow(1)
    scene.send(2)
    scene.run()
    scene.assert_everything_answered()
    assert scene.sources == ["hedge", "exact"]
    assert (scene.stats.hedges, scene.stats.hedges_won) == (1, 1)
    assert scene.latencies == [2.5, 1.0]
    scene.assert_nothing_left()


def test_a_hedge_never_goes_to_a_replica_already_tried():
    scene = Scene(backups=0, replicas=1)
    scene.slow(0)
    scene.send()
    scene.run()
    assert scene.stats.hedges == 0
    assert scene.latencies == [10.0]


def test_hedges_stay_in_their_budget():
    scene = Scene(backups=0, max_extra_load=0.1)
    scene.slow(0, 1, 2, seconds=3.0)
    scene.send(20)
    scene.run()
    scene.assert_everything_answered()
    assert 1 <= scene.stats.hedges <= 1 + 0.1 * 20
    assert scene.stats.budget_exhausted > 10


def test_an_unsure_fill_is_not_used_and_the_item_is_hedged():
    scene = Scene(height=0.1)
    scene.slow(1)
    scene.send(2, min_confidence=0.9)
    scene.run()
    assert "collage" not in scene.sources
    assert scene.stats.unsure_fills == 1  # the other item was answered by then
    assert scene.stats.hedges == 1
    assert max(scene.latencies) == 2.5


@pytest.mark.parametrize(("least", "asked", "filled"), [(0.0, None, True), (0.9, None, False), (0.9, 0.1, False)])
def test_a_code_whose_card_asks_for_confidence_fills_no_unsure_item(least, asked, filled):
    """Below it rare classes are filled wrongly; a request may ask for more, and not for less."""
    code = Collage(2, 1, FORM, min_confidence=least, model="c2")
    scene = Scene(codes=(code,), height=0.1)
    scene.slow(1)
    scene.send(2, min_confidence=asked)
    scene.run()
    assert ("collage" in scene.sources) is filled
    assert scene.stats.hedges == (not filled)


def test_a_late_item_whose_fill_turns_out_unsure_is_hedged_at_once():
    late, later = Trigger(fixed_s=0.5), Trigger(fixed_s=5.0)
    scene = Scene(
        preset("collage+hedge", fill_after=late, hedge_after=later, max_extra_load=1.0, min_confidence=0.9), height=0.1
    )
    scene.slow(1)
    scene.send(2)
    scene.run()
    assert max(scene.latencies) == 2.0  # the fill was known to be unsure after one second, the hedge took another


def test_an_item_late_after_its_fill_turned_out_unsure_is_hedged_when_it_is_late():
    scene = Scene(
        preset(
            "collage+hedge",
            fill_after=Trigger(fixed_s=1.5),
            hedge_after=Trigger(fixed_s=5.0),
            max_extra_load=1.0,
            min_confidence=0.9,
        ),
        height=0.1,
    )
    scene.slow(1)
    scene.send(2)
    scene.run()
    assert max(scene.latencies) == 2.5


def test_replicating_everything_sends_each_item_to_two_replicas():
    scene = Scene("replicate-all", backups=0)
    scene.slow(1)
    scene.send(1)
    scene.run()
    assert scene.latencies == [1.0]
    assert scene.stats.copies == 1
    scene.assert_nothing_left()


# ---- deadlines ----


def test_at_the_deadline_comes_an_error_that_says_how_long_it_took():
    scene = Scene("none", deadline_s=4.0)
    scene.slow(0, 1, 2)
    scene.send()
    scene.run()
    (outcome,) = scene.outcomes.values()
    assert isinstance(outcome.error, DeadlineError)
    assert "4 s" in str(outcome.error)
    assert outcome.latency_s == 4.0
    scene.assert_nothing_left()


def test_a_request_may_shorten_the_deadline_but_not_lengthen_it():
    scene = Scene("none", deadline_s=4.0)
    scene.slow(0, 1, 2)
    scene.send(timeout_s=2.0)
    scene.send(timeout_s=60.0)
    scene.send(timeout_s=0.0)
    scene.run()
    assert scene.latencies == [2.0, 4.0, 0.0]


def test_at_the_deadline_the_default_is_the_answer_where_there_is_one():
    scene = Scene("none", deadline_s=4.0, default_label=7)
    scene.slow(0, 1, 2)
    scene.send()
    scene.run()
    default = scene.outcomes[0].answer
    assert (default.source, default.confidence, int(np.argmax(default.value))) == ("default", 0.0, 7)
    assert len(default.value) == 10


def test_the_deadline_caps_all_retries():
    scene = Scene("none", deadline_s=1.5, backups=0)
    for fake in scene.fakes:
        fake._answer = lambda model, inputs: np.full((1, 10), np.nan, np.float32)
    scene.slow(0, 1, 2, seconds=0.9)
    scene.send()
    scene.run()
    assert isinstance(scene.outcomes[0].error, DeadlineError)
    assert scene.latencies == [1.5]


def failing(model, inputs):
    raise BackendError("the model broke")


# ---- faults ----


def test_a_killed_replica_loses_nothing():
    scene = Scene("none", backups=0)
    scene.send(9)
    scene.later(0.5, scene.fakes[0].kill)
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.lost_attempts == 3
    assert scene.stats.retries == 3
    scene.assert_nothing_left()


def test_with_all_replicas_gone_nobody_is_taken_in_and_those_taken_wait_for_one_to_be_back():
    scene = Scene("none", backups=0)
    scene.send(3)
    for fake in scene.fakes:
        scene.later(0.5, fake.kill)
    scene.run(12.0)  # for ten seconds some are, since it may be the fault of one of the three
    assert not scene.gateway.ready
    with pytest.raises(OverloadedError, match="no replica is ready"):
        scene.gateway.submit(picture(0), lambda outcome: None)
    assert scene.stats.shed == 1
    scene.later(15.0, scene.fakes[1].restore)
    scene.run()
    scene.assert_everything_answered()
    assert sorted(scene.latencies) == [16.0, 17.0, 18.0]
    scene.assert_nothing_left()


def test_with_all_replicas_gone_a_fill_answers_as_soon_as_it_is_there():
    scene = Scene()
    scene.send(3)
    for fake in scene.fakes[:3]:
        scene.later(0.5, fake.kill)
    scene.run()
    scene.assert_everything_answered()
    assert scene.sources == ["collage"] * 3
    assert scene.latencies == [1.0] * 3  # although fills may answer late items only from 1.5 s on
    scene.assert_nothing_left()


def test_an_item_that_loses_its_only_attempt_takes_the_fill_that_is_there():
    scene = Scene()
    scene.slow(0, 1, 2, seconds=1.4)
    scene.send(2)
    for fake in scene.fakes[:3]:
        scene.later(1.2, fake.kill)
    scene.run()
    assert scene.sources == ["collage"] * 2
    assert scene.latencies == [1.2] * 2


def test_a_frozen_replicas_items_are_answered_by_others_within_the_stall_limit():
    scene = warm(Scene("none", backups=0, health=HealthSettings(min_stall_s=2.0, stall_factor=4.0)))
    began = scene.clock.time()
    scene.fakes[0].freeze()
    scene.send(9)
    scene.run(began + 20)
    scene.assert_everything_answered()
    assert max(scene.latencies[-9:]) <= 4.0 + 0.5 + 4.0  # the limit, the sweep, and what waits at the others
    assert scene.stats.ejections == {"stalled": 1}
    assert scene.fakes[0].suspected == 1


def test_a_thawed_replica_is_back_with_its_first_reply():
    scene = warm(Scene("none", backups=0))
    scene.fakes[0].freeze()
    scene.send(3)
    scene.run(scene.clock.time() + 15)
    assert scene.stats.ejections == {"stalled": 1}
    scene.fakes[0].thaw()
    scene.run()
    assert scene.stats.readmissions == 1
    assert not scene.gateway.replicas.any_ejected
    scene.assert_everything_answered()
    scene.assert_nothing_left()


def test_an_item_whose_two_replicas_freeze_one_after_the_other_goes_to_the_third():
    scene = warm(Scene("none", backups=0))
    scene.fakes[0].freeze()
    scene.fakes[1].freeze()
    scene.send(3)
    scene.run(scene.clock.time() + 25)
    scene.assert_everything_answered()


def test_items_at_a_frozen_replica_survive_the_death_of_the_only_other():
    scene = warm(Scene("none", backups=0, replicas=2))
    scene.fakes[0].freeze()
    began = scene.clock.time()
    scene.send(2)
    scene.later(began + 0.5, scene.fakes[1].kill)
    scene.later(began + 15, scene.fakes[1].restore)
    scene.run(began + 20)
    scene.assert_everything_answered()


def test_when_the_whole_fleet_falls_silent_nothing_is_copied():
    scene = warm(Scene("none", backups=0))
    for fake in scene.fakes:
        fake.freeze()
    began = scene.clock.time()
    scene.send(9)
    scene.later(began + 20, lambda: [fake.thaw() for fake in scene.fakes])
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.ejections == {"stalled": 3}
    assert scene.stats.retries == 0
    scene.assert_nothing_left()


def test_a_dead_backup_leaves_hedging():
    scene = Scene()
    scene.backup.kill()
    scene.slow(0)
    scene.send(3)
    scene.run()
    scene.assert_everything_answered()
    assert "collage" not in scene.sources
    assert scene.stats.hedges >= 1
    assert scene.stats.passes == {}
    scene.assert_nothing_left()


def test_a_backup_that_dies_with_a_group_leaves_hedging_and_works_again_when_it_is_back():
    scene = Scene()
    scene.slow(0)
    scene.send(3)
    scene.later(0.5, scene.backup.kill)
    scene.later(3.0, scene.backup.restore)
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.lost_passes == 1
    scene.slow(0, 1, 2)
    scene.send(3)
    scene.run()
    assert scene.sources[-3:] == ["collage"] * 3


def test_a_frozen_backup_is_suspected_once_and_holds_nobody_up():
    scene = warm(Scene())
    scene.backup.freeze()
    for number in range(30):
        scene.later(scene.clock.time() + number, scene.send)
    scene.run(scene.clock.time() + 40)
    scene.assert_everything_answered()
    assert scene.backup.suspected == 1
    assert len(scene.gateway._spares._waiting) == 0


def test_a_replica_that_gives_nonsense_is_not_believed():
    scene = Scene("none", backups=0)
    nonsense = iter(
        [
            np.full((1, 10), np.nan, np.float32),
            np.zeros((1, 9), np.float32),
            np.zeros(10, np.float32),
            np.zeros((2, 10), np.float32),
            np.full((1, 10), "cat"),
            np.full((1, 10), -1e300),  # FP32 cannot hold it
        ]
    )
    scene.fakes[0]._answer = lambda model, inputs: next(nonsense, answer(model, inputs))
    for start in range(6):
        scene.later(2.0 * start, scene.send, 3)
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.bad_replies == 6
    scene.assert_nothing_left()


def test_a_replica_that_only_fails_does_not_draw_all_the_work():
    scene = Scene("none", backups=0)
    scene.fakes[0]._answer = failing
    scene.slow(0, seconds=0.001)
    for number in range(40):
        scene.later(0.5 * number, scene.send)
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.ejections["failing"] >= 1
    assert scene.stats.lost_attempts < 12


def test_an_item_that_breaks_every_replica_ends_in_their_error():
    scene = Scene("none", backups=0)
    for fake in scene.fakes:
        fake._answer = failing
    scene.send()
    scene.run()
    # What a model says of its failure is for the log; users are told where to look.
    assert str(scene.outcomes[0].error) == "no replica could do this item; the server's log has the reasons"
    assert str(scene.outcomes[0].error.__cause__) == "the model broke"
    assert scene.stats.lost_attempts == 2
    assert scene.stats.failed == 1
    scene.assert_nothing_left()


# ---- cancelling, shedding, draining ----


def test_a_cancelled_item_frees_its_slot_and_is_never_answered():
    scene = Scene("none", backups=0)
    tickets = scene.send(6)
    for ticket in tickets[3:]:
        scene.gateway.cancel(ticket)
    scene.run()
    assert sorted(scene.outcomes) == [0, 1, 2]
    assert scene.clock.time() == 1.0  # those that had not begun never did
    assert scene.stats.abandoned == 3
    scene.assert_nothing_left()
    scene.gateway.cancel(tickets[0])
    scene.gateway.cancel(10**9)
    assert scene.stats.abandoned == 3


def test_the_loser_is_cancelled_when_the_other_answers():
    scene = Scene(backups=0)
    scene.slow(0)
    scene.send(4)  # the fourth waits behind one of the first three
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.cancels >= 1
    scene.assert_nothing_left()


def test_full_queues_shed_load_and_say_when_to_come_back():
    scene = warm(Scene("none", backups=0, max_outstanding=4))
    scene.send(12)
    with pytest.raises(OverloadedError, match="queues are full") as refused:
        scene.send()
    scene.sent -= 1
    assert refused.value.http_status == 503
    assert refused.value.retry_after_s == pytest.approx(4.0)
    scene.run()
    scene.assert_everything_answered()
    scene.send()
    scene.run()
    scene.assert_everything_answered()


def test_a_batch_over_what_the_fleet_may_hold_is_never_taken():
    scene = Scene("none", backups=0, max_outstanding=4)
    scene.gateway.check_room(12)
    with pytest.raises(TooLargeError, match=r"^a request may hold at most 12 items, found 13$") as refused:
        scene.gateway.check_room(13)
    assert refused.value.http_status == 413


def test_a_batch_that_has_no_room_now_is_told_when_to_come_back():
    scene = warm(Scene("none", backups=0, max_outstanding=4))
    shed = scene.stats.shed
    scene.send(9)
    scene.gateway.check_room(3)
    with pytest.raises(OverloadedError, match="no room for 4 items") as refused:
        scene.gateway.check_room(4)
    assert refused.value.retry_after_s == pytest.approx(3.0)
    assert scene.stats.shed == shed + 4
    for fake in scene.fakes:
        fake.kill()
    with pytest.raises(OverloadedError, match="no replica is ready"):
        scene.gateway.check_room(2)


@pytest.mark.parametrize("policy", ["none", "replicate-all"])
@given(max_outstanding=st.integers(1, 5), replicas=st.integers(1, 4), before=st.integers(0, 20), data=st.data())
def test_a_batch_that_has_room_is_taken_whole(policy, max_outstanding, replicas, before, data):
    scene = Scene(policy, replicas=replicas, backups=0, max_outstanding=max_outstanding)
    try:
        scene.send(before)
    except OverloadedError:
        scene.sent -= 1
    count = data.draw(st.integers(2, 25))
    try:
        scene.gateway.check_room(count)
    except (OverloadedError, TooLargeError):
        if policy == "none":
            with pytest.raises(OverloadedError):
                scene.send(count)
        return
    scene.send(count)
    scene.run()
    scene.assert_everything_answered()


def test_draining_ends_when_the_last_item_does():
    scene = Scene()
    drained = []
    scene.send(4)
    scene.gateway.start_draining(lambda: drained.append(scene.clock.time()))
    scene.gateway.start_draining()
    assert not scene.gateway.ready
    scene.run(0.5)
    assert drained == []
    scene.run()
    assert drained == [max(scene.latencies)]
    scene.gateway.start_draining(lambda: drained.append("again"))
    scene.run()
    assert drained[1:] == ["again"]


def test_a_user_may_submit_from_inside_an_answer():
    scene = Scene("none", backups=0, replicas=1)
    order = []

    def again(outcome):
        order.append(scene.clock.time())
        if len(order) < 3:
            scene.gateway.submit(picture(0), again)

    scene.gateway.submit(picture(0), again)
    scene.run()
    assert order == [1.0, 2.0, 3.0]


# ---- slow replicas ----


def test_a_replica_that_stays_slow_is_ejected_and_comes_back_when_it_is_well():
    scene = warm(Scene("none", backups=0, health=HealthSettings(window=4)))
    scene.slow(0, seconds=6.0)
    begin = scene.clock.time()
    for number in range(100):
        scene.later(begin + 1.5 * number, scene.send, 2)
    scene.later(begin + 100, scene.delay.slow.clear)
    scene.run(begin + 90)
    assert scene.stats.ejections == {"slow": 1}
    assert scene.gateway.replicas.any_ejected
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.readmissions == 1
    assert not scene.gateway.replicas.any_ejected
    assert scene.stats.probes <= 12  # pauses between probes double


# ---- codes ----


def test_a_code_that_is_not_systematic_answers_from_its_replies_and_survives_a_straggler():
    scene = Scene("none", replicas=4, backups=0, codes=(Berrut(3, ScoreForm(10), spares=1),))
    scene.slow(2)
    scene.send(3)
    scene.run()
    assert scene.sources == ["decoded"] * 3
    assert scene.latencies == [1.0] * 3
    assert scene.stats.cancels == 1
    scene.assert_nothing_left()


def test_coded_tasks_that_are_lost_are_sent_again():
    scene = Scene("none", replicas=4, backups=0, codes=(Berrut(3, ScoreForm(10), spares=1),))
    scene.send(3)
    scene.later(0.5, scene.fakes[0].kill)
    scene.later(0.5, scene.fakes[1].kill)
    scene.run()
    assert scene.sources == ["decoded"] * 3
    scene.assert_nothing_left()


def test_coded_tasks_wait_for_a_replica_when_all_are_gone():
    scene = Scene("none", replicas=2, backups=0, codes=(Berrut(2, ScoreForm(10), spares=1),))
    scene.send(2)
    for fake in scene.fakes:
        scene.later(0.5, fake.kill)
        scene.later(4.0, fake.restore)
    scene.run()
    assert scene.sources == ["decoded"] * 2
    assert max(scene.latencies) <= 6.0
    scene.assert_nothing_left()


def test_exact_requests_go_round_the_code():
    scene = Scene("none", replicas=4, backups=0, codes=(Berrut(3, ScoreForm(10), spares=1),))
    scene.send(3, exact=True)
    scene.run()
    scene.assert_everything_answered()
    assert scene.sources == ["exact"] * 3


def test_items_that_cannot_be_encoded_together_fail_at_once():
    scene = Scene("none", replicas=4, backups=0, codes=(Berrut(3, ScoreForm(10), spares=1),))
    outcomes = []
    scene.gateway.submit(np.zeros((1, 1, 3), np.uint8), outcomes.append)
    scene.gateway.submit(np.zeros((2, 2, 3), np.uint8), outcomes.append)
    scene.run()
    assert len(outcomes) == 2
    assert all("must be alike" in str(outcome.error) for outcome in outcomes)
    assert scene.stats.code_errors == 1


def test_a_slow_answer_of_a_coded_fleet_below_the_confidence_asked_for_is_asked_for_directly():
    scene = Scene("none", replicas=4, backups=0, codes=(Berrut(3, ScoreForm(10), spares=1),))
    scene.send(3, min_confidence=1.0)
    scene.run()
    scene.assert_everything_answered()
    assert scene.sources == ["exact"] * 3


def test_codes_that_are_not_systematic_stand_alone():
    codes: list[Code] = [Berrut(3, ScoreForm(10)), Replicate(ScoreForm(10))]
    with pytest.raises(ConfigurationError, match="cannot be combined"):
        Scene("none", codes=codes)


# ---- any script ----

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["send", "send", "send", "exact", "cancel", "kill", "restore", "freeze", "thaw", "slow", "fast"]
        ),
        st.integers(0, 4),
        st.sampled_from([0.0, 0.1, 0.7, 3.0]),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(
    EVENTS,
    st.sampled_from(["none", "hedge", "collage+hedge", "replicate-all", "berrut"]),
    st.sampled_from([0.0, 0.5]),
    st.booleans(),
)
def test_whatever_happens_every_item_ends_once_and_nothing_is_left(events, policy, group_wait_s, default):
    changes = {"group_wait_s": group_wait_s, "deadline_s": 20.0, "default_label": 3 if default else None}
    if policy == "berrut":
        scene = Scene("none", codes=(Berrut(3, ScoreForm(10), spares=1),), backups=1, **changes)
    else:
        scene = Scene(policy, health=HealthSettings(min_stall_s=0.5, pause_s=0.2), **changes)
    cancelled = set()
    tickets = {}

    def act(kind, which):
        if kind in ("send", "exact"):
            if scene.gateway.ready:
                number = scene.sent
                (tickets[number],) = scene.send(exact=kind == "exact")
        elif kind == "cancel":
            number = scene.sent - 1 - which
            if number in tickets and number not in scene.outcomes:
                cancelled.add(number)
                scene.gateway.cancel(tickets[number])
        elif kind == "slow":
            scene.slow(which, seconds=7.0)
        elif kind == "fast":
            scene.delay.slow.clear()
        else:
            getattr(scene.fakes[which % 4], kind)()

    at = 0.0
    for kind, which, pause in events:
        at += pause
        scene.later(at, act, kind, which)
    scene.run(at + 21.0)
    assert scene.gateway.in_flight == 0
    assert set(scene.outcomes) | cancelled == set(range(scene.sent))
    assert not set(scene.outcomes) & cancelled
    for fake in scene.fakes:  # backends keep tasks of frozen workers; they come back at the latest now
        fake.restore()
        fake.thaw()
    scene.run()
    scene.assert_nothing_left()
    stats = scene.stats
    assert stats.items == scene.sent == sum(stats.sources.values()) + stats.failed + stats.abandoned


# ---- a real loop ----


def test_the_same_gateway_runs_on_a_real_event_loop():
    async def scenario():
        loop = asyncio.get_running_loop()
        replicas = [FakeBackend(f"replica{number}", loop, answer) for number in range(3)]
        gateway = Gateway(loop, "classifier", replicas, policy=preset("none"), scores=ScoreForm(10))
        futures = [loop.create_future() for _ in range(20)]
        for number, future in enumerate(futures):
            gateway.submit(picture(number), future.set_result)
        outcomes = await asyncio.gather(*futures)
        drained = asyncio.Event()
        gateway.start_draining(drained.set)
        await drained.wait()
        return [int(np.argmax(outcome.answer.value)) for outcome in outcomes]

    assert asyncio.run(scenario()) == [number % 10 for number in range(20)]
