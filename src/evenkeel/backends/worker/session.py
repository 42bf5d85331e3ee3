"""Handles one connection to a worker, on the client's side: hello, shared memory, tickets, signs of life."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evenkeel.arrays import Array
from evenkeel.backends.backend import OnReply, Reply
from evenkeel.backends.worker.connection import Connection
from evenkeel.backends.worker.frames import (
    MAX_PAYLOAD_BYTES,
    NO_SLOT,
    VERSION,
    ErrorReason,
    Frame,
    FrameKind,
    encode,
    encode_object,
    encode_tensor,
)
from evenkeel.backends.worker.key import KEY_VARIABLE, UNPROVEN_BYTES, challenge, check_proof, proof
from evenkeel.backends.worker.shared_memory import SharedMemoryError, SlotWriter
from evenkeel.errors import BackendBusyError, BackendError, BackendLostError, EvenkeelError, ProtocolError
from evenkeel.trust.tls import ClientTls, tls_reason

__all__ = ["ClientOptions", "RemoteModel", "WorkerHello", "WorkerSession", "call"]

_log = logging.getLogger(__name__)
_MAX_WORDS = 4096  # of a worker's error that are kept
_NO_OFFER = {"accepted": False, "reason": ""}


@dataclass(frozen=True)
class ClientOptions:
    """Describes how a client treats its worker.

    Attributes:
        start_timeout_s: how long `start` waits for the worker to be ready; loading a large model takes long.
        heartbeat_s: between two pings.
        frozen_after_s: a worker that long without a sign of life is given up. Must be longer than the longest pass of
            its models, because a worker that computes does not answer; 0 waits for ever.
        frozen_if_suspected_s: the same, while the gateway suspects the worker. Lower restarts a frozen worker sooner.
        first_pause_s: before the second attempt to connect; doubles with each failure.
        max_pause_s: between two attempts.
        share_from_bytes: tensors of at least that size go through shared memory, where the worker can open it.
        share_slots: how many of them may be on their way at once, others take the socket; 0 shares nothing.
        share_slot_bytes: the largest tensor that fits.
        key: shared with workers on TCP, or what gives it for each connection; empty where they have none.
        tls: files of TLS for workers on TCP; None: those links are not encrypted.
    """

    start_timeout_s: float = 30.0
    heartbeat_s: float = 1.0
    frozen_after_s: float = 10.0
    frozen_if_suspected_s: float = 3.0
    first_pause_s: float = 0.1
    max_pause_s: float = 5.0
    share_from_bytes: int = 8 << 10
    share_slots: int = 16
    share_slot_bytes: int = 4 << 20
    key: bytes | Callable[[], bytes] = field(default=b"", repr=False)
    tls: ClientTls | None = None

    @property
    def present_key(self) -> bytes:
        """Gives the key for a connection that is made now."""
        return self.key() if callable(self.key) else self.key


@dataclass(frozen=True)
class RemoteModel:
    """Holds what a worker says of one of its models; shapes are of one row, None where it does not know."""

    name: str
    number: int
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    dtype: str | None
    digest: str = ""
    batch: int = 1  # rows of waiting tasks that it may take in one pass


@dataclass(frozen=True)
class WorkerHello:
    """Holds what a worker says of itself."""

    worker: int
    pid: int
    evenkeel: str
    shares: bool
    models: dict[str, RemoteModel]


@dataclass(slots=True)
class _OpenTicket:
    on_reply: OnReply
    model: RemoteModel
    rows: int
    slot: int


class WorkerSession:
    """Sends tasks over one connection and gives each its one reply, if need be that the connection was lost.

    Args:
        where: the worker's address or process, for messages.
        on_change: called when the worker says goodbye, and when the session ends.
        key: that both ends must hold; empty: none.
    """

    def __init__(self, where: str, options: ClientOptions, on_change: Callable[[], object], key: bytes = b"") -> None:
        self._where, self._options, self._on_change, self._key = where, options, on_change, key
        self._trusted = not key
        self._challenges: tuple[str, str] | tuple[()] = ()
        self._loop = asyncio.get_running_loop()
        limit = MAX_PAYLOAD_BYTES if self._trusted else UNPROVEN_BYTES
        self.connection = Connection(self._on_frame, self._on_end, max_payload_bytes=limit)
        self.ended: asyncio.Future[EvenkeelError] = self._loop.create_future()
        self._first: dict[FrameKind, asyncio.Future[Frame]] = {
            kind: self._loop.create_future() for kind in (FrameKind.HELLO, FrameKind.SHARED)
        }
        self._open: dict[int, _OpenTicket] = {}
        self._slots: SlotWriter | None = None
        self._heard = False
        self._leaving = False
        self._silent_beats = 0
        self._suspected = False
        self._beat_timer: asyncio.TimerHandle | None = None

    @property
    def ready(self) -> bool:
        """True if tasks sent now will be done, as far as one can know."""
        return not self._leaving and not self.ended.done()

    async def greet(self) -> WorkerHello:
        """Learns who the worker is; to be awaited once, before anything else.

        Raises:
            BackendLostError: the connection ended, or nothing came.
            ProtocolError: it is no worker, of another version, or does not hold the key.
        """
        hello = _read_hello((await self._wait_for(FrameKind.HELLO)).object())
        if hello.shares and self._options.share_slots > 0:
            await self._share()
        self._beat()
        return hello

    def _prove(self, frame: Frame) -> None:
        """Answers a CHALLENGE, and checks the PROOF that follows; nothing else is taken before that."""
        if frame.kind is FrameKind.CHALLENGE and not self._key:
            raise ProtocolError(f"the worker at {self._where} asks for a key; give this side the same one")
        words = frame.object() if frame.kind in (FrameKind.CHALLENGE, FrameKind.PROOF) else {}
        if frame.kind is FrameKind.CHALLENGE and not self._challenges:
            of_worker, of_client = str(words.get("challenge")), challenge()
            self._challenges = (of_worker, of_client)
            answer = {"challenge": of_client, "proof": proof(self._key, "client", of_worker, of_client)}
            self.connection.send([encode_object(FrameKind.PROOF, answer)])
        elif frame.kind is FrameKind.PROOF and self._challenges:
            check_proof(words.get("proof"), self._key, "worker", *self._challenges)
            self._trusted = True
            self.connection.limit_payload(MAX_PAYLOAD_BYTES)
        else:
            raise ProtocolError(
                f"the worker at {self._where} does not ask for the key that this side has; start it with the same key"
            )

    async def _share(self) -> None:
        offer = _NO_OFFER
        try:
            slots = SlotWriter(self._options.share_slots, self._options.share_slot_bytes)
        except SharedMemoryError as error:
            _log.info("worker at %s: large tensors go through the socket: %s", self._where, error)
            return
        try:
            self.connection.send([encode_object(FrameKind.SHARE, slots.offer())])
            offer = (await self._wait_for(FrameKind.SHARED)).object()
        finally:
            if offer.get("accepted") is True:
                slots.seal()
                self._slots = slots
            else:
                slots.close()
        if self._slots is None:
            _log.info("worker at %s: large tensors go through the socket: %s", self._where, offer.get("reason"))

    def submit(self, ticket: int, model: RemoteModel, inputs: Array, on_reply: OnReply, key: int) -> None:
        """Sends one task.

        Raises:
            BackendError: the tensor cannot travel; nothing was sent, and no reply will come.
        """
        slots, slot = self._slots, NO_SLOT
        if slots is not None and inputs.nbytes >= self._options.share_from_bytes:
            taken = slots.take(inputs.nbytes)
            slot = NO_SLOT if taken is None else taken
        try:
            pieces = encode_tensor(FrameKind.TASK, ticket, inputs, key=key, model=model.number, slot=slot)
            if slots is not None and slot != NO_SLOT:
                slots.write(slot, inputs)
        except BackendError:
            self._give_back(slot)
            raise
        self._open[ticket] = _OpenTicket(on_reply, model, inputs.shape[0], slot)
        self.connection.send(pieces)

    def cancel(self, ticket: int) -> None:
        """Asks the worker to give the task up."""
        if ticket in self._open and not self._leaving:  # see _beat
            self.connection.send([encode(FrameKind.CANCEL, ticket)])

    def suspect(self) -> None:
        """Makes the connection less patient with a silent worker, until it next says anything."""
        self._suspected = True

    async def close(self) -> None:
        """Ends the connection; open tickets get a BackendLostError."""
        error = BackendLostError(f"the connection to the worker at {self._where} was closed")
        self.connection.abort(error)
        # Not left to the transport: one that is aborted while it opens may never report its end.
        self._on_end(error)
        await asyncio.sleep(0)

    async def _wait_for(self, kind: FrameKind) -> Frame:
        try:
            # Not wait_for: in Python 3.11 that forgets a cancellation which comes together with the result.
            async with asyncio.timeout(self._options.start_timeout_s):
                return await self._first[kind]
        except TimeoutError as error:
            raise BackendLostError(
                f"the worker at {self._where} sent no {kind.name} in {self._options.start_timeout_s:g} s"
            ) from error

    def _on_frame(self, frame: Frame) -> None:
        self._heard = True
        self._silent_beats = 0
        self._suspected = False
        kind = frame.kind
        if kind is FrameKind.ERROR and frame.ticket == 0:
            self.connection.abort(BackendLostError(f"the worker at {self._where} hung up: {frame.text()[:_MAX_WORDS]}"))
        elif not self._trusted or kind is FrameKind.CHALLENGE:
            self._prove(frame)
        elif kind is FrameKind.REPLY:
            entry = self._take(frame)
            self._finish(entry, _checked(frame, entry))
        elif kind is FrameKind.CANCELLED:
            error = BackendError("the task was cancelled before it began")
            self._finish(self._take(frame), Reply(error=error, cancelled=True))
        elif kind is FrameKind.ERROR:
            self._finish(self._take(frame), _failed(frame))
        elif kind is FrameKind.GOODBYE:
            self._leaving = True
            call(self._on_change)
        elif kind in self._first and not self._first[kind].done():
            self._first[kind].set_result(frame)
        elif kind is not FrameKind.PONG:
            raise ProtocolError(f"the worker at {self._where} sent a {kind.name} frame out of turn")

    def _take(self, frame: Frame) -> _OpenTicket:
        entry = self._open.pop(frame.ticket, None)
        if entry is None:
            raise ProtocolError(f"the worker at {self._where} replied to ticket {frame.ticket}, which is not open")
        return entry

    def _finish(self, entry: _OpenTicket, reply: Reply) -> None:
        self._give_back(entry.slot)
        call(entry.on_reply, reply)

    def _give_back(self, slot: int) -> None:
        if slot != NO_SLOT and self._slots is not None:
            self._slots.give_back(slot)

    def _beat(self) -> None:
        """Sends a ping; gives the worker up after too many pings without a sign of life.

        Beats are counted instead of seconds, so that a client which was itself stopped for long blames nobody.
        """
        options = self._options
        if self.ended.done() or not options.frozen_after_s:
            return
        patience_s = options.frozen_after_s
        if self._suspected:
            patience_s = min(patience_s, options.frozen_if_suspected_s)
        if self._silent_beats * options.heartbeat_s >= patience_s:
            message = f"the worker at {self._where} gave no sign of life for {patience_s:g} s"
            self.connection.abort(BackendLostError(message))
            return
        self._silent_beats += 1
        if not self._leaving:  # writing to one that closes would break the pipe over its last, unread replies
            self.connection.send([encode(FrameKind.PING)])
        self._beat_timer = self._loop.call_later(options.heartbeat_s, self._beat)

    def _on_end(self, error: Exception | None) -> None:
        if self.ended.done():  # closed already
            return
        if isinstance(error, EvenkeelError):
            reason = error
        elif self._challenges and not self._trusted:
            # It says nothing to those who do not hold its key, not even why.
            reason = ProtocolError(
                f"the worker at {self._where} closed the connection when it saw this side's proof: the keys differ; "
                f"give both the same one (--key-file of the worker, worker_key_file of the gateway, or the variable "
                f"{KEY_VARIABLE} of each)"
            )
        else:
            cause = f": {tls_reason(error)}" if error is not None else ""
            if not self._heard and self._where.startswith("tcp:"):
                cause += "; it said nothing before: does it want TLS, or a certificate that it knows (worker_tls)?"
            reason = BackendLostError(f"the worker at {self._where} closed the connection{cause}")
        self.ended.set_result(reason)
        for first in self._first.values():
            if not first.done():
                first.set_exception(reason)
                first.exception()  # mark as seen; who waits for it sees it all the same
        if self._beat_timer is not None:
            self._beat_timer.cancel()
        if self._slots is not None:
            self._slots.close()
            self._slots = None
        call(self._on_change)
        entries, self._open = self._open, {}
        lost = reason if isinstance(reason, BackendLostError) else BackendLostError(str(reason))
        rows, began = 0, True
        for entry in entries.values():
            # A worker does one task after the other: it was at work on the oldest, and on those that may have been in
            # one pass with it; the others only waited.
            rows += entry.rows
            began = began and (rows == entry.rows or rows <= entry.model.batch)
            call(entry.on_reply, Reply(error=lost, began=began))


def call(callback: Callable[..., object], *arguments: object) -> None:
    """Calls back into the gateway; its errors go to the loop's handler, they must not end a connection."""
    try:
        callback(*arguments)
    except Exception as error:
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"a callback of a worker's session raised {type(error).__name__}", "exception": error}
        )


def _failed(frame: Frame) -> Reply:
    words = frame.text()[:_MAX_WORDS]
    if frame.model == ErrorReason.NO_ROOM:
        return Reply(error=BackendBusyError(words), began=False)
    return Reply(error=BackendError(words))


def _checked(frame: Frame, entry: _OpenTicket) -> Reply:
    wanted = entry.model.output_shape
    if frame.shape[0] != entry.rows or (wanted is not None and frame.shape[1:] != wanted):
        rows = "..." if wanted is None else ", ".join(map(str, wanted))
        return Reply(error=ProtocolError(f"the worker gave shape {frame.shape}, expected ({entry.rows}, {rows})"))
    return Reply(outputs=frame.tensor(), service_s=frame.service_s)


def _read_hello(hello: dict[str, Any]) -> WorkerHello:
    if hello.get("protocol") != VERSION:
        raise ProtocolError(
            f"the worker speaks protocol {hello.get('protocol')!r}, this side {VERSION}; "
            "install the same evenkeel on both"
        )
    try:
        models = {
            str(each["name"]): RemoteModel(
                str(each["name"]),
                number,
                _shape(each["input_shape"]),
                _shape(each["output_shape"]),
                each["dtype"],
                str(each.get("digest", "")),
                int(each.get("batch", 1)),
            )
            for number, each in enumerate(hello["models"])
        }
        return WorkerHello(
            int(hello["worker"]), int(hello["pid"]), str(hello["evenkeel"]), hello["shared_memory"] is True, models
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the worker's hello cannot be understood: {type(error).__name__}: {error}") from error


def _shape(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(length) for length in value)
