"""Puts a switch on the ports of this machine, finds it again from other processes, and takes it away.

What there is of a switch is written to a file under `/run/evenkeel` before it is made, so that `down` finds all of it,
whatever happened in between. Its maps are found by their numbers; nothing needs a mounted BPF file system.
"""

import ctypes
import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from evenkeel.errors import ConfigurationError, EvenkeelError, SwitchError
from evenkeel.switch.aggregator import Job, Rule, SlotPolicy
from evenkeel.switch.kernel import Maps, Member, attach, detach, load_program, open_map, require_kernel
from evenkeel.text_values import read_json

__all__ = ["MODES", "Deployment", "Port", "down", "find_deployment", "inside", "names", "read_ports", "up"]

MODES = ("auto", "native", "generic")
_STATES = Path("/run/evenkeel")
_NAMESPACES = Path("/run/netns")
_NETWORK = "10.78.0"
_MAX_HOSTS = 64
_NAME = re.compile(r"[a-z0-9]{1,12}")
_TIMEOUT_S = 20.0
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_ETHTOOL, _SET_GRO = 0x8946, 0x2C
_Given = TypeVar("_Given")


@dataclass(frozen=True, slots=True)
class Port:
    """Holds one port of a switch.

    Attributes:
        interface: name of the switch's side.
        address: IPv4 address of the host behind it.
        mac: of the host's side, in hexadecimal; empty where it is not known.
        host: network namespace of the host, where `up` made it.
    """

    interface: str
    address: str
    mac: str = ""
    host: str = ""


@dataclass(frozen=True, slots=True)
class Deployment:
    """Holds what is known of a switch that is up.

    Attributes:
        name: of the switch.
        rule: its settings.
        udp: port of the servers.
        mode: `native` or `generic`.
        namespace: network namespace of its ports; empty for the one that `up` ran in.
        ports: all of them.
        maps: numbers of its maps.
    """

    name: str
    rule: Rule
    udp: int
    mode: str
    namespace: str
    ports: tuple[Port, ...]
    maps: Mapping[str, int]

    @property
    def file(self) -> Path:
        """Names the file in which it is written down."""
        return _state_file(self.name)

    def open(self) -> Maps:
        """Opens its maps; to be closed.

        Raises:
            ConfigurationError: not root.
            SwitchError: it is gone.
        """
        require_kernel()
        if not self.maps:
            raise SwitchError(f"switch {self.name} was not finished; run: evenkeel switch down --name {self.name}")
        return Maps(self.rule, {name: open_map(number) for name, number in self.maps.items()})

    def register(self, number: int, job: Job, workers: Sequence[tuple[str, int]], server: tuple[str, int]) -> None:
        """Lets a job's packets in.

        Args:
            number: of the job, as its packets say.
            job: what is to be known of it.
            workers: address and UDP port of each, by number.
            server: address and UDP port of its server.

        Raises:
            ConfigurationError: a member is not behind a port of this switch, or the job does not fit it.
            SwitchError: the kernel refuses.
        """
        indices = inside(self.namespace, lambda: {port.address: _index(port.interface) for port in self.ports})
        macs = {port.address: port.mac for port in self.ports}

        def member(address: str, udp: int) -> Member:
            if address not in indices:
                raise ConfigurationError(f"job {number}: no host of switch {self.name} has the address {address}")
            mac = {"mac": bytes.fromhex(macs[address])} if macs[address] else {}
            return Member(address, udp, indices[address], **mac)

        if self.mode == "native" and job.lanes.raw_bits != job.lanes.sum_bits:
            raise ConfigurationError(
                f"job {number}: sums of {job.lanes.name} lanes are longer than what comes, and in native mode no frame "
                "can be lengthened on a veth port; start the switch with --mode generic"
            )
        if server[1] != self.udp:
            raise ConfigurationError(
                f"job {number}: the switch knows its packets by the server's port {self.udp}, not {server[1]}"
            )
        maps = self.open()
        try:
            maps.register(number, job, [member(*each) for each in workers], member(*server))
        finally:
            maps.close()

    def remove(self, number: int) -> None:
        """Lets no packet of a job in any more."""
        maps = self.open()
        try:
            maps.remove(number)
        finally:
            maps.close()


def up(
    hosts: int | Sequence[Port], rule: Rule, udp: int, *, mtu: int = 1500, mode: str = "auto", name: str = "main"
) -> Deployment:
    """Makes a switch.

    Args:
        hosts: so many are made, as network namespaces on a bridge of their own; or ports that there are, of a bridge.
        rule: its settings.
        udp: port of the servers, by which it knows its packets.
        mtu: of links that are made.
        mode: `native`, `generic`, or `auto`: native where the ports can.
        name: of the switch.

    Raises:
        ConfigurationError: root, clang, libbpf or a port is missing, or there is a switch already.
        SwitchError: the kernel refuses. Nothing is left of it.
    """
    _check_name(name)
    if mode not in MODES:
        raise ConfigurationError(f"mode: must be one of {', '.join(MODES)}, found {mode!r}")
    require_kernel()
    if shutil.which("ip") is None:
        raise ConfigurationError("a switch needs iproute2; run: apt-get install iproute2")
    if _state_file(name).exists():
        raise ConfigurationError(f"switch {name} is up already; run: evenkeel switch down --name {name}")
    if isinstance(hosts, int):
        if not 2 <= hosts <= _MAX_HOSTS:
            raise ConfigurationError(f"hosts: must be 2 to {_MAX_HOSTS}, found {hosts}")
        namespace = f"evenkeel-switch-{name}"
        ports: tuple[Port, ...] = tuple(
            Port(f"port{number}", f"{_NETWORK}.{number + 1}", host=f"{namespace}-host{number}")
            for number in range(hosts)
        )
    else:
        namespace, ports = "", tuple(hosts)
        _check_ports(ports)
    planned = Deployment(name, rule, udp, mode, namespace, ports, {})
    loaded = load_program(rule, udp)  # before anything is made: most that can be missing is missed here
    try:
        _write_state(planned)
        if namespace:
            ports = _make_hosts(namespace, ports, mtu)
        mode = inside(namespace, lambda: _occupy(ports, mode, loaded.entering, loaded.leaving, loaded.maps))
        made = Deployment(name, rule, udp, mode, namespace, ports, loaded.map_ids())
        _write_state(made)
        return made
    except BaseException:
        with suppress(EvenkeelError):
            down(name)
        raise
    finally:
        loaded.close()


def down(name: str = "main") -> Deployment | None:
    """Takes a switch away with all that `up` made; None if there is none. What is gone already is no error.

    Raises:
        ConfigurationError: not root.
        SwitchError: something could not be removed.
    """
    require_kernel()
    found = find_deployment(name)
    if found is None:
        return None
    problems = []
    if found.namespace:
        for space in (*(port.host for port in found.ports), found.namespace):
            if (_NAMESPACES / space).exists():
                try:
                    if space == found.namespace:  # a process in a host keeps its namespace, but not its link
                        for port in found.ports:
                            with suppress(SwitchError):
                                _ip("-n", space, "link", "delete", port.interface)
                    _ip("netns", "delete", space)
                except SwitchError as error:
                    problems.append(str(error))
    else:
        for port in found.ports:
            with suppress(OSError):  # the interface is gone, and the program with it
                detach(_index(port.interface))
    if problems:
        raise SwitchError(f"switch {name} could not be removed: {'; '.join(problems)}")
    _state_file(name).unlink(missing_ok=True)
    return found


def find_deployment(name: str = "main") -> Deployment | None:
    """Finds a switch by its name; None if there is none of that name.

    Raises:
        SwitchError: its file cannot be read.
    """
    _check_name(name)
    try:
        found = read_json(_state_file(name).read_text())
        rule = Rule(**{**found["rule"], "policy": SlotPolicy(found["rule"]["policy"])})
        ports = tuple(Port(**port) for port in found["ports"])
        return Deployment(name, rule, found["udp"], found["mode"], found["namespace"], ports, found["maps"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SwitchError(f"{_state_file(name)} cannot be read: {error}") from error


def names() -> list[str]:
    """Gives the names of all switches that are up."""
    return sorted(path.stem.removeprefix("switch-") for path in _STATES.glob("switch-*.json"))


def read_ports(text: str) -> int | tuple[Port, ...]:
    """Reads `4`, so many hosts to be made, or `port0=10.0.0.1,port1=10.0.0.2`, ports that there are.

    Raises:
        ConfigurationError: it is neither.
    """
    if text.isdecimal():
        return int(text)
    ports = []
    for part in text.split(","):
        interface, _, address = part.partition("=")
        if not interface or not re.fullmatch(r"\d+\.\d+\.\d+\.\d+", address):
            raise ConfigurationError(
                f"hosts: must be a number, or ports with the address of the host behind each, as in "
                f"port0=10.0.0.1,port1=10.0.0.2; found {text!r}"
            )
        ports.append(Port(interface, address))
    return tuple(ports)


def inside(namespace: str, work: Callable[[], _Given]) -> _Given:
    """Does work in a network namespace, in a thread of its own; in this one where the name is empty.

    Raises:
        SwitchError: there is no such namespace.
    """
    if not namespace:
        return work()
    results: list[_Given] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            file = os.open(_NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(file, _NEW_NETWORK):
                    raise SwitchError(f"{namespace} cannot be entered: {os.strerror(ctypes.get_errno())}")
            finally:
                os.close(file)
            results.append(work())
        except FileNotFoundError:
            errors.append(SwitchError(f"there is no network namespace {namespace}; it was removed from outside"))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _make_hosts(namespace: str, ports: Sequence[Port], mtu: int) -> tuple[Port, ...]:
    """Makes the network namespaces and their links, and gives the ports with the hosts' MAC addresses."""
    _ip("netns", "add", namespace)
    _ip("-n", namespace, "link", "add", "br0", "type", "bridge")
    _ip("-n", namespace, "link", "set", "br0", "up")
    made = []
    for port in ports:
        _ip("netns", "add", port.host)
        _ip("-n", port.host, "link", "set", "lo", "up")
        # One queue each way: XDP on a veth pair needs as many receive queues as the other end has to send.
        one_queue = ("numrxqueues", "1", "numtxqueues", "1")
        _ip(
            *("-n", namespace, "link", "add", port.interface, "mtu", str(mtu), *one_queue, "type", "veth"),
            *("peer", "name", "eth0", "mtu", str(mtu), "netns", port.host, *one_queue),
        )
        _ip("-n", port.host, "link", "set", "eth0", "addrgenmode", "none")
        _ip("-n", port.host, "address", "add", f"{port.address}/24", "brd", "+", "dev", "eth0")
        # Runs of packets are cut on their way out: a veth pair would hand them on whole, and the switch knows packets.
        _ip("-n", port.host, "link", "set", "eth0", "gso_max_segs", "1")
        _ip("-n", namespace, "link", "set", port.interface, "master", "br0", "up")
        _ip("-n", port.host, "link", "set", "eth0", "up")
        mac = inside(port.host, _join_packets)
        made.append(Port(port.interface, port.address, mac, port.host))
    return tuple(made)


def _join_packets() -> str:
    """Turns GRO on for this namespace's eth0, and gives its MAC address.

    Without GRO the end of a veth pair has no receive queue of its own, and frames that XDP sends to it are lost.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        value = ctypes.create_string_buffer(struct.pack("II", _SET_GRO, 1))
        fcntl.ioctl(any_socket, _ETHTOOL, struct.pack("16sQ", b"eth0", ctypes.addressof(value)))
        found = fcntl.ioctl(any_socket, 0x8927, struct.pack("256s", b"eth0"))  # SIOCGIFHWADDR
    return found[18:24].hex()


def _occupy(ports: Sequence[Port], mode: str, entering: int, leaving: int, maps: Maps) -> str:
    """Puts the program on all ports of this namespace, and gives the mode that it runs in."""
    indices = [_index(port.interface) for port in ports]
    for index in indices:
        maps.add_port(index, leaving)
    for native in {"auto": (True, False), "native": (True,), "generic": (False,)}[mode]:
        held: list[int] = []
        try:
            for index in indices:
                attach(index, entering, native=native)
                held.append(index)
            return "native" if native else "generic"
        except EvenkeelError:
            for index in held:
                detach(index)
            if mode != "auto" or not native:
                raise
    raise AssertionError("one mode is tried")


def _check_ports(ports: Sequence[Port]) -> None:
    for port in ports:
        try:
            _index(port.interface)
        except OSError:
            there = ", ".join(name for _, name in socket.if_nameindex() if name != "lo") or "none"
            raise ConfigurationError(
                f"hosts: there is no interface {port.interface!r} here; there are: {there}"
            ) from None
    for what, values in (
        ("interface", [port.interface for port in ports]),
        ("address", [port.address for port in ports]),
    ):
        if len(set(values)) != len(values):
            raise ConfigurationError(f"hosts: an {what} is there twice")
    for name in names():
        other = find_deployment(name)
        if other is not None and not other.namespace:
            shared = {port.interface for port in ports} & {port.interface for port in other.ports}
            if shared:
                raise ConfigurationError(f"hosts: switch {name} is on {', '.join(sorted(shared))} already")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"name: must be 1 to 12 small letters and digits, found {name!r}")


def _index(interface: str) -> int:
    return socket.if_nametoindex(interface)


def _state_file(name: str) -> Path:
    return _STATES / f"switch-{name}.json"


def _write_state(deployment: Deployment) -> None:
    _STATES.mkdir(mode=0o755, parents=True, exist_ok=True)
    file = _state_file(deployment.name)
    half = file.with_suffix(".half")
    written: dict[str, Any] = asdict(deployment)
    half.write_text(json.dumps(written, indent=1))
    os.replace(half, file)


def _ip(*arguments: str) -> None:
    command = ("ip", *arguments)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SwitchError(f"`{' '.join(command)}` cannot be run: {error}") from error
    if done.returncode:
        raise SwitchError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
