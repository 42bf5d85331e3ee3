"""Asks DNS where nodes are, again and again: addresses of a name, or the hosts and ports of a service (SRV)."""

import asyncio
import ipaddress
import logging
import random
import socket
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from evenkeel.errors import BackendError
from evenkeel.serving.discovery.discovery import MAX_NODES, Discovery, OnFound

__all__ = ["DnsNames", "DnsServices", "read_srv", "write_question"]

_log = logging.getLogger(__name__)
_EVERY_S = 5.0
_MIN_EVERY_S, _MAX_EVERY_S = 1.0, 60.0  # whatever an answer's time to live says
_TIMEOUT_S = 5.0
_KEPT = 3  # answers in a row without an address, until its node leaves: large sets are answered in part, in turns
_SRV, _IN = 33, 1
_MAX_JUMPS = 32


class DnsNames(Discovery):
    """Looks up all addresses of a name.

    Args:
        host: the name.
        port: of the worker at each.
        every_s: between two look-ups.
    """

    def __init__(self, host: str, port: int, every_s: float = _EVERY_S) -> None:
        self._host, self._port, self._every_s = host, port, every_s

    async def watch(self, found: OnFound) -> None:
        """Calls `found` with the addresses of the last few answers."""
        seen = _Seen(found)
        while True:
            try:
                seen.answer(await self._look_up())
            except (OSError, TimeoutError, UnicodeError, BackendError) as error:
                seen.none(self._host, error)
            await asyncio.sleep(self._every_s)

    async def _look_up(self) -> list[str]:
        return await _addresses(self._host, self._port)


class DnsServices(Discovery):
    """Looks up the hosts and ports of a service, as `_evenkeel._tcp.example.org`, and the hosts' addresses.

    Args:
        name: of the service.
        servers: to ask; by default those of /etc/resolv.conf.
        port: of these servers.
    """

    def __init__(self, name: str, servers: Sequence[str] = (), port: int = 53) -> None:
        self._name, self._servers, self._port = name.rstrip("."), servers, port

    async def watch(self, found: OnFound) -> None:
        """Calls `found` with the addresses of the last few answers."""
        seen = _Seen(found)
        while True:
            every_s = _EVERY_S
            try:
                services, ttl_s = await self._ask()
                every_s = min(max(ttl_s, _MIN_EVERY_S), _MAX_EVERY_S)
                known = await asyncio.gather(
                    *(_addresses(host, port) for host, port in services), return_exceptions=True
                )
                seen.answer([one for each in known if isinstance(each, list) for one in each])
            except (OSError, TimeoutError, UnicodeError, BackendError) as error:
                seen.none(self._name, error)
            await asyncio.sleep(every_s)

    async def _ask(self) -> tuple[list[tuple[str, int]], float]:
        servers = self._servers or _servers()
        last: Exception = BackendError("no DNS server is configured")
        for server in servers:
            question = write_question(self._name, number := random.SystemRandom().getrandbits(16))
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    return read_srv(await _ask_udp(server, self._port, question), self._name, number)
            except (OSError, TimeoutError, BackendError) as error:
                last = error
        raise last


class _Seen:
    """Keeps addresses until a few answers in a row are without them; an empty answer is none."""

    def __init__(self, found: OnFound) -> None:
        self._found = found
        self._left: dict[str, int] = {}  # address -> answers without it until it is gone
        self._silent = False

    def answer(self, addresses: list[str]) -> None:
        if not addresses:
            raise BackendError("the answer holds no address")
        if self._silent:
            _log.info("DNS answers again")
            self._silent = False
        before = set(self._left)
        self._left = {address: left - 1 for address, left in self._left.items() if left > 1}
        self._left.update(dict.fromkeys(addresses[:MAX_NODES], _KEPT))
        if set(self._left) != before:
            self._found(list(self._left))

    def none(self, name: str, error: Exception) -> None:
        if not self._silent:
            _log.warning("DNS: no answer for %s (%s); nodes stay as they are", name, error or type(error).__name__)
            self._silent = True


async def _addresses(host: str, port: int) -> list[str]:
    async with asyncio.timeout(_TIMEOUT_S):
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = dict.fromkeys(str(address[0]) for _, _, _, _, address in found)
    return [f"tcp://[{one}]:{port}" if ":" in one else f"tcp://{one}:{port}" for one in hosts]


def _servers() -> list[str]:
    try:
        lines = Path("/etc/resolv.conf").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    servers = [line.split()[1] for line in lines if line.startswith("nameserver") and len(line.split()) > 1]
    return [server for server in servers if _is_address(server)][:3]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class _OneAnswer(asyncio.DatagramProtocol):
    def __init__(self, number: bytes) -> None:
        self._number = number
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if data[:2] == self._number and not self.answer.done():  # others are not to our question
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _ask_udp(server: str, port: int, question: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    # Connected, so that datagrams of nobody else are taken.
    make = partial(_OneAnswer, question[:2])
    transport, protocol = await loop.create_datagram_endpoint(make, remote_addr=(server, port))
    try:
        transport.sendto(question)
        answer = await protocol.answer
    finally:
        transport.close()
    if not answer[2] & 2:
        return answer
    reader, writer = await asyncio.open_connection(server, port)  # it was cut off: the whole comes over TCP
    try:
        writer.write(struct.pack("!H", len(question)) + question)
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError:
        raise BackendError("the server closed the connection") from None
    finally:
        writer.close()


def write_question(name: str, number: int) -> bytes:
    """Writes a question for the SRV records of a name.

    Raises:
        BackendError: it is no name.
    """
    labels = name.encode("idna" if not name.isascii() else "ascii").split(b".")
    if not all(0 < len(label) < 64 for label in labels) or sum(map(len, labels)) + len(labels) > 254:
        raise BackendError(f"{name!r} is no name of DNS")
    words = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + words + struct.pack("!2H", _SRV, _IN)


def read_srv(data: bytes, name: str, number: int) -> tuple[list[tuple[str, int]], float]:
    """Reads the hosts and ports of best priority in an answer, and for how many seconds they are good.

    Raises:
        BackendError: it is no proper answer to that question, or has no such records.
    """
    try:
        given, flags, questions, answers, _, _ = struct.unpack_from("!6H", data)
        if given != number or not flags & 0x8000 or questions != 1:
            raise BackendError("the answer is to another question")
        if flags & 0xF:
            raise BackendError("there is no such name" if flags & 0xF == 3 else f"the server says error {flags & 0xF}")
        asked, place = _read_name(data, 12)
        if asked.lower() != name.lower() or struct.unpack_from("!2H", data, place) != (_SRV, _IN):
            raise BackendError("the answer is to another question")
        place += 4
        found: list[tuple[int, str, int]] = []
        ttls: list[int] = []
        for _ in range(min(answers, MAX_NODES)):
            _, place = _read_name(data, place)
            kind, of, ttl, size = struct.unpack_from("!HHIH", data, place)
            place += 10
            if (kind, of) == (_SRV, _IN):
                priority, _, port = struct.unpack_from("!3H", data, place)
                host, _ = _read_name(data, place + 6)
                if port and host:
                    found.append((priority, host, port))
                    ttls.append(ttl)
            place += size
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise BackendError(f"the answer cannot be read: {error}") from None
    if not found:
        raise BackendError("the answer holds no service")
    best = min(priority for priority, _, _ in found)
    return [(host, port) for priority, host, port in found if priority == best], float(min(ttls))


def _read_name(data: bytes, place: int) -> tuple[str, int]:
    """Reads a name, which may go on elsewhere; gives it and the place behind it."""
    labels: list[bytes] = []
    behind = -1
    for _ in range(128 + _MAX_JUMPS):
        size = data[place]
        if size >= 0xC0:
            behind = place + 2 if behind < 0 else behind
            place = (size & 0x3F) << 8 | data[place + 1]
        elif size == 0:
            return b".".join(labels).decode("ascii"), place + 1 if behind < 0 else behind
        elif size > 63:
            break
        else:
            labels.append(data[place + 1 : place + 1 + size])
            place += 1 + size
    raise BackendError("a name in the answer has no end")
