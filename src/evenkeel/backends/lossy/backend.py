"""Has images answered at the other end of a link that loses packets: the client of a `LossyServer`.

An image goes out in packets that decode alone. The other end waits for them until a moment that is named in each, asks
again for what is missing while there is time, and then makes do with what it has. So an answer may be to an image that
came in part: `Reply.lost` says how much of it did not.

Nothing here does I/O but the link: time is a `Clock`'s.
"""

import asyncio
import logging
import secrets
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, OnReply, Reply
from evenkeel.backends.lossy.intervals import JpegForm
from evenkeel.backends.lossy.messages import (
    MAX_NAME_BYTES,
    NONCE_BYTES,
    Greeting,
    LossyAnswer,
    model_digest,
    read_missing,
)
from evenkeel.backends.lossy.packets import (
    MAX_PAYLOAD,
    MIN_PAYLOAD,
    ImagePacket,
    PacketKind,
    Seal,
    laid_out,
    session_keys,
)
from evenkeel.clock import Clock, LoopClock, Timer
from evenkeel.errors import (
    BackendBusyError,
    BackendError,
    BackendLostError,
    ConfigurationError,
    ProtocolError,
    TaskRefusedError,
    UnreadableImageError,
)

__all__ = ["DatagramLink", "LossyBackend", "LossyOptions"]

_log = logging.getLogger(__name__)
_TENTH_MS = 1e-4
_MAX_LEFT_S = 0xFFFF * _TENTH_MS
_MAX_PIECES = 4096  # of an answer
_LEAST_ASK_S = 0.005


@dataclass(frozen=True)
class LossyOptions:
    """Says how images are sent.

    Attributes:
        payload: bytes of a packet at most: 100 to 1,200, as the link has it.
        wait_s: from when an image is submitted until the other end must decode it, with whatever is there.
        deadline_s: from when an image is submitted until it is answered, or not at all.
        parity: parity packets for each data packet; each makes good one loss in its group.
        retransmit: sends again what the other end misses, while there is time.
        conceal: has holes filled from the pixels beside them.
        exact: wants the named model itself, where the other end would answer some images by another.
        bytes_per_s: that are sent at most.
        images: that are under way at most.
        heartbeat_s: between two signs of life; after three without one the other end is lost.
        key: shared with the other end; empty: everybody's.
    """

    payload: int = MAX_PAYLOAD
    wait_s: float = 0.05
    deadline_s: float = 0.5
    parity: float = 0.0
    retransmit: bool = True
    conceal: bool = True
    exact: bool = False
    bytes_per_s: float = 4e6
    images: int = 32
    heartbeat_s: float = 1.0
    key: bytes = b""

    def __post_init__(self) -> None:
        if not MIN_PAYLOAD <= self.payload <= MAX_PAYLOAD:
            raise ConfigurationError(f"payload: {MIN_PAYLOAD} to {MAX_PAYLOAD} bytes, found {self.payload}")
        if not 0 < self.wait_s < self.deadline_s or self.wait_s > _MAX_LEFT_S:
            raise ConfigurationError(
                f"wait: above 0, below the deadline ({self.deadline_s:g} s) and up to {_MAX_LEFT_S:g} s, "
                f"found {self.wait_s:g} s"
            )
        if not 0 <= self.parity <= 1:
            raise ConfigurationError(f"parity: from 0 to 1 packets for each data packet, found {self.parity:g}")
        if not (self.bytes_per_s > 0 and self.heartbeat_s > 0 and self.images > 0):
            raise ConfigurationError("bytes_per_s, heartbeat and images must be above 0")


class DatagramLink(ABC):
    """Carries datagrams to the other end and back: the seam between the protocol and what stands below it."""

    where: str

    @abstractmethod
    async def open(self, received: Callable[[bytes], object]) -> None:
        """Opens it; what arrives is given to `received`, on the event loop's thread.

        Raises:
            BackendLostError: it cannot be opened.
        """

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Sends one datagram, or loses it."""

    def close(self) -> None:  # noqa: B027 - most links hold nothing
        """Lets go of what is below."""


class LossyBackend(Backend):
    """Sends UINT8 images to a `LossyServer`.

    Args:
        name: unique in a gateway.
        link: to the other end.
        model: that answers there.
        form: of the images.
        layout: of the rows that are submitted, NHWC or NCHW.
        called: what the other end calls the model; the same by default.
        digest: that the model must have there, where that is known here.
        options: how images are sent.
        clock: the running loop's by default.

    Attributes:
        counts: packets: sent, resent, forged, malformed, late; images: answered, unanswered.
        bytes_sent: over the link, without the headers of UDP.
    """

    serial = False

    def __init__(
        self,
        name: str,
        link: DatagramLink,
        model: str,
        form: JpegForm,
        *,
        layout: str = "NHWC",
        called: str = "",
        digest: str = "",
        options: LossyOptions | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._called = called or model
        if not 1 <= len(self._called.encode()) <= MAX_NAME_BYTES:
            raise ConfigurationError(f"a model's name has 1 to {MAX_NAME_BYTES} bytes, found {self._called!r}")
        self._digest = model_digest(digest)
        self.name = name
        self._link, self._model, self._form, self._layout = link, model, form, layout
        self.options = options or LossyOptions()
        self._clock_or_none = clock
        self._seal = Seal(self.options.key)
        self._seals: tuple[Seal, Seal] | None = None  # there and back
        self._nonce = b""
        self._greeted_s = 0.0
        self._round_trip_s = 0.0
        self._ready = self._closed = self._began = False
        self._error = ""
        self._started: asyncio.Future[None] | None = None
        self._heard_s = 0.0
        self._beat: Timer | None = None
        self._pinged: dict[int, float] = {}
        self._next_ticket = self._next_image = 1
        self._tasks: dict[int, _LossyTask] = {}
        self._images: dict[int, _SentImage] = {}
        self._queue: deque[tuple[int, PacketKind, int]] = deque()
        self._pump: Timer | None = None
        self._free_at_s = 0.0  # when the link has carried what was sent
        self.counts: Counter[str] = Counter()
        self.bytes_sent = 0

    @property
    def ready(self) -> bool:
        """True when the other end has answered lately."""
        return self._ready

    @property
    def why_not(self) -> str:
        """Says why it is not ready."""
        return "" if self._ready else self._error

    @property
    def round_trip_s(self) -> float:
        """Gives the round trip to the other end, smoothed; 0 before it is known."""
        return self._round_trip_s

    async def start(self) -> None:
        """Opens the link, and returns when the other end has answered.

        Raises:
            BackendLostError: it did not, in five heartbeats; goes on trying until `close`.
        """
        await self._link.open(self.received)
        self._started = asyncio.get_running_loop().create_future()
        self.begin()
        try:
            async with asyncio.timeout(5 * self.options.heartbeat_s):
                await self._started
        except TimeoutError:
            raise BackendLostError(f"{self.name!r}: {self._error or 'no answer from ' + self._link.where}") from None

    def begin(self) -> None:
        """Greets the other end over a link that is open, without waiting for its answer."""
        self._began = True
        self._heard_s = self._clock.time()
        self._heartbeat()

    async def close(self) -> None:
        """Lets go of the link; open tasks are lost."""
        self._closed = True
        if self._beat is not None:
            self._beat.cancel()
        if self._pump is not None:
            self._pump.cancel()
        self._set_ready(False, f"backend {self.name!r} was closed")
        for ticket in list(self._tasks):
            self._end(ticket, Reply(error=BackendLostError(self._error)))
        self._link.close()

    def submit(self, model: str, inputs: Array, on_reply: OnReply, key: int = 0) -> int:
        """Sends the rows, one image each; see `Backend.submit`."""
        ticket = self._next_ticket
        self._next_ticket += 1
        try:
            self._take(ticket, model, inputs, on_reply)
        except BackendError as error:
            self._clock.call_soon(on_reply, Reply(error=error, began=False))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Gives the task up: nothing more of it is sent, and an answer that still comes is dropped."""
        if ticket in self._tasks:
            self._end(ticket, Reply(error=BackendError("cancelled"), cancelled=True))

    def received(self, data: bytes) -> None:
        """Takes a datagram of the other end; what is wrong with it is counted, and never raised."""
        packet = None if self._seals is None else _opened(self._seals[1], data)
        if packet is None:
            packet = _opened(self._seal, data)
            if packet is None or packet.kind not in (PacketKind.WELCOME, PacketKind.REFUSAL):
                self.counts["forged"] += 1
                return
        elif packet.kind in (PacketKind.WELCOME, PacketKind.REFUSAL):
            self.counts["malformed"] += 1
            return
        try:
            self._on_packet(packet)
        except ProtocolError:
            self.counts["malformed"] += 1

    # ---- the session ----

    @property
    def _clock(self) -> Clock:
        if self._clock_or_none is None:
            self._clock_or_none = LoopClock(asyncio.get_running_loop())
        return self._clock_or_none

    def _heartbeat(self) -> None:
        if self._closed:
            return
        now = self._clock.time()
        if self._ready and now - self._heard_s > 3 * self.options.heartbeat_s:
            self._set_ready(False, f"{self._link.where} has been silent for {now - self._heard_s:.1f} s")
        if self._ready:
            self._ping(now)
        else:
            self._nonce = secrets.token_bytes(NONCE_BYTES)
            self._greeted_s = now
            options = self.options
            greeting = Greeting(
                self._nonce, self._called, self._form, options.payload, options.retransmit, options.conceal,
                options.exact, self._digest,
            )  # fmt: skip
            self._link.send(self._seal.close(ImagePacket(PacketKind.HELLO, body=greeting.write())))
        self._beat = self._clock.call_at(now + self.options.heartbeat_s, self._heartbeat)

    def _ping(self, now: float) -> None:
        assert self._seals is not None
        number = self._next_image
        self._pinged = {number: now}
        body = round(self._round_trip_s / _TENTH_MS).to_bytes(4, "big")
        self._link.send(self._seals[0].close(ImagePacket(PacketKind.PING, number, body=body)))

    def _on_packet(self, packet: ImagePacket) -> None:
        now = self._clock.time()
        if packet.kind is PacketKind.REFUSAL:
            if packet.body[:NONCE_BYTES] == self._nonce and not self._ready:
                self._error = f"refused: {packet.body[NONCE_BYTES:].decode(errors='replace')}"
            return
        if packet.kind is PacketKind.WELCOME:
            if len(packet.body) != 2 * NONCE_BYTES or packet.body[:NONCE_BYTES] != self._nonce or self._ready:
                raise ProtocolError("a welcome to another greeting")
            there, back = session_keys(self.options.key, self._nonce, packet.body[NONCE_BYTES:])
            self._seals = Seal(there), Seal(back)
            self._nonce = secrets.token_bytes(NONCE_BYTES)  # a welcome counts once
            self._round_trip_s = now - self._greeted_s
            self._heard_s = now
            self._ping(now)
            self._set_ready(True, "")
            return
        self._heard_s = now
        if packet.kind is PacketKind.PONG:
            sent_s = self._pinged.pop(packet.image, None)
            if sent_s is not None:
                self._round_trip_s += 0.25 * (now - sent_s - self._round_trip_s)
        elif packet.kind is PacketKind.MISSING:
            self._send_again(packet, now)
        elif packet.kind is PacketKind.ANSWER:
            self._on_answer(packet)
        else:
            raise ProtocolError(f"a server sends no {packet.kind.name}")

    def _set_ready(self, ready: bool, error: str) -> None:
        self._error = error
        if ready == self._ready:
            return
        self._ready = ready
        if not ready:
            self._seals = None
            _log.warning("%s: %s", self.name, error)
        elif self._started is not None and not self._started.done():
            self._started.set_result(None)
        self.on_change()

    # ---- images ----

    def _take(self, ticket: int, model: str, inputs: Array, on_reply: OnReply) -> None:
        if not self._ready:
            raise BackendLostError(f"{self.name!r} has no session: {self._error or 'it was not started'}")
        if model != self._model:
            raise BackendError(f"backend {self.name!r} holds no model {model!r}; it holds {self._model}")
        if len(self._images) + len(inputs) > self.options.images:
            raise BackendBusyError(f"{self.name!r} has {len(self._images)} images under way", self.options.wait_s)
        rows = inputs if self._layout == "NHWC" or inputs.ndim != 4 else inputs.transpose(0, 2, 3, 1)
        if not len(rows):
            raise TaskRefusedError("a task without rows")
        now, options = self._clock.time(), self.options
        columns = max(1, self._form.columns // self._form.blocks)
        try:
            packed = [
                laid_out(self._form.encode(np.ascontiguousarray(row)), columns, options.payload, options.parity)
                for row in rows
            ]
        except UnreadableImageError as error:
            raise TaskRefusedError(f"{self.name!r}: {error}") from error
        task = self._tasks[ticket] = _LossyTask(on_reply, len(rows))
        task.timer = self._clock.call_at(now + options.deadline_s, self._expired, ticket)
        for row, (bodies, parities) in enumerate(packed):
            number = self._next_image
            self._next_image += 1
            self._images[number] = _SentImage(ticket, row, bodies, parities, now)
            task.images.append(number)
            self._queue += [(number, PacketKind.DATA, index) for index in range(len(bodies))]
            self._queue += [(number, PacketKind.PARITY, index) for index in range(len(parities))]
            self._queue.append((number, PacketKind.ASK, 0))
        self._pump_queue()

    def _pump_queue(self) -> None:
        """Sends what may be sent by now, and comes back when more may."""
        now = self._clock.time()
        self._pump = None
        while self._queue:
            if self._free_at_s > now + 0.001:  # timers are no finer
                self._pump = self._clock.call_at(self._free_at_s, self._pump_queue)
                return
            number, kind, index = self._queue.popleft()
            image = self._images.get(number)
            if image is None:
                continue
            if kind is PacketKind.ASK:
                image.ask = self._clock.call_at(now + self._ask_after_s, self._ask, number)
            else:
                body = (image.bodies if kind is PacketKind.DATA else image.parities)[index]
                self._send(
                    image, ImagePacket(kind, number, index, len(image.bodies), self._left(image, now), body), now
                )

    def _send(self, image: "_SentImage", packet: ImagePacket, now: float) -> None:
        if self._seals is None:
            return
        data = self._seals[0].close(packet)
        self._free_at_s = max(self._free_at_s, now) + len(data) / self.options.bytes_per_s
        self.bytes_sent += len(data)
        self.counts["sent"] += 1
        self._link.send(data)

    def _left(self, image: "_SentImage", now: float) -> int:
        """Gives what is left for waiting once a packet that is sent now arrives, in tenths of a millisecond."""
        left_s = image.since_s + self.options.wait_s - now - self._round_trip_s / 2
        return min(0xFFFF, max(0, round(left_s / _TENTH_MS)))

    @property
    def _ask_after_s(self) -> float:
        return max(_LEAST_ASK_S, 1.5 * self._round_trip_s)

    def _ask(self, number: int) -> None:
        """Asks for the answer, in case it or all packets were lost."""
        image, now = self._images[number], self._clock.time()
        self._send(image, ImagePacket(PacketKind.ASK, number, 0, len(image.bodies), self._left(image, now)), now)
        image.ask = self._clock.call_at(now + self._ask_after_s, self._ask, number)

    def _send_again(self, packet: ImagePacket, now: float) -> None:
        image = self._images.get(packet.image)
        if image is None or not self.options.retransmit:
            self.counts["late"] += 1
            return
        for index in read_missing(packet.body):
            # Twice what the image has: a link that loses more than that needs no more traffic.
            if index < len(image.bodies) and image.resent < 2 * len(image.bodies) + 8:
                image.resent += 1
                self.counts["resent"] += 1
                self._queue.append((packet.image, PacketKind.DATA, index))
        if self._pump is None:
            self._pump_queue()

    def _on_answer(self, packet: ImagePacket) -> None:
        image = self._images.get(packet.image)
        if image is None:
            self.counts["late"] += 1
            return
        if not 1 <= packet.count <= _MAX_PIECES or packet.index >= packet.count:
            raise ProtocolError("an answer whose numbers make no sense")
        image.pieces[packet.index] = packet.body
        if len(image.pieces) < packet.count:
            return
        if max(image.pieces) >= packet.count:
            raise ProtocolError("pieces of an answer that do not agree on their number")
        answer = LossyAnswer.read(b"".join(image.pieces[index] for index in range(packet.count)))
        self._forget(packet.image)
        task = self._tasks[image.ticket]
        if answer.outputs is None:
            self._end(image.ticket, Reply(error=BackendError(f"{self.name!r}: {answer.error}"), lost=answer.lost))
            return
        task.answers[image.row] = answer
        if len(task.answers) == task.rows:
            self._finish(image.ticket, task)

    def _finish(self, ticket: int, task: "_LossyTask") -> None:
        answers = [task.answers[row] for row in range(task.rows)]
        outputs = [answer.outputs for answer in answers if answer.outputs is not None]
        lost = max(answer.lost for answer in answers)
        if any(one.ndim == 0 or one.shape != outputs[0].shape for one in outputs):
            self._end(ticket, Reply(error=ProtocolError(f"{self.name!r}: answers of different shapes")))
            return
        self.counts["answered"] += task.rows
        self._end(ticket, Reply(np.concatenate(outputs), lost=lost))

    def _expired(self, ticket: int) -> None:
        task = self._tasks[ticket]
        self.counts["unanswered"] += task.rows - len(task.answers)
        why = "" if self._ready else f" ({self._error})"
        error = BackendError(f"{self.name!r} gave no answer in {self.options.deadline_s:g} s{why}")
        self._end(ticket, Reply(error=error))

    def _forget(self, number: int) -> None:
        image = self._images.pop(number, None)
        if image is not None and image.ask is not None:
            image.ask.cancel()

    def _end(self, ticket: int, reply: Reply) -> None:
        task = self._tasks.pop(ticket)
        if task.timer is not None:
            task.timer.cancel()
        for number in task.images:
            self._forget(number)
        self._clock.call_soon(task.on_reply, reply)


class _LossyTask:
    __slots__ = ("answers", "images", "on_reply", "rows", "timer")

    def __init__(self, on_reply: OnReply, rows: int) -> None:
        self.on_reply, self.rows = on_reply, rows
        self.images: list[int] = []
        self.answers: dict[int, LossyAnswer] = {}
        self.timer: Timer | None = None


class _SentImage:
    """Holds an image until it is answered."""

    __slots__ = ("ask", "bodies", "parities", "pieces", "resent", "row", "since_s", "ticket")

    def __init__(self, ticket: int, row: int, bodies: list[bytes], parities: list[bytes], since_s: float) -> None:
        self.ticket, self.row, self.bodies, self.parities, self.since_s = ticket, row, bodies, parities, since_s
        self.pieces: dict[int, bytes] = {}
        self.resent = 0
        self.ask: Timer | None = None


def _opened(seal: Seal, data: bytes) -> ImagePacket | None:
    try:
        return seal.open(data)
    except ProtocolError:
        return None
