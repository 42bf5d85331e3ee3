"""Which items share a group, and when: the backup on a virtual clock. A task takes a second."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.clock import VirtualClock
from evenkeel.coding.answers.collage import Collage
from evenkeel.coding.answers.parity import Parity, SumEncoder
from evenkeel.coding.answers.replicate import Replicate
from evenkeel.coding.answers.tiles import Pixels
from evenkeel.errors import CodeError, ConfigurationError
from evenkeel.serving.gateway.groups import Group, Waiting
from evenkeel.serving.gateway.item import Item
from evenkeel.serving.gateway.policy import Trigger, preset
from evenkeel.serving.gateway.stats import Stats
from gateway_helpers import CLASSES, FORM, Scene, answer, picture, true_scores

LATE = Trigger(fixed_s=1.5)


def collage(**changes):
    return preset("collage", fill_after=LATE, **changes)


@pytest.mark.parametrize(("count", "code"), [(1, "replicate"), (2, "collage2x2"), (4, "collage2x2"), (5, "collage3x3")])
def test_an_idle_backup_takes_at_once_what_came_together_in_the_smallest_grid_that_holds_it(count, code):
    scene = Scene(collage(), replicas=9)
    scene.send(count)
    scene.run(0.0)
    assert scene.stats.passes == {code: 1}
    assert scene.stats.grouped == {code: count}


def test_items_gather_only_while_all_backups_are_busy():
    scene = Scene(collage(), replicas=9)
    scene.send(1)
    for at in (0.2, 0.4, 0.6):
        scene.later(at, scene.send)
    scene.run(0.9)
    assert scene.stats.grouped == {"replicate": 1}
    scene.run(1.0)
    assert scene.stats.grouped == {"replicate": 1, "collage2x2": 3}


def test_several_backups_share_the_groups():
    scene = Scene(collage(), replicas=20, backups=2)
    scene.send(12)
    scene.run(0.0)
    assert scene.stats.grouped == {"collage3x3": 9, "collage2x2": 3}


def test_what_one_group_cannot_hold_comes_with_the_next():
    scene = Scene(collage(), replicas=20)
    scene.slow(*range(20))
    scene.send(11)
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.grouped == {"collage3x3": 9, "collage2x2": 2}
    assert sorted(scene.latencies) == [1.5] * 9 + [2.0] * 2


def test_items_that_have_their_answer_take_no_place_in_a_group():
    scene = Scene(collage(), replicas=9)
    scene.slow(9, seconds=3.0)
    scene.send(1)
    scene.later(0.5, scene.send, 4)  # answered at 1.5, before the backup is idle again
    scene.later(2.5, scene.send, 1)
    scene.run(3.0)
    assert scene.stats.grouped == {"replicate": 2}


def test_cancelled_items_and_those_of_a_stuck_backup_are_not_kept():
    scene = Scene(collage(), replicas=3)
    scene.backup.kill()
    tickets = scene.send(3)
    assert len(scene.gateway._spares._waiting) == 3
    scene.gateway.cancel(tickets[0])
    assert len(scene.gateway._spares._waiting) == 2
    scene.run()
    assert len(scene.gateway._spares._waiting) == 0


def test_a_backup_that_becomes_ready_takes_what_waits():
    scene = Scene(collage(), replicas=3)
    scene.backup.kill()
    scene.slow(0, 1, 2)
    scene.send(3)
    scene.later(0.5, scene.backup.restore)
    scene.run()
    assert scene.sources == ["collage"] * 3
    assert scene.latencies == [1.5] * 3


def test_with_group_wait_the_backup_waits_for_more_items():
    scene = Scene(collage(group_wait_s=0.5), replicas=9)
    scene.send(1)
    scene.later(0.4, scene.send, 2)
    scene.run(0.45)
    assert scene.stats.passes == {}
    scene.run(0.5)
    assert scene.stats.grouped == {"collage2x2": 3}


def test_a_full_group_never_waits():
    scene = Scene(collage(group_wait_s=0.5), replicas=9)
    scene.send(1)
    scene.later(0.1, scene.send, 8)
    scene.run(0.1)
    assert scene.stats.grouped == {"collage3x3": 9}


def test_items_older_than_group_wait_do_not_wait_again_when_the_backup_becomes_idle():
    scene = Scene(collage(group_wait_s=0.5), replicas=9)
    scene.slow(*range(9))
    scene.send(1)
    scene.later(0.6, scene.send, 2)
    scene.run(1.5)  # the backup began at .5 and is idle again
    assert scene.stats.grouped == {"replicate": 1, "collage2x2": 2}


def steady(gap_s, count=40, policy=None, seconds=0.4, slow=False, start_s=0.0):
    """Sends an item every `gap_s` from `start_s` on.

    A pass of the backup takes `seconds`, one of a replica 1 s, or much longer.
    """
    scene = Scene(collage() if policy is None else policy, replicas=9)
    scene.slow(9, seconds=seconds)
    if slow:
        scene.later(8.0, scene.slow, *range(9))
    for number in range(count):
        scene.later(start_s + gap_s * number, scene.send)
    scene.run()
    scene.assert_everything_answered()
    return scene


def test_an_item_goes_at_once_where_no_other_is_expected_in_time():
    scene = steady(gap_s=1.0)
    assert scene.stats.passes == {"replicate": 40}


def test_where_others_are_expected_a_group_leaves_just_in_time_for_its_oldest():
    scene = steady(gap_s=0.25, count=80)
    at_once = steady(gap_s=0.25, count=80, policy=collage(group_wait_s=0.0))
    # The first items tell how often they come and how long a pass takes.
    assert sum(scene.stats.passes.values()) <= 0.85 * sum(at_once.stats.passes.values())
    assert scene.stats.passes["collage2x2"] >= 2 * scene.stats.passes["replicate"]
    assert max(scene.latencies) <= 1.0


def test_what_came_long_ago_does_not_hide_how_often_items_come_now():
    """A server's clock may begin with the machine's start, and there may be no traffic for an hour."""
    at_once = steady(gap_s=0.25, count=160, policy=collage(group_wait_s=0.0))
    scene = steady(gap_s=0.25, count=160, start_s=1e6)
    first = sum(scene.stats.passes.values())
    assert first <= 0.85 * sum(at_once.stats.passes.values())
    now_s = scene.clock.time()
    for number in range(160):
        scene.later(now_s + 3600.0 + 0.25 * number, scene.send)
    scene.run()
    assert sum(scene.stats.passes.values()) - first <= 0.85 * sum(at_once.stats.passes.values())


def test_a_group_that_waited_for_others_is_answered_as_soon_as_it_is_late():
    scene = steady(gap_s=0.25, count=60, slow=True)
    assert scene.stats.passes["collage2x2"] >= 9
    assert max(scene.latencies[40:]) == pytest.approx(LATE.fixed_s, abs=1e-3)


def test_where_many_answers_are_approximate_backups_make_exact_passes_at_once():
    scene = steady(gap_s=0.25, count=400, slow=True)
    few = scene.stats.passes["replicate"]
    assert few >= 40  # nearly all of them after one answer in eleven was approximate


def test_a_late_item_goes_before_those_that_wait():
    clock = VirtualClock()
    waiting = Waiting(clock, 9, lambda: None, 0.5)
    items = [Item(number, picture(0), lambda outcome: None, number, 0.0) for number in range(3)]
    items[2].late = True
    for item in items:
        waiting.add(item)
    assert waiting.take(2) == [items[2], items[0]]


def test_items_that_must_be_shrunk_first_are_prepared_by_offload_and_answered_from_their_tiles():
    jobs = []
    codes = (Collage(2, 1, FORM, model="c2"),)
    scene = Scene(collage(), codes=codes, offload=lambda work, then: jobs.append((work, then)))
    scene.slow(0, 1, 2)
    outcomes = []
    scene.gateway.submit(np.full((4, 4, 3), 7, dtype=np.uint8), outcomes.append)
    scene.run(0.1)
    assert scene.stats.passes == {}
    ((work, then),) = jobs
    then(work())
    scene.run()
    (outcome,) = outcomes
    assert outcome.answer.source == "collage"
    assert int(np.argmax(outcome.answer.value)) == 7


def test_an_item_that_is_done_before_it_is_prepared_needs_no_spare():
    jobs = []
    scene = Scene(
        collage(), codes=(Collage(2, 1, FORM, model="c2"),), offload=lambda work, then: jobs.append((work, then))
    )
    scene.gateway.submit(np.full((4, 4, 3), 7, dtype=np.uint8), lambda outcome: None)
    scene.run()
    ((work, then),) = jobs
    then(work())
    scene.run()
    assert scene.stats.passes == {}
    assert len(scene.gateway._spares._waiting) == 0


def test_an_item_that_no_code_can_take_goes_without_a_spare():
    scene = Scene(collage(), codes=(Collage(2, 1, FORM, model="c2"),))
    outcomes = []
    scene.gateway.submit(np.full((1, 1, 6), 4, dtype=np.uint8), outcomes.append)
    scene.run()
    assert scene.stats.code_errors == 1
    assert len(outcomes) == 1  # whatever the replicas say of such an item


def test_a_backup_whose_reply_is_of_a_wrong_shape_is_not_believed_and_goes_on():
    scene = Scene(collage(), replicas=3)
    scene.backup._answer = lambda model, inputs: true_scores([1, 2, 3])
    scene.send(2)
    scene.later(3.0, scene.send, 2)
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.bad_replies == 2
    assert scene.stats.fills == {}


def test_two_codes_for_as_many_items_are_refused():
    with pytest.raises(ConfigurationError, match="both hold 4"):
        Scene(collage(), codes=(Collage(2, 1, FORM), Collage(2, 1, FORM, model="other")))


# ---- parity: a spare that needs the primaries' replies ----


def parity_scene(**changes):
    scene = Scene(collage(**changes), codes=(Parity(SumEncoder(2, Pixels(datatype="FP32")), FORM, model="parity"),))

    def sums(model, inputs):
        if model == "classifier":
            return answer(model, inputs)
        assert inputs.ravel().tolist() == [1.0] * 3  # the sum of pictures 0 and 1
        return true_scores([0]) + true_scores([1])

    for fake in scene.fakes:
        fake._answer = sums
    return scene


def test_parity_answers_the_late_item_once_the_other_is_in():
    scene = parity_scene()
    scene.slow(1)
    scene.send(2)
    scene.run()
    scene.assert_everything_answered()
    assert sorted(scene.sources) == ["decoded", "exact"]
    assert max(scene.latencies) == 1.5


def test_parity_decodes_with_a_primary_that_comes_after_the_spare():
    scene = parity_scene()
    scene.slow(1)
    scene.slow(2, seconds=1.8)
    scene.send(2)
    scene.run()
    assert sorted(scene.sources) == ["decoded", "exact"]
    assert max(scene.latencies) == 1.8


def test_parity_without_any_primary_answers_nothing():
    scene = parity_scene()
    scene.slow(0, 1, 2, seconds=5.0)
    scene.send(2)
    scene.run()
    assert sorted(scene.latencies) == [5.0, 5.0]
    assert "exact" in scene.sources


def test_a_primary_whose_user_is_gone_still_helps_the_others():
    scene = parity_scene()
    scene.slow(1)
    tickets = scene.send(2)
    scene.later(0.5, scene.gateway.cancel, tickets[1])  # its task had begun, so its reply comes
    scene.run()
    assert scene.sources == ["decoded"]
    assert scene.latencies == [1.5]


# ---- the parts ----


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=30), st.floats(0, 0.6), st.integers(1, 9))
def test_nobody_waits_longer_than_wait_s_and_what_is_forgotten_is_never_taken(script, wait_s, full):
    clock = VirtualClock()
    taken = {}

    def take():
        for item in waiting.take(full):
            taken[item.number] = clock.time() - item.since_s
        waiting.wake()

    waiting = Waiting(clock, full, take, wait_s)
    forgotten = set()

    def come(number, forget):
        item = Item(number, picture(0), lambda outcome: None, number, clock.time())
        waiting.add(item)
        waiting.wake()
        if forget:
            waiting.forget(item)
            forgotten.add(number)

    at = 0.0
    for number, (gap, forget) in enumerate(script):
        at += gap
        clock.call_at(at, come, number, forget)
    clock.run()
    assert set(taken) == set(range(len(script))) - forgotten
    assert all(waited <= wait_s + 1e-9 for waited in taken.values())
    assert len(waiting) == 0


def test_a_reply_that_is_none_does_not_spoil_the_group_for_the_next():
    item = Item(0, picture(0), lambda outcome: None, 0, 0.0)
    group, stats, answers = Group(Replicate(FORM, copies=2), [item]), Stats(), []
    group.replied(1, np.zeros((3, 3), np.float32), stats, lambda *told: answers.append(told))
    assert (answers, stats.bad_replies) == ([], 1)
    group.replied(2, np.zeros((1, CLASSES), np.float32), stats, lambda *told: answers.append(told))
    assert [told[2] for told in answers] == ["replicate2"]


def test_a_group_that_cannot_be_encoded_does_not_keep_the_backup_from_the_next():
    class Picky(Collage):
        def spares(self, prepared):
            if any(item[0, 0, 0] == 0 for item in prepared):
                raise CodeError("no zeros")
            return super().spares(prepared)

    scene = Scene(collage(), replicas=9, codes=(Picky(2, 1, FORM, model="c2"),))
    scene.send(8)
    scene.run()
    scene.assert_everything_answered()
    assert scene.stats.code_errors == 1
    assert scene.stats.grouped == {"collage2x2": 4}
