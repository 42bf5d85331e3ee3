"""Runs a worker's side of the transport: joins a job, and exchanges fragments for their sums. No torch here."""

import contextlib
import ctypes
import secrets
import socket
import time
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from evenkeel.errors import ConfigurationError
from evenkeel.switch.build import load
from evenkeel.switch.terms import Control, Shape, Terms, Welcome, ask_shape, hello, read_control, read_shape

__all__ = ["HostCounters", "HostTerms", "StepEnd", "SwitchHost", "resolve", "shape_of", "typed", "unpack_table"]

_HELLO_AGAIN_S = 0.1
_MAX_SERVERS = 16


class StepEnd(IntEnum):
    """Says how a step of an exchange ended."""

    FINISHED = 0
    GOES_ON = 1
    SILENT = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class HostCounters:
    """Counts what went over a worker's socket; the last two are as they are now."""

    sent_packets: int
    sent_bytes: int
    received_packets: int
    received_bytes: int
    resent: int
    queries: int
    stale: int
    bad: int
    window: int
    round_trip_ns: int


class HostTerms(ctypes.Structure):
    """Mirrors `struct terms`."""

    _fields_ = (
        *((name, c_uint32) for name in ("job", "epoch", "worker", "world", "lane_type", "up_bytes", "down_bytes")),
        *((name, c_uint32) for name in ("at_least", "window", "span")),
        ("token", c_uint64),
        ("silence_ns", c_uint64),
    )


class SwitchHost:
    """Speaks for one worker of one job. All its methods but `get` are for one thread.

    Args:
        servers: addresses of those who add, IPv4 and port; fragment f goes to server f % len(servers).
        terms: of the job, the same on all workers but for the worker's number.
        silence_s: how long a server may be silent while it owes something.

    Raises:
        ConfigurationError: no server, too many, or no compiler for the C parts.

    Attributes:
        number: by which the job's packets go; None until a server has said it.
        epoch: of the numbers that are sent.
        sum_bits: in which sums come; 0: as lanes.
        down_bytes: of a fragment's sums.
    """

    def __init__(self, servers: Sequence[tuple[str, int]], terms: Terms, *, silence_s: float = 1.0) -> None:
        if not 1 <= len(servers) <= _MAX_SERVERS:
            raise ConfigurationError(f"servers: one to {_MAX_SERVERS} can share the work, found {len(servers)}")
        self.servers = list(servers)
        self.terms = terms
        self.number: int | None = None
        self.epoch = 0
        self._silence_ns = int(silence_s * 1e9)
        self._library = _library()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("0.0.0.0" if any(not host.startswith("127.") for host, _ in servers) else "127.0.0.1", 0))
        self._handle: int | None = None
        self._low = self._fragments = 0
        self._held: tuple[object, ...] = ()  # what C reads and writes
        self.sum_bits = 0
        self.down_bytes = 0

    def hello(self, wait_s: float) -> bool:
        """Joins the job at every server; False where one of them did not answer in time.

        Raises:
            ConfigurationError: a server refused; the message says why.
        """
        terms, until = self.terms, time.monotonic() + wait_s
        low, sent = self._low, (self._low + self._fragments) & 0xFFFFFFFF
        waiting = dict.fromkeys(self.servers)
        welcomes: list[Welcome] = []
        while waiting:
            if time.monotonic() > until:
                self._socket.setblocking(True)
                return False
            for server in waiting:
                shard = self.servers.index(server)
                with contextlib.suppress(OSError):  # unreachable for now: silent
                    self._socket.sendto(
                        hello(terms, self.number, self.epoch, sent, low, len(self.servers), shard), server
                    )
            again = min(until, time.monotonic() + _HELLO_AGAIN_S)
            while waiting and (left := again - time.monotonic()) > 0:
                self._socket.settimeout(max(left, 1e-3))
                try:
                    answer, server = self._socket.recvfrom(65536)
                except TimeoutError:
                    break
                except OSError:
                    continue  # nobody listens there
                found = read_control(answer, terms, self.epoch)
                if found is None or server not in waiting:
                    continue
                word, body = found
                if word == Control.REFUSED:
                    why = body[:200].decode("utf-8", "replace")
                    raise ConfigurationError(f"the switch at {server[0]}:{server[1]} refused this job: {why}")
                if word == Control.WELCOME and (welcome := Welcome.read(body)) is not None:
                    welcomes.append(welcome)
                    del waiting[server]
        if len({(welcome.sum_bits, welcome.job) for welcome in welcomes}) > 1:
            raise ConfigurationError("servers: some are switches and some are parameter servers; use one kind")
        self._socket.setblocking(True)
        self.number = welcomes[0].job
        self._settle(welcomes[0].sum_bits, min(welcome.span for welcome in welcomes))
        return True

    def begin(
        self, message: NDArray[np.uint8], first: int, priority: int = 128
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """Begins an exchange; gives the sums' bytes and who is in each fragment, to be filled in.

        Args:
            message: whole fragments.
            first: number of its first fragment, the same on all workers.
            priority: of all its fragments, 1 to 255.
        """
        fragments = message.size // self.terms.up_bytes
        totals = np.empty(fragments * self.down_bytes, np.uint8)
        bitmaps = np.zeros(fragments, np.uint32)
        assert self._handle is not None
        self._held = message, totals, bitmaps
        self._low, self._fragments = first, fragments
        if self._library.host_begin(
            self._handle, message.ctypes.data, totals.ctypes.data, bitmaps.ctypes.data, first, fragments, priority
        ):
            raise MemoryError(f"no room for an exchange of {fragments} fragments")
        return totals, bitmaps

    def step(self, slice_s: float) -> StepEnd:
        """Goes on with the exchange for so long."""
        return StepEnd(self._library.host_step(self._handle, int(slice_s * 1e9)))

    def anew(self, epoch: int | None = None) -> None:
        """Sends again all that has no result yet, after a `hello` to servers that had forgotten the job."""
        self.epoch = self.epoch if epoch is None else epoch
        if self._handle is not None:
            self._library.host_anew(self._handle, self.epoch)

    def missing(self, most: int = 256) -> list[int]:
        """Lists fragments of the exchange whose sums are missing."""
        found = (c_uint32 * most)()
        return list(found[: self._library.host_missing(self._handle, found, most)])

    def put(self, fragment: int, bitmap: int, total: bytes) -> bool:
        """Puts a sum in place that came another way; True if it was missing."""
        if len(total) != self.down_bytes:
            return False
        return bool(self._library.host_put(self._handle, fragment, bitmap, total))

    def get(self, fragment: int) -> tuple[int, bytes] | None:
        """Gives who is in a fragment of the exchange, and its sum, if it is here. Another thread may be in `step`."""
        bitmap, total = c_uint32(), ctypes.create_string_buffer(max(1, self.down_bytes))
        if self._handle is None or not self._library.host_get(self._handle, fragment, byref(bitmap), total):
            return None
        return bitmap.value, total.raw[: self.down_bytes]

    def counters(self) -> HostCounters:
        """Counts what was sent and received so far."""
        if self._handle is None:
            return HostCounters(*[0] * len(HostCounters.__slots__))
        count = c_int()
        found = self._library.host_counters(self._handle, byref(count))
        return HostCounters(*found[: count.value])

    def close(self) -> None:
        """Closes the socket."""
        if self._handle is not None:
            self._library.host_close(self._handle)
            self._handle = None
        self._socket.close()

    def _settle(self, sum_bits: int, span: int) -> None:
        """Opens the C side, once it is known how sums are written."""
        terms = self.terms
        if self._handle is not None:
            if sum_bits != self.sum_bits:
                raise ConfigurationError("the server that is there now writes sums otherwise than the one before")
            self._library.host_renumber(self._handle, self.number)
            return
        self.sum_bits, self.down_bytes = sum_bits, terms.down_bytes(sum_bits)
        packed = HostTerms(
            *(
                terms.job if self.number is None else self.number,
                self.epoch,
                terms.worker,
                terms.world,
                terms.lane_type,
                terms.up_bytes,
                self.down_bytes,
            ),
            *(terms.at_least, terms.window, span, terms.token, self._silence_ns),
        )
        addresses = (c_uint32 * len(self.servers))(
            *(int.from_bytes(socket.inet_aton(host), "big") for host, _ in self.servers)
        )
        ports = (c_uint16 * len(self.servers))(*(port for _, port in self.servers))
        self._handle = self._library.host_open(
            self._socket.fileno(), addresses, ports, len(self.servers), byref(packed)
        )
        if not self._handle:
            raise MemoryError("no room for the transport's buffers")


def resolve(text: str) -> tuple[str, int]:
    """Finds the address that `host:port` names.

    Raises:
        ConfigurationError: it is not of that form, or there is no such host.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"switch: an address is host:port, such as 10.0.0.1:9700, found {text!r}")
    try:
        found = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_DGRAM)
    except OSError as error:
        raise ConfigurationError(f"switch: {host!r} cannot be found: {error.strerror or error}") from error
    address, number = found[0][4][:2]
    return str(address), int(number)


def shape_of(server: tuple[str, int], wait_s: float) -> Shape | None:
    """Asks a server what fragments its switch adds; None if it does not answer."""
    nonce, until = secrets.randbits(64), time.monotonic() + wait_s
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        while (left := until - time.monotonic()) > 0:
            try:
                asking.sendto(ask_shape(nonce), server)
                asking.settimeout(min(left, _HELLO_AGAIN_S))
                found = read_shape(asking.recv(65536), nonce)
            except TimeoutError:
                continue
            except OSError:  # unreachable for now
                time.sleep(min(left, _HELLO_AGAIN_S))
                continue
            if found is not None:
                return found
    return None


def unpack_table(packed: NDArray[np.uint8], table: NDArray[np.uint8], bits: int, lanes: int) -> NDArray[np.uint8]:
    """Reads places of `bits` bits, up to 8, in a table, and gives its numbers."""
    found = np.empty(lanes, np.uint8)
    _library().host_unpack(packed.ctypes.data, table.ctypes.data, bits, found.ctypes.data, lanes)
    return found


@cache
def _library() -> ctypes.CDLL:
    return typed(load("host"))


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Says what the functions of `native/host.c` take and give."""
    library.host_open.restype = c_void_p
    library.host_open.argtypes = c_int, POINTER(c_uint32), POINTER(c_uint16), c_int, POINTER(HostTerms)
    library.host_close.argtypes = (c_void_p,)
    library.host_renumber.argtypes = c_void_p, c_uint32
    library.host_begin.argtypes = c_void_p, c_void_p, c_void_p, c_void_p, c_uint32, c_uint32, c_uint32
    library.host_step.argtypes = c_void_p, c_uint64
    library.host_anew.argtypes = c_void_p, c_uint32
    library.host_missing.argtypes = c_void_p, POINTER(c_uint32), c_int
    library.host_put.argtypes = c_void_p, c_uint32, c_uint32, c_char_p
    library.host_get.argtypes = c_void_p, c_uint32, POINTER(c_uint32), c_char_p
    library.host_unpack.argtypes = c_void_p, c_void_p, c_int, c_void_p, c_uint64
    library.host_counters.argtypes = c_void_p, POINTER(c_int)
    library.host_counters.restype = POINTER(c_uint64)
    return library
