"""Describes the emulated network as data: which commands make it and take it away. Nothing here runs them.

Each host is a network namespace with one interface, `eth0`. Its other end is a port of a bridge that has a namespace of
its own, so that nothing of the machine's own network is touched. Both ends of a link let packets out through a token
bucket: what leaves the host and what is on its way to it have the same rate, as behind a switch.
"""

import math
from dataclasses import dataclass

from evenkeel.errors import ConfigurationError

__all__ = ["INTERFACE", "Command", "Topology"]

Command = tuple[str, ...]

INTERFACE = "eth0"
_BRIDGE = "br0"
_NETWORK = "10.77.0"
_MAX_HOSTS = 250
_SLOWEST_BPS, _FASTEST_BPS = 8e3, 1e12
_BURST_S = 2e-3  # of the rate: more would let small messages through for nothing, less would lose time to late timers
_LEAST_BURST_BYTES = 16_384
_QUEUE_S = 0.05  # a packet may wait so long before it is dropped, as in a switch with ordinary buffers
_LEAST_QUEUE_BYTES = 262_144  # many senders to one host must not lose most of their packets on a slow link
_PACKET_BYTES = 1514
_LEAST_PACKETS, _MAX_PACKETS = 1_000, 1_000_000


@dataclass(frozen=True)
class Topology:
    """Hosts on one switch, all links alike."""

    hosts: int
    rate_bps: float = math.inf  # of each link, each way
    delay_s: float = 0.0  # one way: a round trip takes twice that
    loss: float = 0.0  # share of packets that get lost between two hosts

    def __post_init__(self) -> None:
        if not 1 <= self.hosts <= _MAX_HOSTS:
            raise ConfigurationError(f"hosts: must be 1 to {_MAX_HOSTS}, found {self.hosts}")
        if not (_SLOWEST_BPS <= self.rate_bps <= _FASTEST_BPS or self.rate_bps == math.inf):
            raise ConfigurationError(f"rate: must be 8kbit to 1000gbit, or unlimited, found {self.rate_bps:g} bit/s")
        if not 0 <= self.delay_s <= 10:
            raise ConfigurationError(f"delay: must be 0 to 10 s, found {self.delay_s:g} s")
        if not 0 <= self.loss < 1:
            raise ConfigurationError(f"loss: must be a share of at least 0 and below 1, found {self.loss:g}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names the hosts, by rank."""
        return tuple(f"host{rank}" for rank in range(self.hosts))

    def address(self, rank: int) -> str:
        """Gives the IPv4 address of a host."""
        return f"{_NETWORK}.{rank + 1}"

    @property
    def switch_address(self) -> str:
        """Gives the IPv4 address of the switch, for what runs in its middle."""
        return f"{_NETWORK}.{_MAX_HOSTS + 4}"

    def namespaces(self, label: str) -> tuple[str, ...]:
        """Names all network namespaces, the bridge's first; `label` sets one lab apart from another."""
        return (f"{label}-switch", *(self.namespace(label, rank) for rank in range(self.hosts)))

    def namespace(self, label: str, rank: int) -> str:
        """Names a host's network namespace."""
        return f"{label}-{self.names[rank]}"

    def setup(self, label: str) -> list[Command]:
        """Gives the commands that make the network, in order."""
        switch = self.namespaces(label)[0]
        commands: list[Command] = [
            ("ip", "netns", "add", switch),
            ("ip", "-n", switch, "link", "add", _BRIDGE, "type", "bridge"),
            ("ip", "-n", switch, "address", "add", f"{self.switch_address}/24", "dev", _BRIDGE),
            ("ip", "-n", switch, "link", "set", _BRIDGE, "up"),
        ]
        for rank in range(self.hosts):
            host, port = self.namespace(label, rank), f"port{rank}"
            commands += [
                ("ip", "netns", "add", host),
                ("ip", "-n", host, "link", "set", "lo", "up"),
                (
                    *("ip", "-n", switch, "link", "add", port, "type", "veth"),
                    *("peer", "name", INTERFACE, "netns", host),
                ),
                # No IPv6 address by itself: libraries that take an interface's first address must find the one below.
                ("ip", "-n", host, "link", "set", INTERFACE, "addrgenmode", "none"),
                ("ip", "-n", host, "address", "add", f"{self.address(rank)}/24", "dev", INTERFACE),
                *self._shaping(host, INTERFACE, netem=True),
                *self._shaping(switch, port, netem=False),
                ("ip", "-n", switch, "link", "set", port, "master", _BRIDGE, "up"),
                ("ip", "-n", host, "link", "set", INTERFACE, "up"),
            ]
        return commands

    def _shaping(self, namespace: str, interface: str, *, netem: bool) -> list[Command]:
        add = ("tc", "-n", namespace, "qdisc", "add", "dev", interface)
        parent: Command = ("root", "handle", "1:")
        commands: list[Command] = []
        if netem and (self.delay_s or self.loss):
            commands.append((*add, *parent, "netem", *self._netem()))
            parent = ("parent", "1:1", "handle", "10:")
        if math.isfinite(self.rate_bps):
            commands.append((*add, *parent, "tbf", *self._bucket()))
        return commands

    def _bucket(self) -> Command:
        bytes_per_s = self.rate_bps / 8
        burst = max(_LEAST_BURST_BYTES, round(bytes_per_s * _BURST_S))
        queue_s = max(_QUEUE_S, _LEAST_QUEUE_BYTES / bytes_per_s)
        return ("rate", f"{round(self.rate_bps)}bit", "burst", f"{burst}b", "latency", f"{round(queue_s * 1e6)}us")

    def _netem(self) -> Command:
        under_way = 2 * self.delay_s * self.rate_bps / 8 / _PACKET_BYTES if self.delay_s else 0
        packets = round(min(max(under_way, _LEAST_PACKETS), _MAX_PACKETS))
        options: Command = ("limit", str(packets))
        if self.delay_s:
            options += ("delay", f"{round(self.delay_s * 1e6)}us")
        if self.loss:
            options += ("loss", f"{self.loss * 100:.6g}%")
        return options
