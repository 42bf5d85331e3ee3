"""Says what the workers of a job agree on: who they are, what a fragment holds, how long one waits."""

import struct
from dataclasses import dataclass
from enum import IntEnum

from evenkeel.errors import ConfigurationError, PacketError
from evenkeel.switch.packet import MAX_WORDS, MAX_WORKERS, Kind, LaneType, Packet, parse, words_for_mtu, write

__all__ = [
    "ANY_SHAPE",
    "THC_TABLE",
    "Control",
    "Shape",
    "Terms",
    "Welcome",
    "ask_shape",
    "control_packet",
    "fit_terms",
    "hello",
    "read_control",
    "read_shape",
]

_CONTROL = struct.Struct("<II")
_HELLO = struct.Struct("<8IQ6I256s")
_NO_NUMBER = 0xFFFFFFFF
_WELCOME = struct.Struct("<QIIII")
_SHAPE = struct.Struct("<II")
_LANE_STEP = 64  # so many lanes of any width are whole words

# What the four-bit places of THC's default table stand for: the data plane adds 1 twice, and looks nothing up.
THC_TABLE = tuple(place + (place > 0) + (place == 15) for place in range(16))


@dataclass(frozen=True, slots=True)
class Terms:
    """Holds what all workers of a job say to the servers in the same words, but for the worker's own number.

    Attributes:
        job: name of the job among its workers.
        token: known to its workers only.
        worker: number of this one.
        world: how many there are.
        lane_type: how lanes are written.
        lanes: in a fragment.
        sum_bits: in which a server that can will write each sum; 0: as lanes.
        map: of each sum from 0 to 255, what is written for it; None: the sum itself.
        deadline_s: after which a fragment ends without those who are late; 0: never.
        at_least: how many must be in it then; 0 without a deadline.
        window: most fragments under way.
    """

    job: int
    token: int
    worker: int
    world: int
    lane_type: LaneType
    lanes: int
    sum_bits: int = 0
    map: bytes | None = None
    deadline_s: float = 0.0
    at_least: int = 0
    window: int = 512

    @property
    def up_bytes(self) -> int:
        """Counts the bytes of a fragment's lanes on their way up."""
        return self.lanes * self.lane_type.raw_bits // 8

    def down_bytes(self, sum_bits: int) -> int:
        """Counts the bytes of a fragment's sums on their way down."""
        return self.lanes * (sum_bits or self.lane_type.sum_bits) // 8


class Control(IntEnum):
    """Says what a CONTROL packet is; `native/control.h` has the same."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    QUERY = 4
    LACKING = 5
    ALIVE = 6
    ASK = 7
    SHAPE = 8


@dataclass(frozen=True, slots=True)
class Welcome:
    """Holds what a server says to a worker that joins.

    Attributes:
        boot: changes when the server is started again.
        span: how far a worker may be ahead of its first missing sum, in fragments.
        sum_bits: in which sums come; 0: as lanes.
        job: by which number the job's packets go from now on.
    """

    boot: int
    span: int
    sum_bits: int
    job: int

    @classmethod
    def read(cls, body: bytes) -> "Welcome | None":
        """Reads it; None if it is too short."""
        return cls(*_WELCOME.unpack_from(body)[:4]) if len(body) >= _WELCOME.size else None


@dataclass(frozen=True, slots=True)
class Shape:
    """Says what fragments a server's switch adds.

    Attributes:
        words: that the sums of a fragment must have; 0: any number.
        bytes_only: whether lanes of 4 bits are not added.
    """

    words: int = 0
    bytes_only: bool = False


ANY_SHAPE = Shape()


def control_packet(terms: Terms, epoch: int, word: Control, count: int, body: bytes) -> bytes:
    """Writes a CONTROL packet of a worker, about the job of this name."""
    payload = _payload(word, count, body)
    return write(
        Packet(Kind.CONTROL, LaneType.NONE, terms.job, terms.token, 0, 1 << terms.worker, epoch, payload=payload)
    )


def ask_shape(nonce: int) -> bytes:
    """Writes the packet that asks a server for its shape; the answer has the same nonce."""
    return write(Packet(Kind.CONTROL, LaneType.NONE, 0, nonce, 0, payload=_payload(Control.ASK, 0, b"")))


def read_shape(data: bytes, nonce: int) -> Shape | None:
    """Reads the answer; None if it is something else."""
    found = _read(data)
    if found is None or found[0].token != nonce or found[1] != Control.SHAPE or len(found[2]) < _SHAPE.size:
        return None
    words, bytes_only = _SHAPE.unpack_from(found[2])
    return Shape(words, bool(bytes_only)) if words <= MAX_WORDS else None


def read_control(data: bytes, terms: Terms, epoch: int) -> tuple[Control, bytes] | None:
    """Reads what a server says about the job of this name in this epoch; None if it is something else."""
    found = _read(data)
    if found is None or (found[0].job, found[0].token, found[0].epoch) != (terms.job, terms.token, epoch):
        return None
    return found[1:]


def _payload(word: Control, count: int, body: bytes) -> bytes:
    payload = _CONTROL.pack(word, count) + body
    return payload + bytes(-len(payload) % 8)


def _read(data: bytes) -> tuple[Packet, Control, bytes] | None:
    try:
        packet = parse(data)
    except PacketError:
        return None
    if packet.kind != Kind.CONTROL:
        return None
    if len(packet.payload) < _CONTROL.size:
        return None
    word, count = _CONTROL.unpack_from(packet.payload)
    if word not in Control._value2member_map_:
        return None
    body = packet.payload[_CONTROL.size :]
    return packet, Control(word), body[:count] if word in (Control.REFUSED, Control.WELCOME) else body


def hello(terms: Terms, number: int | None, epoch: int, sent: int, low: int, shards: int, shard: int) -> bytes:
    """Writes the packet by which a worker joins a job.

    Args:
        terms: of the job.
        number: by which its packets go, if a server has said so.
        epoch: of the numbers that it sends.
        sent: it has sent no fragment from this one on.
        low: it has the sums of all fragments below this one.
        shards: how many servers share the fragments.
        shard: which of them is spoken to.
    """
    body = _HELLO.pack(
        *(terms.world, terms.worker, terms.lanes, terms.lane_type, terms.sum_bits, int(terms.map is not None)),
        *(terms.at_least, terms.window, int(terms.deadline_s * 1e9), sent, low, shards, shard),
        *(_NO_NUMBER if number is None else number, 0, terms.map or b""),
    )
    return control_packet(terms, epoch, Control.HELLO, len(body), body)


def fit_terms(
    table: tuple[int, ...] | None,
    up_width: int,
    down_width: int,
    world: int,
    granule: int,
    mtu: int,
    sum_bits: int,
    shape: Shape = ANY_SHAPE,
) -> tuple[LaneType, int, int]:
    """Chooses how a wire's lanes travel, how many make a fragment, and how many of these are filled.

    Args:
        table: numbers that the lanes are places in; None: lanes are the numbers.
        up_width: bits of a lane of a message.
        down_width: bits of a sum over `world` messages.
        world: how many workers.
        granule: lanes that must not be cut: 1 where any may be.
        mtu: most bytes of an IP packet.
        sum_bits: in which sums come down; 0: as lanes.
        shape: what fragments the switch adds.

    Raises:
        ConfigurationError: too many workers, or a granule or the switch's fragments do not fit into a packet.
    """
    if world > MAX_WORKERS:
        raise ConfigurationError(f"a switch adds for at most {MAX_WORKERS} workers, found {world}: use shares")
    if table == THC_TABLE and down_width <= 8 and not shape.bytes_only:
        lane_type = LaneType.THC
    elif up_width == 4 and down_width <= 8 and table in (None, tuple(range(16))) and not shape.bytes_only:
        lane_type = LaneType.NIBBLES
    else:
        lane_type = LaneType.BYTES if down_width <= 8 else LaneType.SHORTS if down_width <= 16 else LaneType.INTS
    if shape.words:
        if shape.words > words_for_mtu(mtu):
            raise ConfigurationError(
                f"the switch adds fragments of {shape.words} words, and packets of at most {mtu} bytes hold "
                f"{words_for_mtu(mtu)}: give SwitchReducer the mtu that the switch was started with"
            )
        most = whole = 64 * shape.words // lane_type.sum_bits
    else:
        # Before a server packs sums it holds them as lanes, in as many words as a packet may have at most.
        room = 64 * words_for_mtu(mtu)
        most = min(
            room // max(lane_type.raw_bits, sum_bits or lane_type.sum_bits), 64 * MAX_WORDS // lane_type.sum_bits
        )
        whole = most // _LANE_STEP * _LANE_STEP
    if granule > 1:
        filled = most // granule * granule
        if not filled or granule % _LANE_STEP:
            raise ConfigurationError(
                f"with a deadline a block of the code must fit into one packet, of {most} lanes here, but it has "
                f"{granule}: give the code a smaller one, such as THC(block=1024)"
            )
        return lane_type, whole if shape.words else filled, filled
    return lane_type, whole, whole
