"""The live feed on a virtual clock: a frame a second for those who watch, and nothing for nobody."""

from dataclasses import dataclass, field

import orjson
import pytest

from evenkeel.errors import OverloadedError
from evenkeel.serving.front.served import ServedModel
from evenkeel.serving.live.feed import FEED_HEADERS, LiveFeed
from gateway_helpers import Scene
from http_helpers import make_card


@dataclass(eq=False)
class Viewer:
    head: tuple[int, bytes] | None = None
    parts: list[bytes] = field(default_factory=list)

    def begin(self, status, headers):
        self.head = status, headers

    def send(self, part):
        assert self.head is not None
        self.parts.append(part)

    @property
    def frames(self):
        assert all(part.startswith(b"data: ") and part.find(b"\n") == len(part) - 2 for part in self.parts)
        return [orjson.loads(part[6:]) for part in self.parts]


class Watched:
    def __init__(self, **options):
        self.scene = Scene(**options)
        self.clock = self.scene.clock
        self.models = [ServedModel("toy", "1", make_card(), self.scene.gateway)]
        self.cpu_s, self.own_cpu_s = 0.0, 0.0
        self.feed = LiveFeed(lambda: self.models, lambda: self.clock, lambda: self.cpu_s, self.own)

    def own(self):
        self.own_cpu_s += 0.0005  # so that each frame, between two readings, costs as much
        return self.own_cpu_s


def test_a_viewer_gets_a_frame_at_once_and_one_a_second():
    watched, viewer = Watched(), Viewer()
    watched.feed.join(viewer)
    assert viewer.head == (200, FEED_HEADERS)
    assert len(viewer.frames) == 1
    watched.clock.run(3.5)
    assert [frame["time_s"] for frame in viewer.frames] == pytest.approx([0, 1, 2, 3])


def test_nobody_watching_nothing_is_done():
    watched, viewer = Watched(), Viewer()
    watched.feed.join(viewer)
    watched.clock.run(1.5)
    watched.feed.leave(viewer)
    watched.feed.leave(Viewer())  # who never watched
    watched.clock.run()  # comes back: no timer is left
    assert watched.clock.time() < 2
    assert len(viewer.frames) == 2


def test_viewers_are_bounded_and_a_place_becomes_free():
    watched, viewers = Watched(), [Viewer() for _ in range(16)]
    for viewer in viewers:
        watched.feed.join(viewer)
    late = Viewer()
    with pytest.raises(OverloadedError, match="16 viewers"):
        watched.feed.join(late)
    assert late.head is None
    watched.feed.leave(viewers[0])
    watched.feed.join(late)
    watched.clock.run(1.5)
    # One frame is made for all of them.
    assert len({viewer.parts[-1] for viewer in [*viewers[1:], late]}) == 1


def test_a_frame_says_what_was_answered_how_and_by_whom():
    watched, viewer = Watched(replicas=2), Viewer()
    watched.scene.slow(0)
    watched.scene.send(4)
    watched.scene.nodes[0].address = "tcp://10.0.0.7:7000"
    watched.feed.join(viewer)
    watched.clock.run(20)
    watched.feed.leave(viewer)
    stats, (model,) = watched.scene.stats, viewer.frames[-1]["models"]
    assert {source: sum(counts) for source, counts in model["latencies"].items()} == stats.sources
    assert model["counts"]["items"] == 4
    assert model["fills"] == stats.fills
    assert model["saved"]["sum_s"] == pytest.approx(stats.saved_times.sum_s)
    assert model["budgets"]["hedge"] == pytest.approx(watched.scene.gateway.budgets["hedge"].saved)
    assert model["budgets"]["approximate"] is None
    nodes = [(node["name"], node["kind"], node["address"], node["state"]) for node in model["nodes"]]
    assert nodes == [
        ("node0", "replica", "tcp://10.0.0.7:7000", "well"),
        ("node1", "replica", "", "well"),
        ("node2", "backup", "", "well"),
    ]


def test_a_worker_that_is_gone_is_shown_as_gone_and_with_the_reason():
    watched, viewer = Watched(), Viewer()
    watched.scene.fakes[1].kill()
    watched.scene.fakes[-1].kill()
    watched.feed.join(viewer)
    (model,) = viewer.frames[-1]["models"]
    assert [node["state"] for node in model["nodes"]] == ["well", "gone", "well", "gone"]


def test_models_that_come_and_go_are_in_the_next_frame():
    watched, viewer = Watched(), Viewer()
    watched.feed.join(viewer)
    watched.models.append(ServedModel("other", "2", make_card(), Scene().gateway))
    watched.clock.run(1.5)
    watched.models.clear()
    watched.clock.run(2.5)
    assert [[model["name"] for model in frame["models"]] for frame in viewer.frames] == [["toy"], ["toy", "other"], []]


def test_it_says_what_it_costs():
    watched, viewer = Watched(), Viewer()
    watched.feed.join(viewer)
    for second in range(1, 6):
        watched.clock.run(second + 0.5)
        watched.cpu_s += 0.2  # of the whole gateway, in each second
    costs = [frame["cost"] for frame in viewer.frames]
    assert costs[0] is None
    # Half a millisecond a frame, of 200 a second.
    assert costs[-1]["share"] == pytest.approx(0.0025)
    assert costs[-1]["per_second"] == pytest.approx(0.0005)


def test_of_many_workers_a_frame_holds_so_many_and_says_how_many_it_leaves_out():
    watched, viewer = Watched(replicas=300), Viewer()
    watched.feed.join(viewer)
    (model,) = viewer.frames[0]["models"]
    assert (len(model["nodes"]), model["more_nodes"]) == (256, 45)
