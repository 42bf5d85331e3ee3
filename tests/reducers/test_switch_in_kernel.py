"""Trainings in network namespaces, whose gradients the switch in the kernel adds."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evenkeel.switch.aggregator import Event, Rule, SlotPolicy
from evenkeel.switch.deployment import Deployment, down, up
from switch_packets import why_no_kernel

NAME, UDP, RANKS = "ranks", 9700, 3
SCRIPT = Path(__file__).parents[1] / "helpers" / "kernel_rank.py"
WHY_NOT = why_no_kernel() or ("" if shutil.which("ip") else "iproute2 is not installed")
pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


class Process:
    """A process in a host of the switch, spoken to in lines."""

    def __init__(self, made: Deployment, host: int, *command: str, **environment: str) -> None:
        inside = ("ip", "netns", "exec", made.ports[host].host, sys.executable)
        here = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.running = subprocess.Popen(
            [*inside, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=here, text=True
        )

    def say(self, order: dict[str, Any]) -> None:
        assert self.running.stdin is not None
        self.running.stdin.write(json.dumps(order) + "\n")
        self.running.stdin.flush()

    def hear(self, mark: str) -> str:
        assert self.running.stdout is not None
        for line in self.running.stdout:
            if mark in line:
                return line.strip()
        raise AssertionError(f"{mark!r} was never said; it ended with {self.running.wait()}")

    def end(self, number: int = signal.SIGTERM) -> None:
        """Sends it a signal, and waits until it is gone."""
        self.running.send_signal(number)
        self.running.wait(20)
        for pipe in (self.running.stdin, self.running.stdout):
            assert pipe is not None
            pipe.close()


class Cluster:
    """A switch, a server behind its last port, and ranks behind the others."""

    def __init__(self, made: Deployment) -> None:
        self.made = made
        self.server = self.serve()
        together = {"MASTER_ADDR": made.ports[0].address, "MASTER_PORT": "29800", "WORLD_SIZE": str(RANKS)}
        self.ranks = [
            Process(made, rank, str(SCRIPT), RANK=str(rank), GLOO_SOCKET_IFNAME="eth0", **together)
            for rank in range(RANKS)
        ]
        for rank in self.ranks:
            rank.hear("@")

    @property
    def address(self) -> str:
        return f"{self.made.ports[RANKS].address}:{UDP}"

    def serve(self) -> Process:
        server = Process(self.made, RANKS, "-m", "evenkeel", "switch", "ps", "--bind", self.address)
        assert server.hear("serving at").endswith(f"behind switch {NAME}")
        return server

    def do(self, **order: Any) -> list[Any]:
        for rank in self.ranks:
            rank.say(order)
        return [json.loads(rank.hear("@ ")[2:]) for rank in self.ranks]

    def counts(self) -> dict[Any, int]:
        maps = self.made.open()
        try:
            return maps.counts
        finally:
            maps.close()


@pytest.fixture(params=["native", "generic"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    rule = Rule.of(SlotPolicy.of("esa"), 64, words=180)
    made = up(RANKS + 1, rule, UDP, mode=request.param, name=NAME)
    found = None
    try:
        found = Cluster(made)
        yield found
    finally:
        if found is not None:
            for each in (*found.ranks, found.server):
                each.end(signal.SIGKILL)
        down(NAME)


def test_trained_weights_are_those_over_the_group_and_a_switch_that_dies_stops_nobody(cluster: Cluster) -> None:
    silence = {"switch": cluster.address, "timeout_s": 30, "silence_s": 0.3}
    for code in ("thc", "fixed"):
        over_group = cluster.do(code=code, switch=None, steps=12)
        before = cluster.counts().get(Event.COMPLETED, 0)
        over_switch = cluster.do(code=code, switch=silence, steps=12)
        assert [each["digests"] for each in over_switch] == [each["digests"] for each in over_group]
        assert all(each["fell_back"] == 0 and each["switch"]["through_switch"] >= 10 for each in over_switch)
        assert all(each["switch"]["transport"]["bad"] == 0 for each in over_switch)
        assert cluster.counts()[Event.COMPLETED] > before + 10  # the kernel added, not the server
    # The server ends: its jobs leave the switch, and the ranks add over shares.
    cluster.server.end()
    alone = cluster.do(steps=5)
    assert all(each["switch"]["down"] and each["fell_back"] >= 5 for each in alone)
    cluster.server = cluster.serve()
    before = cluster.counts()[Event.COMPLETED]
    back = cluster.do(steps=40)
    assert all(not each["switch"]["down"] and each["switch"]["returns"] == 1 for each in back)
    assert len({tuple(each["digests"]) for each in back}) == 1
    assert cluster.counts()[Event.COMPLETED] > before
    # A server that is killed and starts again finds its jobs in the switch.
    cluster.server.end(signal.SIGKILL)
    cluster.server = cluster.serve()
    again = cluster.do(steps=10)
    assert len({tuple(each["digests"]) for each in again}) == 1
    assert all(not each["switch"]["down"] for each in again)


def test_a_late_rank_is_left_out(cluster: Cluster) -> None:
    switch = {"switch": cluster.address, "timeout_s": 30, "silence_s": 5, "deadline": 0.02}
    cluster.ranks[2].say({"code": "thc", "switch": switch, "steps": 8})
    for rank in cluster.ranks[:2]:
        rank.say({"code": "thc", "switch": switch, "steps": 20})
    for rank in cluster.ranks[:2]:
        rank.hear("@ ")
    late = json.loads(cluster.ranks[2].hear("@ ")[2:])
    assert late["fell_back"] == 0
    cluster.ranks[2].say({"steps": 12})
    caught_up = json.loads(cluster.ranks[2].hear("@ ")[2:])
    assert caught_up["switch"]["left_out"] > 0
    found = cluster.do(steps=3)
    assert len({tuple(each["digests"]) for each in found}) == 1
