"""Defines the packets of in-network aggregation and parses them; `native/packet.h` is the same in C.

A packet is the payload of one UDP datagram: a header of 32 bytes and the payload's words of 8 bytes, all little-endian.

    0   2  magic 0x4b45                16  4  job
    2   1  version 1                   20  4  fragment
    3   1  kind                        24  4  bitmap of workers
    4   1  lane type                   28  4  epoch
    5   1  priority
    6   2  words of payload
    8   8  token of the job

The payload is *raw* lanes, as a worker sends them, or *sums* of them. Raw lanes of 4 bits become sums of 8; the other
types have one width. Lanes are unsigned and fill the words from the lowest bit on; a fragment that is not full is
padded with zeros. No sum may carry from a lane into the next, so `workers * largest` is bounded for each type.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

from evenkeel.errors import ConfigurationError, PacketError

__all__ = [
    "HEADER_BYTES",
    "MAX_JOBS",
    "MAX_WORDS",
    "MAX_WORKERS",
    "VERSION",
    "WORDS_1500",
    "WORDS_3498",
    "Kind",
    "LaneType",
    "Packet",
    "Reason",
    "check_bound",
    "parse",
    "words_for_mtu",
    "write",
]

MAGIC = 0x4B45
VERSION = 1
HEADER_BYTES = 32
MAX_JOBS = 256  # job numbers are 0..255: the switch keeps its jobs in an array
MAX_WORKERS = 32  # bits of the bitmap
WORDS_1500 = 180  # of payload in an IP packet of at most 1,500 bytes, the ordinary MTU
WORDS_3498 = 428  # of at most 3,498: the largest that XDP takes whole on a veth pair
MAX_WORDS = WORDS_3498

_HEADER = struct.Struct("<HBBBBHQIIII")
_IP_UDP_BYTES = 28


class Kind(IntEnum):
    """Says what a packet is.

    ATP's flags are kinds here, as no two of them make sense together. Its COLLISION is none: a gradient for which there
    was no slot reaches the server as it was sent.
    """

    GRADIENT = 1  # worker to switch: raw lanes of one worker, to be added
    RESEND = 2  # worker to switch: the same again; never left in a slot, and takes along what the slot holds
    REMINDER = 3  # server to switch: give out what you hold of this fragment; any words are room for the answer
    NACK = 4  # server to workers: those in the bitmap are asked to resend, or to say the result if they have it
    RESULT = 5  # switch or server to workers and server, or a worker to the server: sums of all in the bitmap
    PARTIAL = 6  # switch to server: sums of those in the bitmap, which left the switch's memory
    CONTROL = 7  # between hosts and whoever runs the switch; no part of the rule


_RAW = frozenset({Kind.GRADIENT, Kind.RESEND})


class LaneType(IntEnum):
    """Says how lanes are written."""

    NONE = 0  # of CONTROL only
    NIBBLES = 1  # 4 bits up, 8 bits down: numbers 0 to 15
    THC = 2  # 4 bits up, 8 bits down: places in THC's table 0, 2, 3, ... 15, 17, whose numbers are added
    BYTES = 3
    SHORTS = 4  # 16 bits
    INTS = 5  # 32 bits

    @property
    def raw_bits(self) -> int:
        """Counts the bits of a raw lane."""
        return 4 if self in (LaneType.NIBBLES, LaneType.THC) else self.sum_bits

    @property
    def sum_bits(self) -> int:
        """Counts the bits of a sum."""
        return {LaneType.SHORTS: 16, LaneType.INTS: 32}.get(self, 8)

    @property
    def most(self) -> int | None:
        """Gives the largest number that a raw lane can stand for by its form; None where the job says."""
        return {LaneType.NIBBLES: 15, LaneType.THC: 17}.get(self)


class Reason(IntEnum):
    """Says why a packet was dropped; counted by the switch under these names."""

    SHORT = 1  # fewer bytes than a header
    MAGIC = 2  # not a packet of ours
    VERSION = 3  # of another version
    KIND = 4  # unknown, or of a kind that no switch takes
    LANE_TYPE = 5  # unknown, or not the job's
    LENGTH = 6  # not as long as it says, or not as long as the job's
    BITMAP = 7  # not as many workers as its kind has, or some that the job does not have
    JOB = 8  # no such job
    TOKEN = 9  # not the job's
    SENDER = 10  # comes from somebody who may not send this
    EPOCH = 11  # from before a restart
    BOUND = 12  # a lane is larger than the job's largest
    DUPLICATE = 13  # this worker is in the sum already
    STALE = 14  # the slot has gone on to later fragments


@dataclass(frozen=True, slots=True)
class Packet:
    """Holds one packet's fields; see the module for its layout.

    Attributes:
        kind: what it is.
        lanes: how its lanes are written.
        job: number of the job, 0 to 255.
        token: the job's secret, which outsiders do not know.
        fragment: number of the fragment; grows, and wraps at 2**32.
        bitmap: bit w is set for worker w.
        epoch: grows when a worker restarts with other gradients; sums of two epochs never mix.
        priority: more is more urgent; see `priority`.
        payload: a multiple of 8 bytes.
    """

    kind: Kind
    lanes: LaneType
    job: int
    token: int
    fragment: int
    bitmap: int = 0
    epoch: int = 0
    priority: int = 0
    payload: bytes = b""


def write(packet: Packet) -> bytes:
    """Gives the packet's bytes. Only what `parse` would take may be given."""
    return (
        _HEADER.pack(
            MAGIC,
            VERSION,
            packet.kind,
            packet.lanes,
            packet.priority,
            len(packet.payload) // 8,
            packet.token,
            packet.job,
            packet.fragment,
            packet.bitmap,
            packet.epoch,
        )
        + packet.payload
    )


def parse(data: bytes) -> Packet:
    """Reads a packet from the payload of a datagram.

    Raises:
        PacketError: it is none; `reason` says why, the first that applies in the order of `Reason`.
    """
    if len(data) < HEADER_BYTES:
        raise PacketError(Reason.SHORT, f"a packet has {HEADER_BYTES} bytes of header, found {len(data)} bytes")
    magic, version, kind, lanes, priority, words, token, job, fragment, bitmap, epoch = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise PacketError(Reason.MAGIC, f"the first two bytes are {magic:#06x}, not {MAGIC:#06x}")
    if version != VERSION:
        raise PacketError(Reason.VERSION, f"version {version} is not known, only {VERSION}: update the older side")
    if not Kind.GRADIENT <= kind <= Kind.CONTROL:
        raise PacketError(Reason.KIND, f"kind {kind} is not known")
    if lanes > LaneType.INTS or (lanes == LaneType.NONE) != (kind == Kind.CONTROL):
        raise PacketError(Reason.LANE_TYPE, f"lane type {lanes} does not go with a packet of kind {Kind(kind).name}")
    if words > MAX_WORDS or len(data) != HEADER_BYTES + 8 * words:
        raise PacketError(Reason.LENGTH, f"{len(data)} bytes, but the header says {words} words of payload")
    if (words == 0) != (kind == Kind.NACK) and kind not in (Kind.REMINDER, Kind.CONTROL):
        raise PacketError(Reason.LENGTH, f"{words} words of payload in a packet of kind {Kind(kind).name}")
    bits = bitmap.bit_count()
    if not (bits == 1 if kind in _RAW else bits == 0 if kind == Kind.REMINDER else bits > 0 or kind == Kind.CONTROL):
        raise PacketError(Reason.BITMAP, f"{bits} workers in a packet of kind {Kind(kind).name}")
    payload = bytes(data[HEADER_BYTES:])
    return Packet(Kind(kind), LaneType(lanes), job, token, fragment, bitmap, epoch, priority, payload)


def check_bound(lanes: LaneType, workers: int, largest: int) -> None:
    """Refuses a job whose sums could carry from a lane into the next.

    Args:
        lanes: how they are written.
        workers: how many add.
        largest: number that a raw lane stands for at most, as far as it is added.

    Raises:
        ConfigurationError: more workers than the bitmap or the lanes hold.
    """
    if not 1 <= workers <= MAX_WORKERS:
        raise ConfigurationError(f"workers: a packet's bitmap holds 1 to {MAX_WORKERS} workers, found {workers}")
    if lanes == LaneType.NONE:
        raise ConfigurationError("lanes: a job needs a lane type")
    if largest < 1 or (lanes.most is not None and largest != lanes.most):
        raise ConfigurationError(
            f"largest: must be {lanes.most or 'at least 1'} for {lanes.name} lanes, found {largest}"
        )
    top = (1 << lanes.sum_bits) - 1
    if workers * largest > top:
        raise ConfigurationError(
            f"sums of {workers} workers' {lanes.name} lanes up to {largest} do not fit {lanes.sum_bits} bits: "
            f"use at most {top // largest} workers, or wider lanes"
        )


def words_for_mtu(mtu: int) -> int:
    """Gives how many words of payload fit into an IP packet of `mtu` bytes, an even number.

    Raises:
        ConfigurationError: too few for a packet, or more than XDP takes.
    """
    words = (mtu - _IP_UDP_BYTES - HEADER_BYTES) // 16 * 2
    if not 2 <= words <= MAX_WORDS:
        raise ConfigurationError(f"mtu: must be 76 to 3498 bytes, found {mtu}")
    return words
