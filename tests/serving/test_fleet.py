"""Fleets whose nodes join, leave, die and are restarted: with scripted nodes, and with processes under load."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from evenkeel.backends.fake import FakeBackend
from evenkeel.clock import LoopClock
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.errors import BackendError, BackendLostError, ConfigurationError, EvenkeelError
from evenkeel.models.shipped import card_path
from evenkeel.serving.config import read_config
from evenkeel.serving.fleet import FleetMember, LiveFleet
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.gateway.policy import preset
from evenkeel.serving.hosted import HostedModel


class Node(FakeBackend):
    """A node that may refuse to start, or take long for it, and knows whether it was closed."""

    def __init__(self, name, error=None, starts=None):
        super().__init__(name, LoopClock(asyncio.get_running_loop()), lambda model, inputs: np.zeros((len(inputs), 2)))
        self.error, self.starts, self.closed, self.began = error, starts, False, False

    async def start(self):
        self.began = True
        if self.starts is not None:
            await self.starts.wait()
        if self.error is not None:
            raise self.error

    async def close(self):
        self.closed = True
        await super().close()


class Own(Node):
    """A node that counts as a worker of this process."""

    managed = True


class Scripted(LiveFleet):
    """Three replicas of ours and one elsewhere; `steps` is what happened, with the number of replicas at the time."""

    def __init__(self, monkeypatch, warm=True):
        monkeypatch.setattr("evenkeel.serving.fleet.ProcessBackend", Own)
        self.made, self.steps, self.warm = [], [], warm
        nodes = [*(Own(f"own-{number}") for number in range(3)), Node("elsewhere")]
        self.gateway = Gateway(
            LoopClock(asyncio.get_running_loop()), "m", nodes, policy=preset("none"), scores=ScoreForm(2)
        )
        super().__init__(
            self.gateway, [FleetMember(node, "replica") for node in nodes], self.first_passes, self.another, drain_s=5.0
        )

    async def first_passes(self, backend, kind):
        return self.warm

    def another(self, kind):
        new = Own(f"new-{len(self.made)}")
        self.made.append(new)
        return new

    async def _join(self, *given):
        await super()._join(*given)
        self.steps.append(("join", len(self.gateway.replicas.all)))

    async def _close_when(self, *given):
        await super()._close_when(*given)
        self.steps.append(("leave", len(self.gateway.replicas.all)))

    @property
    def names(self):
        return [member.name for member in self.members]


@pytest.fixture
def run(monkeypatch):
    """Runs a test with a fleet of its own."""

    def run(test, **options):
        async def whole():
            fleet = Scripted(monkeypatch, **options)
            try:
                await test(fleet)
            finally:
                await fleet.close()
            assert all(member.backend.closed for member in fleet.members)

        asyncio.run(whole())

    return run


def test_a_node_that_does_not_start_or_fails_its_first_pass_changes_nothing(run):
    async def test(fleet):
        before = fleet.names
        for error in (ConfigurationError("it holds another model"), BackendLostError("nobody there")):
            node = Node("bad", error)
            with pytest.raises(EvenkeelError, match=str(error)):
                await fleet.join(node)
            assert node.closed
        fleet.warm = False
        weak = Node("weak")
        with pytest.raises(BackendError, match=r"weak could not do its first passes, so it does not join"):
            await fleet.join(weak)
        assert weak.closed
        again = Node("own-1")
        fleet.warm = True
        with pytest.raises(ConfigurationError, match="own-1 cannot join: a node of that name is here already"):
            await fleet.join(again)
        assert again.closed
        assert fleet.names == before
        assert len(fleet.gateway.replicas.all) == 4

    run(test)


def test_a_patient_join_takes_in_a_node_that_is_down_and_will_be_tried(run):
    async def test(fleet):
        node = Node("later", BackendLostError("nobody there yet"))
        node.kill()
        await fleet.join(node, patient=True)
        assert "later" in fleet.names
        assert not node.closed

    run(test)


def test_a_node_that_leaves_is_closed_after_its_last_task(run):
    async def test(fleet):
        node = next(member.backend for member in fleet.members if member.name == "own-1")
        node.freeze()
        done = [asyncio.get_running_loop().create_future() for _ in range(4)]
        for future in done:
            fleet.gateway.submit(np.zeros(1), future.set_result)
        leaving = asyncio.ensure_future(fleet.leave("own-1"))
        await asyncio.sleep(0)
        assert "own-1" not in fleet.names
        assert not node.closed
        node.thaw()
        outcomes = await asyncio.gather(*done)
        await leaving
        assert node.closed
        assert all(outcome.error is None for outcome in outcomes)
        with pytest.raises(ConfigurationError, match="no node is called 'own-1'; there are own-0, own-2, elsewhere"):
            await fleet.leave("own-1")

    run(test)


def test_a_node_that_cannot_join_is_not_even_started(run):
    async def test(fleet):
        with pytest.raises(ConfigurationError, match="began without backups"):
            await fleet.resize("backup", 2)
        assert [(node.began, node.closed) for node in fleet.made] == [(False, True)]
        with pytest.raises(ConfigurationError, match="of that name is here"):
            await fleet.join(twin := Own("own-1"))
        assert not twin.began

    run(test)


def test_a_leave_that_nobody_waits_for_goes_on(run):
    async def test(fleet):
        node = fleet.members[0].backend
        leaving = asyncio.ensure_future(fleet.leave("own-0"))
        await asyncio.sleep(0)
        leaving.cancel()
        while not node.closed:
            await asyncio.sleep(0)

    run(test)


def test_a_restart_replaces_own_workers_one_after_the_other_and_never_has_fewer(run):
    async def test(fleet):
        await fleet.restart()
        assert fleet.names == ["elsewhere", "new-0", "new-1", "new-2"]
        assert fleet.steps == [("join", 5), ("leave", 4)] * 3
        await fleet.restart(at_once=2)
        assert min(count for _, count in fleet.steps) == 4
        assert max(count for _, count in fleet.steps) == 6

    run(test)


def test_a_restart_whose_new_workers_fail_leaves_the_fleet_as_it_was(run):
    async def test(fleet):
        before, fleet.warm = fleet.names, False
        with pytest.raises(BackendError, match="new-0 could not do its first passes"):
            await fleet.restart()
        assert fleet.names == before
        assert len(fleet.made) == 1
        assert fleet.made[0].closed

    run(test)


def test_a_resize_starts_and_ends_own_workers_only(run):
    async def test(fleet):
        await fleet.resize("replica", 5, at_once=9)
        assert fleet.names == ["own-0", "own-1", "own-2", "elsewhere", "new-0", "new-1"]
        await fleet.resize("replica", 1)
        assert fleet.names == ["own-0", "elsewhere"]
        await fleet.resize("replica", 0)
        assert fleet.names == ["elsewhere"]
        await fleet.leave("elsewhere")
        with pytest.raises(ConfigurationError, match="a fleet needs at least one replica, found 0"):
            await fleet.resize("replica", 0)
        with pytest.raises(ConfigurationError, match="has no use for them"):
            await fleet.resize("backup", 1)

    run(test)


def test_a_fleet_that_closes_lets_nobody_join_any_more(run):
    async def test(fleet):
        node = Node("slow", starts=asyncio.Event())
        joining = asyncio.ensure_future(fleet.join(node))
        for _ in range(3):
            await asyncio.sleep(0)
        await fleet.close()
        with pytest.raises(BackendError, match="the server is shutting down"):
            await joining
        assert node.closed

    run(test)


class Load:
    """Keeps so many items in flight at a gateway, and keeps what became of them."""

    def __init__(self, gateway, item, width=4):
        self.gateway, self.item = gateway, item
        self.outcomes, self.open, self.on = [], 0, True
        for _ in range(width):
            self.send()

    def send(self):
        if self.on:
            self.open += 1
            self.gateway.submit(self.item, self.done)

    def done(self, outcome):
        self.open -= 1
        self.outcomes.append(outcome)
        asyncio.get_running_loop().call_later(0.005, self.send)

    async def end(self):
        self.on = False
        while self.open:
            await asyncio.sleep(0.01)


def test_workers_listed_in_a_file_join_and_leave_as_it_changes(tmp_path):
    card = str(card_path("cifar10-base"))
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "evenkeel", "worker", "--model", card, "--listen", f"unix:{tmp_path}/{name}"],
            stderr=subprocess.DEVNULL,
        )
        for name in "ab"
    ]
    nodes = tmp_path / "nodes.txt"
    nodes.write_text(f"unix:{tmp_path}/a\nunix:{tmp_path}/b\n")

    async def run():
        hosted = HostedModel(read_config({"replicas": [f"file:{nodes}"], "backups": 0, "policy": "none"}))
        try:
            await hosted.start()
            while (
                len(hosted.fleet.members) < 2 or not hosted.gateway.ready
            ):  # workers that are still starting join later
                await asyncio.sleep(0.02)
            load = Load(hosted.gateway, np.zeros((32, 32, 3), np.uint8), width=2)
            nodes.write_text(f"unix:{tmp_path}/b\n")
            while len(hosted.fleet.members) > 1:
                await asyncio.sleep(0.02)
            workers[0].terminate()
            nodes.write_text("")  # nothing found changes nothing
            await asyncio.sleep(0.1)
            await load.end()
            assert [outcome.error for outcome in load.outcomes if outcome.error] == []
            assert len(hosted.fleet.members) == 1
        finally:
            await hosted.close()

    try:
        asyncio.run(run())
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait(20)


def test_processes_join_leave_restart_and_die_under_load_without_a_lost_item():
    async def run():
        hosted = HostedModel(read_config({"replicas": 2, "backups": 1, "policy": "collage+hedge"}))
        try:
            await hosted.start()
            gateway, fleet = hosted.gateway, hosted.fleet
            load = Load(gateway, np.zeros((32, 32, 3), np.uint8))
            first = {member.name for member in fleet.members}
            await fleet.resize("replica", 3)
            assert len(gateway.replicas.all) == 3
            await fleet.resize("replica", 2)
            await fleet.restart(at_once=3)
            assert [len(gateway.replicas.all), len(gateway.backups)] == [2, 1]
            assert first.isdisjoint(member.name for member in fleet.members)
            victim = fleet.members[0].backend
            killed_s = time.monotonic()
            os.kill(victim.pid, signal.SIGKILL)
            while victim.ready:
                await asyncio.sleep(0.005)
            assert time.monotonic() - killed_s < 1.0
            while not victim.ready:
                await asyncio.sleep(0.01)
            back_s = time.monotonic() - killed_s
            await load.end()
            assert len(load.outcomes) > 50
            assert [outcome.error for outcome in load.outcomes if outcome.error] == []
            return back_s
        finally:
            await hosted.close()

    assert asyncio.run(run()) < 20.0  # some 1.5 s on a machine that does nothing else
