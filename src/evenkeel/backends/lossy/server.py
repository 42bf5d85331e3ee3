"""Receives images that come in packets, decodes them in time from what is there, and has them answered.

An image is decoded as soon as all of it is here, or when the moment comes that its packets name. Until then, and as
long as a round trip still fits in, what is missing is asked for again. Nothing here does I/O: datagrams are handed in
and given to `send`, and time is a `Clock`'s.
"""

import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from math import ceil, log

from evenkeel.arrays import PixelArray
from evenkeel.backends.backend import Backend, Reply
from evenkeel.backends.lossy.conceal import conceal
from evenkeel.backends.lossy.messages import NONCE_BYTES, Greeting, LossyAnswer, model_digest, write_missing
from evenkeel.backends.lossy.packets import (
    MAX_PACKETS,
    MAX_PAYLOAD,
    OVERHEAD,
    ImagePacket,
    PacketKind,
    Seal,
    interval_numbers,
    read_intervals,
    recovered,
    session_keys,
)
from evenkeel.clock import Clock, Timer
from evenkeel.errors import ProtocolError

__all__ = ["LossyImage", "LossyServer", "ServerLimits", "answered_by"]

_TENTH_MS = 1e-4
_SLACK_S = 0.001  # that packets may come late, beside others of their image
_REMEMBERED = 1024  # images of a session that are known to be over
_MAX_ROUND_TRIP_S = 10.0
_LOSS_WEIGHT = 0.2  # of an image in the running mean of a session's loss
_ANSWERS_LOST = 0.02  # share of short answers that may be lost with all their copies
_MAX_COPIES = 6


@dataclass(frozen=True)
class ServerLimits:
    """Bounds what others can make the server do.

    Attributes:
        sessions: at a time; the one that has been silent for longest gives way.
        images: of a session that are being received or answered.
        bytes_per_s: of a session; what comes beyond is dropped.
        burst_bytes: that a session may send at once.
        wait_s: that packets of an image are waited for at most.
        answers: of a session that are kept, in case they get lost.
    """

    sessions: int = 64
    images: int = 32
    bytes_per_s: float = 8e6
    burst_bytes: float = 2e6
    wait_s: float = 5.0
    answers: int = 64


@dataclass(frozen=True)
class LossyImage:
    """Holds an image that came, perhaps in part.

    Attributes:
        model: that is asked.
        pixels: uint8 `[height, width, 3]`.
        lost: share of its blocks that did not come.
        exact: the model itself must answer, and nothing in its place.
    """

    model: str
    pixels: PixelArray
    lost: float
    exact: bool = False


AnswerImage = Callable[[LossyImage, Callable[[Reply], object]], object]


def answered_by(backend: Backend, layout: str = "NHWC") -> AnswerImage:
    """Gives what has images answered by a backend, whose models take UINT8 rows in that layout."""

    def answer(image: LossyImage, on_reply: Callable[[Reply], object]) -> None:
        pixels = image.pixels if layout == "NHWC" else image.pixels.transpose(2, 0, 1)
        backend.submit(image.model, pixels[None], on_reply)

    return answer


class LossyServer:
    """Serves sessions of `LossyBackend`s.

    Args:
        answer: has an image answered, and calls back once.
        send: sends a datagram to a peer.
        clock: tells the time.
        models: that may be asked, and the digest of each, as text; empty: unknown.
        key: shared with the clients; empty: everybody's.
        limits: on what clients can make it do.

    Attributes:
        counts: packets that were dropped, by reason: forged, oversized, malformed, repeated, late, over_rate,
            over_limit, refused; and images: whole, concealed, empty.
    """

    def __init__(
        self,
        answer: AnswerImage,
        send: Callable[[bytes, Hashable], object],
        clock: Clock,
        models: Mapping[str, str],
        key: bytes = b"",
        limits: ServerLimits | None = None,
    ) -> None:
        self._answer = answer
        self._send = send
        self._clock = clock
        self._models = {name: model_digest(digest) for name, digest in models.items()}
        self._key = key
        self._seal = Seal(key)
        self.limits = limits or ServerLimits()
        self._sessions: OrderedDict[Hashable, _Session] = OrderedDict()
        self._greeted: OrderedDict[Hashable, _Session] = OrderedDict()  # said hello, and have not shown the key yet
        self.counts: Counter[str] = Counter()

    @property
    def sessions(self) -> int:
        """Counts clients that have shown the key."""
        return len(self._sessions)

    def received(self, data: bytes, peer: Hashable) -> None:
        """Takes a datagram; what is wrong with it is counted, and never raised."""
        if len(data) > MAX_PAYLOAD:
            self.counts["oversized"] += 1
            return
        session = self._sessions.get(peer)
        packet = None if session is None else _opened(session.seal, data)
        if packet is None and (greeted := self._greeted.get(peer)) is not None:
            packet = _opened(greeted.seal, data)
            if packet is not None:
                del self._greeted[peer]
                if session is not None:
                    session.close()
                session = self._sessions[peer] = greeted
                session.heard_of()
                while len(self._sessions) > self.limits.sessions:
                    self._sessions.popitem(last=False)[1].close()
        if packet is None:
            self._on_stranger(data, peer)
            return
        assert session is not None
        self._sessions.move_to_end(peer)
        try:
            session.received(packet, len(data))
        except ProtocolError:
            self.counts["malformed"] += 1

    def close(self) -> None:
        """Lets go of all sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._greeted.clear()

    def _on_stranger(self, data: bytes, peer: Hashable) -> None:
        packet = _opened(self._seal, data)
        if packet is None:
            self.counts["forged"] += 1
            return
        if packet.kind is not PacketKind.HELLO:
            self.counts["malformed"] += 1
            return
        try:
            greeting = Greeting.read(packet.body)
            if greeting.model not in self._models:
                raise ProtocolError(f"no model {greeting.model!r} here")
            here = self._models[greeting.model]
            if any(greeting.digest) and any(here) and greeting.digest != here:
                raise ProtocolError(f"another {greeting.model!r} here")
        except ProtocolError as error:
            self.counts["refused"] += 1
            # Never longer than what it answers.
            text = str(error).encode()[: max(0, len(packet.body) - NONCE_BYTES)]
            body = packet.body[:NONCE_BYTES] + text
            self._send(self._seal.close(ImagePacket(PacketKind.REFUSAL, body=body)), peer)
            return
        nonce = secrets.token_bytes(NONCE_BYTES)
        there, back = session_keys(self._key, greeting.nonce, nonce)
        seals = Seal(there), Seal(back)
        self._greeted.pop(peer, None)
        self._greeted[peer] = _Session(
            greeting, *seals, lambda data: self._send(data, peer), self._answer, self._clock, self.limits, self.counts
        )
        while len(self._greeted) > self.limits.sessions:
            self._greeted.popitem(last=False)
        self._send(self._seal.close(ImagePacket(PacketKind.WELCOME, body=greeting.nonce + nonce)), peer)


class _Gathering:
    """Holds the packets of one image."""

    __slots__ = (
        "all_sent",
        "bodies",
        "count",
        "decode",
        "decode_at_s",
        "decoded",
        "judged",
        "parities",
        "resend",
        "resend_at_s",
    )

    def __init__(self, count: int, decode_at_s: float) -> None:
        self.count = count
        self.decode_at_s = decode_at_s
        self.bodies: dict[int, bytes] = {}
        self.parities: dict[int, bytes] = {}
        self.decode: Timer | None = None
        self.resend: Timer | None = None  # asks for what is missing
        self.resend_at_s = 0.0  # not before
        self.all_sent = False  # something that was sent behind its last packet is here
        self.decoded = False
        self.judged = False  # its loss is in the session's

    def stop(self) -> None:
        for timer in (self.decode, self.resend):
            if timer is not None:
                timer.cancel()
        self.decode = self.resend = None


class _Session:
    """Receives the images of one client."""

    def __init__(
        self,
        greeting: Greeting,
        seal: Seal,
        back: Seal,
        send: Callable[[bytes], object],
        answer: AnswerImage,
        clock: Clock,
        limits: ServerLimits,
        counts: Counter[str],
    ) -> None:
        self._greeting, self.seal, self._back = greeting, seal, back
        self._send, self._answer, self._clock, self._limits, self._counts = send, answer, clock, limits, counts
        self._images: dict[int, _Gathering] = {}
        self._over: OrderedDict[int, list[bytes]] = OrderedDict()  # images that are over, with their answers or none
        self._kept: deque[int] = deque()  # those whose answers are kept
        self._newest = 0
        self._tokens, self._filled_s = limits.burst_bytes, clock.time()
        self._greeted_s = clock.time()
        self._round_trip_s = 0.0
        self._loss = 0.0  # of packets, before any is sent again
        self._closed = False

    def heard_of(self) -> None:
        """Notes that the client has answered the welcome, a round trip after it was sent."""
        self._round_trip_s = self._clock.time() - self._greeted_s

    def received(self, packet: ImagePacket, size: int) -> None:
        """Takes a packet of the session.

        Raises:
            ProtocolError: it makes no sense.
        """
        now = self._clock.time()
        self._tokens = min(
            self._limits.burst_bytes, self._tokens + (now - self._filled_s) * self._limits.bytes_per_s
        )  # fmt: skip
        self._filled_s = now
        if self._tokens < size:
            self._counts["over_rate"] += 1
            return
        self._tokens -= size
        if packet.kind is PacketKind.PING:
            if len(packet.body) != 4:
                raise ProtocolError("a ping of another length")
            said_s = int.from_bytes(packet.body, "big") * _TENTH_MS
            self._round_trip_s = min(said_s, _MAX_ROUND_TRIP_S) or self._round_trip_s
            self._send(self._back.close(ImagePacket(PacketKind.PONG, packet.image)))
        elif packet.kind in (PacketKind.DATA, PacketKind.PARITY, PacketKind.ASK):
            self._of_image(packet, now)
        else:
            raise ProtocolError(f"a client sends no {packet.kind.name}")

    def close(self) -> None:
        self._closed = True
        for gathering in self._images.values():
            gathering.stop()
        self._images.clear()

    def _of_image(self, packet: ImagePacket, now: float) -> None:
        number, form = packet.image, self._greeting.form
        if not (1 <= packet.count <= min(MAX_PACKETS, form.count) and packet.index < packet.count):
            raise ProtocolError("a packet whose numbers make no sense")
        if number in self._over or number + _REMEMBERED <= self._newest:
            if packet.kind is PacketKind.ASK:
                for data in self._over.get(number, ()):
                    self._send(data)
            else:
                self._counts["late"] += 1
            return
        gathering = self._images.get(number)
        decode_at_s = now + min(packet.left * _TENTH_MS, self._limits.wait_s)
        if gathering is None:
            if len(self._images) >= self._limits.images:
                self._counts["over_limit"] += 1
                return
            gathering = self._images[number] = _Gathering(packet.count, decode_at_s)
            gathering.decode = self._clock.call_at(decode_at_s, self._decode, number, gathering)
            self._newest = max(self._newest, number)
        if packet.count != gathering.count:
            raise ProtocolError("packets of one image that do not agree on their number")
        if gathering.decoded:
            self._counts["late"] += packet.kind is not PacketKind.ASK
            return
        if packet.kind is PacketKind.ASK:
            gathering.all_sent = True
            self._wait_for_rest(number, gathering, now, 0.0)
            return
        here = gathering.bodies if packet.kind is PacketKind.DATA else gathering.parities
        if packet.index in here:
            self._counts["repeated"] += 1
            return
        here[packet.index] = packet.body
        if len(gathering.bodies) + len(gathering.parities) >= gathering.count:
            gathering.bodies |= recovered(gathering.count, gathering.bodies, gathering.parities)
        if len(gathering.bodies) == gathering.count:
            self._decode(number, gathering)
        else:
            # The last packet has passed the others, or they are lost; before it, silence says so.
            last = packet.kind is PacketKind.PARITY or packet.index == gathering.count - 1
            gathering.all_sent = gathering.all_sent or last
            quiet_s = _SLACK_S + self._round_trip_s / (16 if last else 4)
            self._wait_for_rest(number, gathering, now, quiet_s)

    def _wait_for_rest(self, number: int, gathering: _Gathering, now: float, quiet_s: float) -> None:
        """Asks for what is missing after `quiet_s`, unless more comes until then."""
        if not self._greeting.retransmit:
            return
        if gathering.resend is not None:
            gathering.resend.cancel()
        when = max(now + quiet_s, gathering.resend_at_s)
        gathering.resend = self._clock.call_at(when, self._ask_again, number, gathering)

    def _ask_again(self, number: int, gathering: _Gathering) -> None:
        now = self._clock.time()
        gathering.resend = None
        self._judge(gathering)
        if gathering.decoded or now + self._round_trip_s > gathering.decode_at_s:
            return
        gathering.bodies |= recovered(gathering.count, gathering.bodies, gathering.parities)
        # A link may stand still for a while. What comes behind the last packet that it let through is on its way, not
        # lost, until something that was sent later is here.
        sent = gathering.count if gathering.all_sent else max(gathering.bodies, default=-1)
        missing = [index for index in range(sent) if index not in gathering.bodies]
        if len(gathering.bodies) == gathering.count:
            self._decode(number, gathering)
            return
        if not missing:
            return
        body = write_missing(missing)
        self._send(self._back.close(ImagePacket(PacketKind.MISSING, number, count=gathering.count, body=body)))
        gathering.resend_at_s = now + 1.25 * self._round_trip_s + _SLACK_S
        gathering.resend = self._clock.call_at(gathering.resend_at_s, self._ask_again, number, gathering)

    def _decode(self, number: int, gathering: _Gathering) -> None:
        """Decodes what is there, and has it answered."""
        gathering.stop()
        self._judge(gathering)
        gathering.decoded = True
        form = self._greeting.form
        gathering.bodies |= recovered(gathering.count, gathering.bodies, gathering.parities)
        intervals: list[bytes | None] = [None] * form.count
        columns = max(1, form.columns // form.blocks)
        places = interval_numbers(columns, form.count, gathering.count)
        for index, body in gathering.bodies.items():
            try:
                for one, data in read_intervals(body, places[index]).items():
                    intervals[one] = data
            except ProtocolError:
                self._counts["malformed"] += 1
        gathering.bodies, gathering.parities = {}, {}
        pixels, known = form.decode(intervals)
        lost = 1.0 - float(known.mean())
        if not known.any():
            self._counts["empty"] += 1
            self._answered(number, LossyAnswer(None, 1.0, "nothing of the image arrived in time"))
            return
        self._counts["concealed" if lost else "whole"] += 1
        if self._greeting.conceal:
            conceal(pixels, known, form.side)
        image = LossyImage(self._greeting.model, pixels, lost, self._greeting.exact)
        self._answer(image, lambda reply: self._replied(number, lost, reply))

    def _judge(self, gathering: _Gathering) -> None:
        """Takes what an image lacks before anything of it is sent again into the session's loss."""
        if not gathering.judged:
            gathering.judged = True
            missing = 1 - len(gathering.bodies) / gathering.count
            self._loss += _LOSS_WEIGHT * (missing - self._loss)

    @property
    def _copies(self) -> int:
        """Gives how often a short answer is sent, so that few are lost although none of them is asked for in time."""
        if self._loss <= _ANSWERS_LOST:
            return 1
        return min(_MAX_COPIES, ceil(log(_ANSWERS_LOST) / log(min(self._loss, 0.9))))

    def _replied(self, number: int, lost: float, reply: Reply) -> None:
        if reply.outputs is None:
            self._answered(number, LossyAnswer(None, lost, str(reply.error or "no answer")))
        else:
            self._answered(number, LossyAnswer(reply.outputs, lost))

    def _answered(self, number: int, answer: LossyAnswer) -> None:
        self._images.pop(number, None)
        if self._closed:
            return
        pieces = answer.write(self._greeting.payload - OVERHEAD)
        packets = [
            self._back.close(ImagePacket(PacketKind.ANSWER, number, index, len(pieces), body=piece))
            for index, piece in enumerate(pieces)
        ]
        self._over[number] = packets
        self._kept.append(number)
        if len(self._kept) > self._limits.answers:
            self._over[self._kept.popleft()] = []
        while len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)
        for data in packets * (self._copies if len(packets) == 1 else 1):
            self._send(data)


def _opened(seal: Seal, data: bytes) -> ImagePacket | None:
    try:
        return seal.open(data)
    except ProtocolError:
        return None
