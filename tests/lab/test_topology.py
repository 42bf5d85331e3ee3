"""The emulated network as data."""

import math
import re

import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import ConfigurationError
from evenkeel.lab.topology import Topology

topologies = st.builds(
    Topology,
    st.integers(1, 6),
    rate_bps=st.one_of(st.floats(8e3, 1e12), st.just(math.inf)),
    delay_s=st.one_of(st.just(0.0), st.floats(1e-4, 1)),
    loss=st.one_of(st.just(0.0), st.floats(1e-4, 0.5)),
)


def shaping(topology):
    """Namespace, interface and the rest of each `tc` command."""
    commands = [command for command in topology.setup("x") if command[0] == "tc"]
    assert all(command[3:6] == ("qdisc", "add", "dev") for command in commands)
    return [(command[2], command[6], command[7:]) for command in commands]


@given(topologies)
def test_every_command_stays_in_a_namespace_of_the_lab(topology):
    inside, made = set(topology.namespaces("x")), set()
    assert len(inside) == topology.hosts + 1
    for command in topology.setup("x"):
        if command[:3] == ("ip", "netns", "add"):
            made.add(command[3])
            continue
        assert command[0] in ("ip", "tc")
        assert command[1] == "-n"
        assert command[2] in made  # in order: nothing is used before it is there
        if "netns" in command:
            assert command[command.index("netns") + 1] in made
    assert made == inside


@given(topologies)
def test_both_ends_of_every_link_have_the_rate(topology):
    buckets = [(namespace, interface) for namespace, interface, rest in shaping(topology) if "tbf" in rest]
    if topology.rate_bps == math.inf:
        assert not buckets
        return
    switch, *hosts = topology.namespaces("x")
    assert sorted(buckets) == sorted(
        [(host, "eth0") for host in hosts] + [(switch, f"port{rank}") for rank in range(topology.hosts)]
    )
    rates = {rest[rest.index("rate") + 1] for _, _, rest in shaping(topology) if "tbf" in rest}
    assert rates == {f"{round(topology.rate_bps)}bit"}


@given(topologies)
def test_delay_and_loss_are_added_once_on_the_way_out(topology):
    lines = [(namespace, interface, rest) for namespace, interface, rest in shaping(topology) if "netem" in rest]
    if not topology.delay_s and not topology.loss:
        assert not lines
        return
    _, *hosts = topology.namespaces("x")
    assert [(namespace, interface) for namespace, interface, _ in lines] == [(host, "eth0") for host in hosts]
    # A bucket in the same place stands behind it.
    for namespace, interface, rest in shaping(topology):
        if "tbf" in rest:
            expected = ("parent", "1:1") if interface == "eth0" else ("root", "handle")
            assert rest[:2] == expected, namespace


@pytest.mark.parametrize(
    ("rate_bps", "bucket"),
    [
        (100e6, "rate 100000000bit burst 25000b latency 50000us"),  # 2 ms of the rate, 50 ms of queue
        (1e6, "rate 1000000bit burst 16384b latency 2097152us"),  # ten packets, and 256 KiB of queue
        (10e9, "rate 10000000000bit burst 2500000b latency 50000us"),
    ],
)
def test_buckets_fit_the_rate(rate_bps, bucket):
    assert {" ".join(rest) for _, _, rest in shaping(Topology(2, rate_bps))} == {f"root handle 1: tbf {bucket}"}


def test_netem_by_hand():
    (_, _, rest), *_ = shaping(Topology(2, 1e9, delay_s=0.05, loss=0.001))
    assert " ".join(rest) == "root handle 1: netem limit 8256 delay 50000us loss 0.1%"


def test_addresses_are_all_different():
    topology = Topology(250)
    addresses = {topology.address(rank) for rank in range(250)}
    assert len(addresses) == 250
    assert all(re.fullmatch(r"10\.77\.0\.\d{1,3}", address) for address in addresses)
    assert topology.names[:2] == ("host0", "host1")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"hosts": 0}, "hosts"),
        ({"hosts": 251}, "hosts"),
        ({"rate_bps": 0}, "rate"),
        ({"rate_bps": math.nan}, "rate"),
        ({"delay_s": -1}, "delay"),
        ({"loss": 1}, "loss"),
        ({"loss": math.nan}, "loss"),
    ],
)
def test_wrong_networks_are_refused_by_name(options, name):
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        Topology(**{"hosts": 2, **options})
