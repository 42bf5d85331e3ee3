"""Lays an image's restart intervals into packets, and reads them: which goes where, parity, seals.

A packet is `kind, image, index, count, left | body | seal`. Neighbouring intervals go to different packets, so that a
lost packet leaves scattered holes; which ones follows from the numbers, and need not be said. The seal is a keyed
BLAKE2s over the rest, with another key in each direction and in each session: a packet that is forged, sent back, or
kept from an earlier session does not open.
"""

import hashlib
import hmac
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise

from evenkeel.errors import ProtocolError

__all__ = [
    "MAX_PACKETS",
    "MAX_PAYLOAD",
    "MIN_PAYLOAD",
    "OVERHEAD",
    "ImagePacket",
    "PacketKind",
    "Seal",
    "interval_numbers",
    "laid_out",
    "read_intervals",
    "recovered",
    "session_keys",
]

MIN_PAYLOAD, MAX_PAYLOAD = 100, 1200
MAX_PACKETS = 4096  # of one image
_HEAD = struct.Struct(">BIHHH")
_LENGTH = struct.Struct(">H")
_SEAL_BYTES = 8
OVERHEAD = _HEAD.size + _SEAL_BYTES
_LONG = 0x80  # of an interval's length: it has two bytes
_MAX_LENGTH = 0x7FFF


class PacketKind(IntEnum):
    """Says what a packet is for."""

    HELLO = 1
    WELCOME = 2
    REFUSAL = 3
    PING = 4
    PONG = 5
    DATA = 6
    PARITY = 7
    ASK = 8
    MISSING = 9
    ANSWER = 10


@dataclass(frozen=True, slots=True)
class ImagePacket:
    """Holds a packet that was opened.

    Attributes:
        kind: what it is for.
        image: the number of its image in the session.
        index: its place among the image's packets of its kind.
        count: how many data packets the image has.
        left: tenths of a millisecond from when it was sent until the image must be decoded.
        body: the rest.
    """

    kind: PacketKind
    image: int = 0
    index: int = 0
    count: int = 0
    left: int = 0
    body: bytes = b""


class Seal:
    """Closes packets with a key, and opens those that were closed with it."""

    def __init__(self, key: bytes) -> None:
        self._key = hashlib.blake2s(key, person=b"evklossy").digest()

    def close(self, packet: ImagePacket) -> bytes:
        """Gives the packet's bytes."""
        said = _HEAD.pack(packet.kind, packet.image, packet.index, packet.count, packet.left) + packet.body
        return said + self._of(said)

    def open(self, data: bytes) -> ImagePacket:
        """Reads a packet's bytes.

        Raises:
            ProtocolError: its seal is not this one's, or it is no packet.
        """
        if not OVERHEAD <= len(data) <= MAX_PAYLOAD:
            raise ProtocolError(f"a packet has {OVERHEAD} to {MAX_PAYLOAD} bytes, found {len(data)}")
        said, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
        if not hmac.compare_digest(self._of(said), seal):
            raise ProtocolError("a packet whose seal is another key's")
        kind, image, index, count, left = _HEAD.unpack_from(said)
        try:
            return ImagePacket(PacketKind(kind), image, index, count, left, said[_HEAD.size :])
        except ValueError:
            raise ProtocolError(f"a packet of unknown kind {kind}") from None

    def _of(self, said: bytes) -> bytes:
        return hashlib.blake2s(said, key=self._key, digest_size=_SEAL_BYTES).digest()


def session_keys(key: bytes, of_client: bytes, of_server: bytes) -> tuple[bytes, bytes]:
    """Gives a session's keys, from client to server and back, from the shared key and what either side drew."""
    shared = hashlib.blake2s(key, person=b"evkshare").digest()
    there, back = (
        hashlib.blake2s(role + of_client + of_server, key=shared).digest() for role in (b"client", b"server")
    )
    return there, back


@lru_cache(maxsize=256)
def interval_numbers(columns: int, intervals: int, packets: int) -> tuple[tuple[int, ...], ...]:
    """Gives the numbers of the intervals in each of an image's packets.

    Args:
        columns: intervals in a row of the image, about.
        intervals: of the image.
        packets: of the image.
    """

    # A lattice of two badly approximable numbers: intervals that come close to each other in this order are far from
    # each other in the image. Packets take equal shares of it, so that none has two long intervals and another none.
    def place(number: int) -> float:
        row, column = divmod(number, columns)
        return (row * 0.5698402909980532 + column * 0.7548776662466927) % 1.0

    order = sorted(range(intervals), key=place)
    edges = [packet * intervals // packets for packet in range(packets + 1)]
    return tuple(tuple(sorted(order[start:end])) for start, end in pairwise(edges))


def laid_out(intervals: Sequence[bytes], columns: int, payload: int, parity: float) -> tuple[list[bytes], list[bytes]]:
    """Gives the bodies of an image's data packets, as few as will do, and of its parity packets.

    An interval that is too long for a packet of its own is left out: at the other end it is a hole like any other.

    Args:
        intervals: of the image.
        columns: intervals in a row of the image, about.
        payload: bytes of a packet at most, with all that is around its body.
        parity: parity packets for each data packet; 0: none.
    """
    room = payload - OVERHEAD - (2 * _LENGTH.size if parity else 0)
    entries = [_entry(one) for one in intervals]
    entries = [one if len(one) <= room else b"\0" for one in entries]
    packets = max(1, -(-sum(map(len, entries)) // room))
    while True:
        places = interval_numbers(columns, len(entries), packets)
        bodies = [b"".join([entries[number] for number in one]) for one in places]
        if max(map(len, bodies)) <= room:
            break
        if packets >= min(len(entries), MAX_PACKETS):
            entries = [b"\0" if len(one) == max(map(len, entries)) else one for one in entries]
        else:
            packets = min(len(entries), MAX_PACKETS, packets + 1 + packets // 16)
    groups = min(packets, math.ceil(parity * packets))
    head = _LENGTH.pack(groups)
    return bodies, [head + _parity([_framed(body) for body in bodies[group::groups]]) for group in range(groups)]


def read_intervals(body: bytes, numbers: Sequence[int]) -> dict[int, bytes]:
    """Reads the intervals of a data packet; those that were left out are not in the result.

    Raises:
        ProtocolError: the body does not hold so many intervals.
    """
    found, place = {}, 0
    for number in numbers:
        if place >= len(body):
            raise ProtocolError("a packet that ends early")
        length = body[place]
        place += 1
        if length & _LONG:
            if place >= len(body):
                raise ProtocolError("a packet that ends early")
            length = (length & ~_LONG) << 8 | body[place]
            place += 1
        if place + length > len(body):
            raise ProtocolError("a packet that ends early")
        if length:
            found[number] = body[place : place + length]
        place += length
    if place != len(body):
        raise ProtocolError("a packet with more in it than was agreed")
    return found


def recovered(count: int, bodies: Mapping[int, bytes], parities: Mapping[int, bytes]) -> dict[int, bytes]:
    """Gives the bodies of data packets that can be worked out: those that alone are missing in a parity packet's group.

    Args:
        count: data packets of the image.
        bodies: of those that are here.
        parities: of the parity packets that are here, which begin with how many there are.
    """
    found = {}
    for group, body in parities.items():
        groups, parity = int.from_bytes(body[: _LENGTH.size], "big"), body[_LENGTH.size :]
        if not group < groups <= count or len(parity) < _LENGTH.size:
            continue
        members = range(group, count, groups)
        missing = [index for index in members if index not in bodies]
        if len(missing) != 1:
            continue
        whole = _parity([parity, *(_framed(bodies[index]) for index in members if index in bodies)])
        length = int.from_bytes(whole[: _LENGTH.size], "big")
        if length <= len(whole) - _LENGTH.size:
            found[missing[0]] = whole[_LENGTH.size : _LENGTH.size + length]
    return found


def _entry(interval: bytes) -> bytes:
    length = len(interval)
    if length < _LONG:
        return bytes((length,)) + interval
    return (_LONG << 8 | min(length, _MAX_LENGTH)).to_bytes(2, "big") + interval


def _framed(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def _parity(framed: Sequence[bytes]) -> bytes:
    longest = max(map(len, framed))
    total = 0
    for one in framed:
        total ^= int.from_bytes(one.ljust(longest, b"\0"), "big")
    return total.to_bytes(longest, "big")
