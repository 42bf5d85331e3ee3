"""Nodes join and leave while items are answered: each item has one outcome, and none goes to a node that left."""

import pytest
from hypothesis import given, strategies as st

from evenkeel.backends.delayed import Delayed
from evenkeel.backends.fake import FakeBackend
from evenkeel.coding.answers.berrut import Berrut
from evenkeel.errors import ConfigurationError
from gateway_helpers import FORM, Scene, answer, picture


class Watched(Delayed):
    """Notes what is asked of it after it was retired, and after the gateway let go of it."""

    def __init__(self, name, clock, delay):
        self.fake = FakeBackend(name, clock, answer)
        super().__init__(self.fake, clock, delay)
        self.retired = self.let_go = False
        self.wrong = []
        self.tasks = 0

    def submit(self, model, inputs, on_reply, key=0):
        self.tasks += 1
        if self.retired:
            self.wrong.append(f"{self.name} got a task when it was leaving")
        return super().submit(model, inputs, on_reply, key)

    def cancel(self, ticket):
        if self.let_go:
            self.wrong.append(f"{self.name} was used when it had left")
        super().cancel(ticket)


class Changing(Scene):
    """A scene whose nodes come and go."""

    def __init__(self, replicas=3, backups=1, **options):
        super().__init__(replicas=replicas, backups=backups, **options)
        self.here = {"replica": [], "backup": []}
        self.watched = []
        for number in range(replicas + backups):  # in place of those that the scene made
            kind = "replica" if number < replicas else "backup"
            self.join(kind)
            self.gateway.retire(f"node{number}", 0.0, lambda tasks: None)

    def join(self, kind, tried=True):
        node = Watched(f"{kind}-{len(self.watched)}", self.clock, self.delay)
        self.watched.append(node)
        self.here[kind].append(node)
        self.gateway.join(node, kind, tried=tried)
        return node

    def retire(self, kind, place=0, limit_s=30.0):
        node = self.here[kind].pop(place)
        left = []

        def on_left(tasks):
            node.let_go = True
            left.append(tasks)

        node.retired = True
        self.gateway.retire(node.name, limit_s, on_left)
        return left

    def assert_nobody_wronged(self):
        assert [wrong for node in self.watched for wrong in node.wrong] == []


def test_a_new_replica_gets_work_at_once_and_one_that_leaves_finishes_what_it_has():
    scene = Changing(replicas=2, backups=0, policy="none")
    scene.send(4)
    new = scene.join("replica")
    scene.send(1)
    assert new.tasks == 1
    left = scene.retire("replica")
    scene.send(3)
    scene.run(1.5)
    assert left == []  # it has two items, a second each
    scene.run()
    assert left == [0]
    scene.assert_everything_answered()
    scene.assert_nobody_wronged()
    assert scene.stats.lost_attempts == 0


def test_what_a_node_does_not_finish_in_time_goes_to_others_and_blames_nobody():
    scene = Changing(replicas=2, backups=0, policy="none")
    scene.send(6)
    left = scene.retire("replica", limit_s=0.5)
    scene.run()
    assert left == [3]
    scene.assert_everything_answered()
    scene.assert_nobody_wronged()
    assert scene.stats.ejections == {}


def test_a_frozen_node_that_leaves_keeps_no_item():
    scene = Changing(replicas=3, backups=0, policy="none", deadline_s=100)
    scene.here["replica"][0].fake.freeze()
    scene.send(3)
    left = scene.retire("replica", limit_s=60.0)
    scene.run()
    assert left == [0] or left == [1]
    scene.assert_everything_answered()


def test_an_untried_replica_shows_first_what_it_can_do():
    scene = Changing(replicas=1, backups=0, policy="none")
    scene.gateway.watch(picture(0))
    new = scene.join("replica", tried=False)
    scene.send(4)
    scene.run(0.1)
    assert new.tasks == 1  # its trial
    scene.run()
    scene.send(2)
    scene.run()
    assert new.tasks >= 2
    scene.assert_everything_answered()


def test_a_name_that_is_taken_and_one_that_is_unknown_are_refused():
    scene = Changing()
    with pytest.raises(ConfigurationError, match=r"replica-0 cannot join: a node of that name is here already"):
        scene.gateway.join(Watched("replica-0", scene.clock, scene.delay))
    with pytest.raises(ConfigurationError, match="no node is called 'other'"):
        scene.gateway.retire("other", 0.0, lambda tasks: None)
    plain = Scene("none", backups=0)
    with pytest.raises(ConfigurationError, match="has no use for them"):
        plain.gateway.join(Watched("backup", plain.clock, plain.delay), "backup")


def test_without_any_replica_items_are_refused_until_one_joins():
    scene = Changing(replicas=1, backups=0, policy="none")
    scene.retire("replica")
    assert not scene.gateway.ready
    assert scene.gateway.max_items >= 1
    scene.join("replica")
    assert scene.gateway.ready
    scene.send(2)
    scene.run()
    scene.assert_everything_answered()


CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1.5),  # seconds since the last one
        st.sampled_from(["send", "send", "send", "join", "retire"]),
        st.sampled_from(["replica", "replica", "backup"]),
        st.integers(0, 50),
        st.sampled_from([0.0, 0.5, 30.0]),
    ),
    max_size=60,
)


def act(scene, kept, what, kind, number, limit_s):
    nodes = scene.here[kind]
    if what == "send":
        scene.send(1 + number % 4)
    elif what == "join":
        scene.join(kind)
    elif len(nodes) > kept:
        scene.retire(kind, number % len(nodes), limit_s)


@given(CHANGES)
def test_every_item_has_one_answer_whoever_comes_and_goes(changes):
    scene = Changing(deadline_s=1000)
    when = 0.0
    for gap, *change in changes:
        when += gap
        kept = 1 if change[1] == "replica" else 0
        scene.later(when, act, scene, kept, *change)
    scene.run()
    scene.assert_everything_answered()
    scene.assert_nothing_left()
    scene.assert_nobody_wronged()
    assert not scene.gateway.replicas.leaving


@given(CHANGES, st.lists(st.tuples(st.floats(0, 40), st.sampled_from(["kill", "freeze"]), st.integers(0, 50))))
def test_every_item_has_one_outcome_also_where_nodes_die_meanwhile(changes, deaths):
    scene = Changing(deadline_s=50)
    when = 0.0
    for gap, *change in changes:
        when += gap
        scene.later(when, act, scene, 1, *change)

    def die(how, number):
        node = scene.watched[number % len(scene.watched)]
        if not node.retired:
            getattr(node.fake, how)()

    for when, how, number in deaths:
        scene.later(when, die, how, number)
    scene.run(10_000.0)
    assert sorted(scene.outcomes) == list(range(scene.sent))
    assert scene.gateway.in_flight == 0
    scene.assert_nobody_wronged()


def test_coded_tasks_of_a_replica_that_leaves_go_to_others():
    code = Berrut(2, FORM)
    scene = Changing(replicas=4, backups=0, codes=[code], policy="none", group_wait_s=0.1)
    scene.send(8)
    scene.later(0.5, scene.retire, "replica", 0, 0.0)
    scene.run()
    assert sorted(scene.outcomes) == list(range(8))
    assert all(outcome.error is None for outcome in scene.outcomes.values())
    scene.assert_nobody_wronged()
