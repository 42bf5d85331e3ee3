"""A switch on real ports: workers on hosts of their own get the sum of what they sent, and nothing is left behind."""

import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.switch import deployment
from evenkeel.switch.aggregator import Event, Job, Rule, SlotPolicy
from evenkeel.switch.deployment import Port, down, find_deployment, inside, read_ports, up
from evenkeel.switch.packet import Kind, LaneType, Packet, Reason, parse, write
from switch_packets import sum_of, why_no_kernel

NAME, UDP, WORDS, TOKEN = "test", 7411, 180, 2**63 + 5
WHY_NOT = why_no_kernel() or ("" if shutil.which("ip") else "iproute2 is not installed")
needs_root = [pytest.mark.root, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


def rule(policy: str = "esa", **settings) -> Rule:
    return Rule.of(SlotPolicy.of(policy), 64, words=WORDS, **settings)


@pytest.fixture(params=["native", "generic"])
def switch(request):
    made = up(4, rule(), UDP, mode=request.param, name=NAME)
    yield made
    down(NAME)


def opened(made, host: int, udp: int) -> socket.socket:
    """A socket on a host."""
    port = made.ports[host]

    def bound() -> socket.socket:
        made_here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made_here.settimeout(5)
        made_here.bind((port.address, udp))
        return made_here

    return inside(port.host, bound)


@pytest.mark.parametrize("lanes", [LaneType.BYTES, LaneType.THC, LaneType.INTS])
@pytest.mark.usefixtures("switch")
class TestOnPorts:
    pytestmark = needs_root

    def test_workers_get_the_sum_from_their_server_and_the_server_gets_it_too(self, switch, lanes):
        largest = lanes.most or 2000 if lanes == LaneType.INTS else lanes.most or 63
        job = Job(TOKEN, 3, lanes, WORDS, largest)
        server = (switch.ports[3].address, UDP)
        workers = [(port.address, 6000 + number) for number, port in enumerate(switch.ports[:3])]
        if lanes == LaneType.THC and switch.mode == "native":
            with pytest.raises(ConfigurationError, match="start the switch with --mode generic"):
                switch.register(9, job, workers, server)
            return
        before = opened(switch, 0, 6100)
        ear = opened(switch, 3, UDP)
        early = write(Packet(Kind.GRADIENT, lanes, 9, TOKEN, 0, 1, payload=bytes(8 * job.raw_words)))
        before.sendto(early, server)
        assert ear.recv(4096) == early  # until the job is registered everything passes
        before.close()
        switch.register(9, job, workers, server)
        sockets = [opened(switch, number, workers[number][1]) for number in range(3)]
        payloads = [bytes([worker + 1, 2 * worker, 0, 0] * 2 * job.raw_words) for worker in range(3)]
        for fragment in range(20):
            packets = [
                Packet(Kind.GRADIENT, lanes, 9, TOKEN, fragment, 1 << worker, payload=payloads[worker])
                for worker in range(3)
            ]
            for each, packet in zip(sockets, packets, strict=True):
                each.sendto(write(packet), server)
            for each in (*sockets, ear):
                data, source = each.recvfrom(4096)
                result = parse(data)
                assert (result.kind, result.job, result.fragment, result.bitmap) == (Kind.RESULT, 9, fragment, 0b111)
                assert result.payload == sum_of(packets)
                if each is not ear:
                    assert source == server
        maps = switch.open()
        assert maps.counts[Event.COMPLETED] == 20
        assert maps.slots == {}
        maps.close()
        # What is not added reaches the server as it was sent, and garbage reaches nobody.
        sockets[0].sendto(write(replace(packets[0], kind=Kind.RESEND)), server)
        assert parse(ear.recv(4096)) == replace(packets[0], kind=Kind.RESEND)
        sockets[0].sendto(write(packets[1]), server)
        sockets[0].sendto(write(replace(packets[0], token=1)), server)
        sockets[0].sendto(write(replace(packets[0], fragment=99)), server)
        # A reminder takes a partial sum along, wherever it is addressed.
        room = bytes(8 * WORDS)
        ear.sendto(write(Packet(Kind.REMINDER, lanes, 9, TOKEN, 99, payload=room)), workers[1])
        partial = parse(ear.recv(4096))
        assert (partial.kind, partial.bitmap, partial.payload) == (Kind.PARTIAL, 1, sum_of(packets[:1]))
        # Where there is none it comes back.
        ear.sendto(write(Packet(Kind.REMINDER, lanes, 9, TOKEN, 98, payload=room)), workers[1])
        assert parse(ear.recv(4096)) == Packet(Kind.REMINDER, lanes, 9, TOKEN, 98, payload=room)
        maps = switch.open()
        assert {Reason.SENDER: 1, Reason.TOKEN: 1}.items() <= maps.counts.items()
        maps.close()
        for each in (*sockets, ear):
            each.close()


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_root)])
def test_nothing_is_left_behind_and_a_second_switch_is_refused(mark):
    up(2, rule(), UDP, name=NAME)
    try:
        with pytest.raises(ConfigurationError, match="is up already; run: evenkeel switch down --name test"):
            up(2, rule(), UDP, name=NAME)
        there = find_deployment(NAME)
        assert there is not None
        assert there.rule == rule()
        with pytest.raises(ConfigurationError, match="has an XDP program already"):
            inside(there.namespace, lambda: up([Port("port0", "10.78.0.1")], rule(), UDP, name="other"))
        assert find_deployment("other") is None
        with pytest.raises(ConfigurationError, match=r"no host of switch test has the address 10\.0\.0\.9"):
            there.register(0, Job(1, 1, LaneType.BYTES, WORDS, 1), [("10.0.0.9", 1)], ("10.78.0.2", UDP))
    finally:
        assert down(NAME) is not None
    assert down(NAME) is None
    assert not [path for path in Path("/run/netns").glob("*") if "switch-test" in path.name]


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_root)])
def test_a_switch_that_fails_half_way_leaves_nothing(mark, monkeypatch):
    def fails(*_):
        raise OSError("no")

    monkeypatch.setattr(deployment, "_occupy", fails)
    with pytest.raises(OSError, match="no"):
        up(2, rule(), UDP, name=NAME)
    assert find_deployment(NAME) is None
    assert not [path for path in Path("/run/netns").glob("*") if "switch-test" in path.name]


@pytest.mark.parametrize("mark", [pytest.param(0, marks=needs_root)])
def test_a_port_that_is_not_there_is_refused_with_those_that_are(mark):
    with pytest.raises(ConfigurationError, match="there is no interface 'nosuch' here; there are: "):
        up([Port("nosuch", "10.0.0.1")], rule(), UDP, name=NAME)
    with pytest.raises(ConfigurationError, match="policy: in the kernel it must be one of"):
        up(2, rule("switchml"), UDP, name=NAME)
    assert find_deployment(NAME) is None


def test_ports_are_read_from_text():
    assert read_ports("4") == 4
    assert read_ports("a=10.0.0.1,b=10.0.0.2") == (Port("a", "10.0.0.1"), Port("b", "10.0.0.2"))
    for text in ("a", "a=b", "a=10.0.0.1,", ""):
        with pytest.raises(ConfigurationError, match="hosts: must be a number, or ports"):
            read_ports(text)


@pytest.mark.parametrize(("hosts", "name", "mode"), [(1, NAME, "auto"), (2, "No!", "auto"), (2, NAME, "fast")])
def test_settings_out_of_range_are_refused(hosts, name, mode):
    with pytest.raises(EvenkeelError):
        up(hosts, rule(), UDP, name=name, mode=mode)
