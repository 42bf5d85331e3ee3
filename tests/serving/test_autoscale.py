"""How many replicas there should be: the number asked for, that nothing flaps, and a gateway that grows and shrinks."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from evenkeel.backends.delayed import Delayed
from evenkeel.backends.fake import FakeBackend
from evenkeel.errors import BackendLostError, ConfigurationError
from evenkeel.serving import autoscale as autoscale_module
from evenkeel.serving.autoscale import Autoscaler, AutoscaleSettings, Demand, ReplicaCount
from evenkeel.serving.config import read_config
from evenkeel.serving.hosted import HostedModel
from gateway_helpers import Scene, answer

SETTINGS = AutoscaleSettings(max=20, min=2, target=0.5, up_after_s=5.0, down_after_s=60.0)


@pytest.mark.parametrize(
    ("demand", "replicas"),
    [
        (Demand(0.0, 0.0), 2),  # the least
        (Demand(100.0, 0.02), 4),  # 2 seconds of work a second, at half load
        (Demand(101.0, 0.02), 5),
        (Demand(100.0, 0.02, waiting=50), 5),  # those are worked off in 5 seconds: 10 more a second
        (Demand(100.0, 0.02, busy=3.1), 7),  # hedges are work, too
        (Demand(1e6, 1.0), 20),  # the most
    ],
)
def test_a_moment_asks_for_what_brings_the_load_to_the_target(demand, replicas):
    assert demand.replicas(SETTINGS) == replicas


def decisions(asked, start, settings=SETTINGS):
    """The numbers that follow from one asked for in each second."""
    count, current, taken = ReplicaCount(settings), start, []
    for second, replicas in enumerate(asked):
        current = count.decide(float(second), Demand(replicas * settings.target, 1.0), current)
        taken.append(current)
    return taken


def test_it_grows_after_seconds_and_shrinks_after_minutes():
    taken = decisions([4] * 10 + [9] * 100 + [4] * 100, start=4)
    assert taken[:15] == [4] * 15  # 9 has to be needed for 5 seconds
    assert taken[15:170] == [9] * 155  # and then not to be needed for 60
    assert taken[170:] == [4] * 40


def test_a_peak_of_a_moment_and_a_gap_of_some_seconds_move_nothing():
    assert set(decisions(([6] * 30 + [15] * 4) * 5, start=6)) == {6}
    assert set(decisions(([6] * 30 + [2] * 50) * 5, start=6)) == {6}


@given(st.lists(st.integers(2, 20), min_size=1, max_size=300), st.integers(2, 20))
def test_it_never_flaps(asked, start):
    taken = [start, *decisions(asked, start)]
    changes = [(second, new - old) for second, (old, new) in enumerate(pairwise(taken)) if new != old]
    for (grown_at, up), (shrunk_at, down) in pairwise(changes):
        if up > 0 > down:
            assert shrunk_at - grown_at >= SETTINGS.down_after_s - SETTINGS.up_after_s
    assert all(2 <= number <= 20 for number in taken)
    assert set(taken[1:]) <= {start, *asked}  # it is always a number that somebody asked for


@given(st.lists(st.integers(2, 20), min_size=1, max_size=5), st.integers(2, 20))
def test_what_goes_up_and_down_within_seconds_changes_it_once_at_most_either_way(period, start):
    taken = [start, *decisions(period * 60, start)]
    assert sum(old != new for old, new in pairwise(taken)) <= 1
    assert min(period) <= taken[-1] <= max(period) or len(period) * 60 <= SETTINGS.down_after_s


def test_a_gateway_grows_with_its_traffic_and_shrinks_again_and_answers_all():
    scene = Scene("none", replicas=3, backups=0, codes=())
    clock, gateway = scene.clock, scene.gateway
    scaler = Autoscaler(gateway, None, SETTINGS, clock.time)
    names, counts = [node.name for node in scene.nodes], []

    def look():
        wanted = scaler.step(len(names))
        while len(names) < wanted:
            number = len(scene.nodes)
            scene.nodes.append(Delayed(FakeBackend(f"node{number}", clock, answer), clock, scene.delay, number))
            gateway.join(scene.nodes[-1], tried=True)
            names.append(scene.nodes[-1].name)
        while len(names) > wanted:
            gateway.retire(names.pop(), 30.0, lambda left: None)
        counts.append(wanted)

    for second in range(600):
        scene.later(second + 0.999, look)
    for second in range(500):
        rate = 3 if 100 <= second < 300 else 1
        for number in range(rate):
            scene.later(second + number / rate, scene.send)
    scene.run(700.0)
    scene.assert_everything_answered()
    assert counts[99] == 2  # one second of work a second, at half load
    assert 6 <= max(counts[100:112]) <= 14  # quickly, and more while there is a queue
    assert counts[299] == 6  # three seconds of work a second
    assert counts[-1] == 2
    assert sum(old != new for old, new in pairwise(counts)) <= 5


def test_a_fleet_is_resized_and_what_cannot_be_is_said_and_not_tried_all_the_time(monkeypatch, caplog):
    monkeypatch.setattr(autoscale_module, "_EVERY_S", 0.0)
    monkeypatch.setattr(autoscale_module, "_PAUSE_S", 3600.0)

    class Member:
        def __init__(self, own):
            self.own, self.kind = own, "replica"

    class Fleet:
        def __init__(self):
            self.members, self.asked = [Member(True), Member(True), Member(False)], []

        async def resize(self, kind, count, at_once):
            self.asked.append((kind, count, at_once))
            raise BackendLostError("the cluster has no room")

    async def run():
        scene, fleet = Scene("none", backups=0, codes=()), Fleet()
        scaler = Autoscaler(scene.gateway, fleet, SETTINGS, lambda: 0.0)
        monkeypatch.setattr(scaler, "step", lambda current: current + 2)
        task = asyncio.ensure_future(scaler.run())
        while "looked at again" not in caplog.text:
            await asyncio.sleep(0)
        task.cancel()
        return fleet.asked

    assert asyncio.run(run()) == [("replica", 4, 1)]
    assert "the number of replicas goes from 3 to 5" in caplog.text
    assert "the number of replicas is looked at again in 3600 s: the cluster has no room" in caplog.text


def test_a_served_model_grows_to_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(autoscale_module, "_EVERY_S", 0.01)
    monkeypatch.setattr(Autoscaler, "step", lambda self, current: 2)

    async def run():
        nodes = {"count": 1, "autoscale": {"max": 3}}
        hosted = HostedModel(read_config({"replicas": nodes, "backups": 0, "policy": "none"}))
        try:
            await hosted.start()
            while len(hosted.gateway.replicas.all) < 2:
                await asyncio.sleep(0.01)
            return [(member.name, member.backend.ready) for member in hosted.fleet.members]
        finally:
            await hosted.close()

    assert asyncio.run(asyncio.wait_for(run(), 60)) == [("replica-0", True), ("replica-1", True)]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"count": 3, "autoscale": {"max": 2}}, "replicas.autoscale: the fleet begins with 3, which is not from min"),
        ({"count": 3, "autoscale": {"max": 4, "min": 5}}, "replicas.autoscale.min: must be at most max, 4, found 5"),
        ({"count": 3, "autoscale": {}}, "replicas.autoscale.max: is missing"),
        ({"count": 3, "autoscale": {"max": 4, "target": 1.5}}, "autoscale.target: expected a number from 0.01 to 0.99"),
        (
            {"count": 3, "autoscale": {"max": 4, "up_after": "1min", "down_after": "30s"}},
            "replicas.autoscale.down_after: must be at least up_after, 60s, found 30s",
        ),
        (
            {"addresses": ["unix:/w"], "autoscale": {"max": 4}},
            "replicas.autoscale: is for workers that the gateway has started; give count or ray",
        ),
        (
            {"ray": {"count": 3, "fleet": "blue"}, "autoscale": {"max": 4}},
            "replicas.autoscale: a fleet that gateways share has a fixed number of workers",
        ),
    ],
)
def test_what_cannot_be_scaled_is_refused(nodes, message):
    with pytest.raises(ConfigurationError) as caught:
        read_config({"replicas": nodes})
    assert message in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"backups.autoscale: the load says"):
        read_config({"backups": {"count": 1, "autoscale": {"max": 2}}})
