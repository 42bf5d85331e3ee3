"""Serves connections from clients, in front of one task runner."""

import asyncio
import contextlib
import logging
import math
import os
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.worker.address import Address, parse_address
from evenkeel.backends.worker.connection import Connection
from evenkeel.backends.worker.frames import (
    MAX_PAYLOAD_BYTES,
    VERSION,
    ErrorReason,
    Frame,
    FrameKind,
    encode,
    encode_error,
    encode_object,
    encode_tensor,
)
from evenkeel.backends.worker.key import UNPROVEN_BYTES, challenge, check_proof, proof
from evenkeel.backends.worker.model import Model
from evenkeel.backends.worker.shared_memory import SharedMemoryError, SlotReader
from evenkeel.backends.worker.task_runner import TaskRunner
from evenkeel.clock import LoopClock
from evenkeel.delays.laws import Delay
from evenkeel.errors import ConfigurationError, ProtocolError
from evenkeel.trust.tls import ServerTls, server_contexts
from evenkeel.trust.tls_door import TlsDoor
from evenkeel.version import __version__

__all__ = ["serve"]

_log = logging.getLogger(__name__)

_PROVE_S = 5.0  # for a client to prove that it holds the key
_MAX_STRANGERS = 64  # that may be about to prove it; for one more, the one who has taken longest is sent away
_LOG_EVERY_S = 10.0
_FLUSH_S = 2.0  # for the last replies to leave after the last task


class _ConnectedClient:
    """Serves one connection, on the worker's side; owns the tasks that came over it."""

    def __init__(self, runner: TaskRunner, room: "_SharedState") -> None:
        self._runner, self._room = runner, room
        self._key = room.key()
        self._challenge = challenge() if self._key else ""
        self._trusted = not self._key
        self._prove_timer: asyncio.TimerHandle | None = None
        self._slots: SlotReader | None = None
        self._open_tickets: set[int] = set()
        self.connection = Connection(self._on_frame, self._on_end, self._on_open, self._refusal, hold_back=True)
        self.ended = asyncio.get_running_loop().create_future()

    # What the runner says.

    def done(self, ticket: int, outputs: Array, service_s: float) -> None:
        pieces = encode_tensor(FrameKind.REPLY, ticket, outputs, service_s=service_s)
        self._open_tickets.discard(ticket)
        self.connection.send(pieces)

    def failed(self, ticket: int, message: str) -> None:
        self._open_tickets.discard(ticket)
        self.connection.send([encode_error(ticket, message)])

    def refused(self, ticket: int, message: str) -> None:
        self._open_tickets.discard(ticket)
        self.connection.send([encode_error(ticket, message, ErrorReason.NO_ROOM)])

    def cancelled(self, ticket: int) -> None:
        self._open_tickets.discard(ticket)
        self.connection.send([encode(FrameKind.CANCELLED, ticket)])

    # What the connection says.

    def _on_open(self) -> None:
        if self._trusted:
            self._greet()
            return
        strangers = self._room.strangers
        strangers[self] = None
        if len(strangers) > _MAX_STRANGERS:
            next(iter(strangers)).connection.abort()
        self.connection.limit_payload(UNPROVEN_BYTES)
        self._prove_timer = asyncio.get_running_loop().call_later(_PROVE_S, self.connection.abort)
        self.connection.send([encode_object(FrameKind.CHALLENGE, {"challenge": self._challenge})])

    def _refusal(self, error: ProtocolError) -> bytes:
        """Says what was wrong, but not to a stranger: he learns nothing, whatever he tries."""
        return encode_error(0, str(error)) if self._trusted else b""

    def _greet(self) -> None:
        room = self._room
        room.strangers.pop(self, None)
        if len(room.clients) >= room.max_clients:
            self.connection.send([encode_error(0, f"{room.max_clients} clients are connected; no more are taken")])
            self.connection.close()
            return
        room.clients.add(self)
        self.connection.limit_payload(room.max_payload_bytes)
        self.connection.send([self._room.hello])

    def _prove(self, frame: Frame) -> None:
        """Checks the client's proof, proves the same to it, and greets it."""
        if frame.kind is not FrameKind.PROOF:
            raise ProtocolError("this worker asks for a key; give the client the same one")
        words, key = frame.object(), self._key
        check_proof(words.get("proof"), key, "client", self._challenge, words.get("challenge"))
        self._trusted = True
        if self._prove_timer is not None:
            self._prove_timer.cancel()
        answer = {"proof": proof(key, "worker", self._challenge, str(words["challenge"]))}
        self.connection.send([encode_object(FrameKind.PROOF, answer)])
        self._greet()

    def _on_frame(self, frame: Frame) -> None:
        if not self._trusted:
            try:
                self._prove(frame)
            except ProtocolError as error:
                self._room.log_stranger(error)
                raise
        elif frame.kind is FrameKind.TASK:
            if frame.ticket == 0 or frame.ticket in self._open_tickets:
                raise ProtocolError(f"ticket {frame.ticket} is not free")
            inputs = frame.tensor() if frame.payload is not None else self._read_slot(frame)
            self._open_tickets.add(frame.ticket)
            self._runner.submit(self, frame.ticket, frame.key, frame.model, inputs)
        elif frame.kind is FrameKind.CANCEL:
            self._runner.cancel(self, frame.ticket)
        elif frame.kind is FrameKind.PING:
            self.connection.send([encode(FrameKind.PONG)])
        elif frame.kind is FrameKind.SHARE:
            self._open_memory(frame)
        else:
            raise ProtocolError(f"a worker is never sent a {frame.kind.name} frame")

    def _read_slot(self, frame: Frame) -> Array:
        if self._slots is None:
            raise ProtocolError("a task in shared memory before any was shared")
        return self._slots.tensor(frame)

    def _open_memory(self, frame: Frame) -> None:
        reason = ""
        try:
            if not self._room.shares or self._slots is not None:
                raise SharedMemoryError("only once on a Unix socket")
            self._slots = SlotReader(frame.object())
        except SharedMemoryError as error:
            reason = str(error)
        self.connection.send([encode_object(FrameKind.SHARED, {"accepted": not reason, "reason": reason})])

    def _on_end(self, error: Exception | None) -> None:
        self._room.clients.discard(self)
        self._room.strangers.pop(self, None)
        if self._prove_timer is not None:
            self._prove_timer.cancel()
        self._runner.forget(self)
        self._slots = None
        if not self.ended.done():
            self.ended.set_result(None)


@dataclass
class _SharedState:
    """Holds what all connections to one worker share."""

    hello: bytes
    shares: bool
    key: Callable[[], bytes]
    max_clients: int
    max_payload_bytes: int
    clients: set[_ConnectedClient] = field(default_factory=set)
    strangers: dict[_ConnectedClient, None] = field(default_factory=dict)  # in the order in which they came
    next_log_at: float = 0.0

    def log_stranger(self, error: ProtocolError) -> None:
        """Logs why a client was refused, but not each time: anybody may try as often as he likes."""
        now = asyncio.get_running_loop().time()
        if now >= self.next_log_at:
            self.next_log_at = now + _LOG_EVERY_S
            _log.warning("a client was refused: %s", error)


async def serve(
    models: Sequence[Model],
    listen: str,
    *,
    delay: Delay | None = None,
    delay_cost: float | None = None,
    delay_epoch_s: float | None = None,
    worker_number: int = 0,
    max_queued: int = 1024,
    drain_s: float = 10.0,
    key: bytes | Callable[[], bytes] = b"",
    tls: ServerTls | None = None,
    max_clients: int = 64,
    max_rows: int = 1024,
    stop: asyncio.Event | None = None,
    on_listening: Callable[[str], object] = lambda address: None,
) -> None:
    """Serves until `stop` is set (then finish what is queued, for `drain_s` at most) or, on `fd:N`, until it closes.

    Args:
        models: what tasks may ask for, by their place in this list.
        listen: `unix:/path`, `tcp://host:port` or `fd:N`.
        delay: an injected law of task times.
        delay_cost: multiplies its draws; None: each model's own `relative_cost` does.
        delay_epoch_s: when the experiment began, by `time.monotonic()`; None: now.
        worker_number: given to the delay.
        max_queued: more waiting tasks are refused.
        drain_s: how long finishing may take.
        key: that clients on TCP must hold, or what gives it for each connection; empty: none. On the other addresses
            only this user's processes can connect.
        tls: files of TLS, for TCP, with the authority that clients' certificates are of; None: links are not encrypted.
        max_clients: connections at once; further ones get an error and are closed.
        max_rows: of one task; of the models' rows, where these are of known shape, follows the longest payload.
        stop: set it to end.
        on_listening: called with the address once tasks can be sent; a tcp port of 0 is replaced by the real one.

    Raises:
        ConfigurationError: the address cannot be listened on, or a file of TLS cannot be used.
    """
    loop = asyncio.get_running_loop()
    stop = stop or asyncio.Event()
    runner = TaskRunner(
        models,
        LoopClock(loop),
        max_queued=max_queued,
        delay=delay,
        delay_cost=delay_cost,
        worker=worker_number,
        delay_epoch_s=delay_epoch_s,
    )
    address = parse_address(listen)
    hello = encode_object(FrameKind.HELLO, _hello(models, worker_number, shares=address.kind != "tcp"))
    room = _SharedState(
        hello,
        shares=address.kind != "tcp",
        key=(key if callable(key) else lambda: key) if address.kind == "tcp" else bytes,
        max_clients=max_clients,
        max_payload_bytes=_longest_payload(models, max_rows),
    )

    def accept() -> Connection:
        return _ConnectedClient(runner, room).connection

    door = None
    if tls is not None and address.kind == "tcp":
        if not tls.names_clients:
            raise ConfigurationError("TLS of a worker: the authority of its clients' certificates is missing")
        door = TlsDoor(server_contexts(tls), accept, handshake_s=_PROVE_S, max_handshakes=_MAX_STRANGERS)

    stopped = asyncio.ensure_future(stop.wait())
    server: asyncio.AbstractServer | None = None
    plain: socket.socket | None = None
    try:
        if address.kind == "fd":
            only = _ConnectedClient(runner, room)
            try:
                await loop.connect_accepted_socket(lambda: only.connection, socket.socket(fileno=address.number))
            except OSError as error:
                raise ConfigurationError(f"{address} is not an open socket: {error.strerror or error}") from error
            on_listening(listen)
            await asyncio.wait([stopped, only.ended], return_when=asyncio.FIRST_COMPLETED)
        else:
            plain = _bind(address)
            server = await (
                loop.create_unix_server(accept, sock=plain)
                if address.kind == "unix"
                else loop.create_server(accept if door is None else door.connect, sock=plain)
            )
            if address.kind == "tcp":
                address = Address("tcp", host=address.host, port=plain.getsockname()[1])
            on_listening(str(address))
            await stopped
        if server is not None:
            server.close()
        for stranger in list(room.strangers):
            stranger.connection.abort()
        if door is not None:
            door.abort()
        await _drain(runner, room.clients, drain_s)
    finally:
        stopped.cancel()
        if server is not None:
            server.close()
        if plain is not None and address.kind == "unix":  # it is ours to remove
            with contextlib.suppress(OSError):
                os.unlink(address.path)


async def _drain(runner: TaskRunner, clients: set[_ConnectedClient], drain_s: float) -> None:
    """Finishes what is queued, then closes every connection after its last byte."""
    for client in clients:
        client.connection.send([encode(FrameKind.GOODBYE)])
    empty = asyncio.Event()
    runner.stop(empty.set)
    if clients:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await empty.wait()
    ends = [client.ended for client in clients]
    for client in list(clients):
        client.connection.close()
    if ends:
        await asyncio.wait(ends, timeout=_FLUSH_S)
    for client in list(clients):
        client.connection.abort()


def _bind(address: Address) -> socket.socket:
    plain = None
    try:
        if address.kind == "tcp":
            family, kind, number, _, target = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            plain = socket.socket(family, kind, number)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            plain.bind(target)
        else:
            _remove_stale(address.path)
            plain = socket.socket(socket.AF_UNIX)
            mask = os.umask(0o177)  # for the owner only, from its first moment
            try:
                plain.bind(address.path)
            finally:
                os.umask(mask)
    except OSError as error:
        if plain is not None:
            plain.close()
        raise ConfigurationError(f"cannot listen on {address}: {error.strerror or error}") from error
    return plain


def _remove_stale(path: str) -> None:
    """Removes the socket that a worker which was killed left behind, but none that is in use."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)


def _longest_payload(models: Sequence[Model], max_rows: int) -> int:
    """Computes the bytes of the longest task that any of the models may be sent."""
    longest = 0
    for model in models:
        if model.input_shape is None or model.dtype is None:
            return MAX_PAYLOAD_BYTES
        longest = max(longest, max_rows * math.prod(model.input_shape) * np.dtype(model.dtype).itemsize)
    return min(longest, MAX_PAYLOAD_BYTES)


def _hello(models: Sequence[Model], worker_number: int, shares: bool) -> dict[str, Any]:
    return {
        "protocol": VERSION,
        "evenkeel": __version__,
        "worker": worker_number,
        "pid": os.getpid(),
        "shared_memory": shares,
        "models": [
            {
                "name": model.name,
                "input_shape": model.input_shape,
                "output_shape": model.output_shape,
                "dtype": model.dtype,
                "digest": model.digest,
                "batch": model.batch,
            }
            for model in models
        ],
    }
