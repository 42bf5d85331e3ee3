"""Carries gRPC from the socket to a handler and back, in plain callbacks: no task, no future, no waiting.

Each message of a call becomes an `Ask`, which the handler answers now or later. An ordinary call has one message and
one answer; a streaming one has many, answered in their order, of which a few are at work at once. What a client could
use up is bounded: sizes, times (by shared timers, see `Sweeper`), calls at once, messages sent ahead, connections.
"""

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

from evenkeel.clock import Clock
from evenkeel.errors import EvenkeelError, Http2Error, OverloadedError, RequestError, SlowRequestError, UnsupportedError
from evenkeel.http2.connection import Http2Connection, Http2Limits
from evenkeel.http2.grpc import GrpcMessageReader, GrpcStatus, frame_message, read_timeout_s, write_status_message
from evenkeel.http2.hpack import Headers, write_headers
from evenkeel.serving.front.access import Access
from evenkeel.serving.front.request_times import RequestTimes
from evenkeel.serving.front.shares import Client
from evenkeel.serving.front.sweeper import Sweeper
from evenkeel.trust.keys import Right
from evenkeel.trust.tls_door import peer_name

__all__ = ["Ask", "GrpcConnection", "GrpcHandler", "GrpcLimits", "GrpcMethod", "GrpcServer", "status_of"]

_log = logging.getLogger(__name__)

_CONTENT_TYPE = b"application/grpc"
_ENCODINGS = (b"grpc-accept-encoding", b"identity,gzip,deflate")
_HEAD = write_headers([(b":status", b"200"), (b"content-type", _CONTENT_TYPE), _ENCODINGS])
_OK = write_headers([(b"grpc-status", b"0")])
_NOT_GRPC = write_headers([(b":status", b"415")])
_NO_HTTP2 = b"HTTP/1.1 505 HTTP Version Not Supported\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"
_FULL = "the messages of all calls take up as much memory as they may; try again later"
_MAX_UNREAD = 4096  # messages of one stream that wait
_MAX_TEXT = 500  # characters of an error
_MAX_KNOWN = 64  # heads of calls that are remembered
_MAX_SENT_AWAY = 32  # clients beyond the limit of connections that are told so
_KEEP_ALIVE_S = 60  # without a word, after which the system asks whether the peer is there

# The status for an error that carries this HTTP status.
_STATUSES = {
    400: GrpcStatus.INVALID_ARGUMENT,
    401: GrpcStatus.UNAUTHENTICATED,
    403: GrpcStatus.PERMISSION_DENIED,
    404: GrpcStatus.NOT_FOUND,
    408: GrpcStatus.DEADLINE_EXCEEDED,
    409: GrpcStatus.FAILED_PRECONDITION,
    413: GrpcStatus.RESOURCE_EXHAUSTED,
    429: GrpcStatus.RESOURCE_EXHAUSTED,
    500: GrpcStatus.INTERNAL,
    501: GrpcStatus.UNIMPLEMENTED,
    502: GrpcStatus.UNAVAILABLE,
    503: GrpcStatus.UNAVAILABLE,
    504: GrpcStatus.DEADLINE_EXCEEDED,
}


def status_of(error: EvenkeelError) -> GrpcStatus:
    """Gives the status that stands for an error."""
    return _STATUSES.get(error.http_status, GrpcStatus.UNKNOWN)


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    """Limits what one client may use up. Times are enforced late, at most as much again."""

    message_bytes: int = 32 << 20
    message_timeout_s: float = 30.0  # from the first byte of a call, or of a message in a stream, to its end
    keep_alive_s: float = 75.0  # without any call
    write_timeout_s: float = 30.0  # without the client reading what waits for it
    linger_s: float = 2.0  # for a client to leave after it was asked to
    connections: int = 1000  # each of which may carry many calls
    bodies_bytes: int = 256 << 20  # of all clients together: messages that are being read, decoded or answered
    free_bytes: int = 1 << 20  # of one connection, whose messages are not refused for what others take up
    ahead: int = 16  # messages of one stream that are at work at once
    http2: Http2Limits = field(default_factory=Http2Limits)


class Ask:
    """Holds one message of a call and the way to answer it.

    Attributes:
        call: it is part of.
        message: as it was sent; compressed where `packed` says so.
        packed: how it is compressed: gzip or deflate; empty for not at all.
        label: for the handler's own use.
        since_s: when the call began, or the message of a stream was read, by `time.monotonic`.
        times: of requests, to which this one is to be added.
    """

    __slots__ = ("answer", "call", "held", "label", "message", "packed", "since_s", "times")

    def __init__(self, call: "_OpenCall", message: bytes, packed: str) -> None:
        self.call = call
        self.message = message
        self.packed = packed
        self.label = b""
        self.since_s = time.monotonic() if call.streams else call.since_s
        self.times: RequestTimes | None = None
        self.held = 0  # bytes that are counted for it
        self.answer: bytes | None = None  # of a stream, while an earlier message has none

    @property
    def path(self) -> bytes:
        """Gives the full name of the method."""
        return self.call.path

    @property
    def client(self) -> Client:
        """Gives the client that sent it."""
        return self.call.connection.client

    @property
    def streamed(self) -> bool:
        """Tells whether more messages may come and go in the same call."""
        return self.call.streams

    @property
    def may_manage(self) -> bool:
        """Tells whether a call that needs the right to manage may be done: who has not got it was refused before."""
        return self.call.connection.checks_rights

    @property
    def until_s(self) -> float | None:
        """Gives the loop's time by which the client wants the answer; None if it set none."""
        return self.call.until_s

    def hold(self, size: int) -> None:
        """Counts `size` bytes more as taken up until it is answered.

        Raises:
            OverloadedError: all together would take up too much.
        """
        self.call.connection.hold(self, size)

    def respond(self, message: bytes) -> None:
        """Sends the answer; does nothing when the client is gone."""
        self.call.connection.answer(self, message)

    def fail(self, error: EvenkeelError) -> None:
        """Ends the call with the status of an error; does nothing when the client is gone."""
        self.call.connection.refuse(self, error)


@dataclass(frozen=True, slots=True)
class GrpcMethod:
    """Says how a method is called.

    Attributes:
        right: that is needed to call it; None for none.
        streams: messages come and go as a stream.
    """

    right: Right | None = "infer"
    streams: bool = False


class GrpcHandler(Protocol):
    """Answers messages."""

    def method(self, path: bytes) -> "GrpcMethod | None":
        """Gives the method of that full name; None if there is none."""

    def handle(self, ask: Ask) -> object:
        """Answers `ask`, now or later, by one call of its `respond` or `fail`. Must not raise."""

    def gone(self, ask: Ask) -> object:
        """Learns that the client of an unanswered message went away."""


class _OpenCall:
    """Holds one call that has not ended."""

    __slots__ = (
        "asks",
        "begun",
        "connection",
        "counted",
        "ended",
        "head",
        "known",
        "late",
        "owed",
        "packing",
        "path",
        "reader",
        "since_s",
        "stream",
        "streams",
        "traceparent",
        "unread",
        "until_s",
        "waiting_bytes",
    )

    def __init__(self, connection: "GrpcConnection", stream: int, head: "_CallHead", until_s: float | None) -> None:
        self.connection = connection
        self.stream = stream
        self.head = head
        self.known = True  # who calls was let in with the next message, too
        self.path = head.path
        self.streams = head.method is not None and head.method.streams
        self.packing = head.packing
        self.traceparent = head.traceparent
        self.until_s = until_s
        self.reader = GrpcMessageReader(connection.limits.message_bytes)
        self.asks: deque[Ask] = deque()  # that are not answered, in their order
        self.since_s = time.monotonic()
        self.unread: deque[tuple[bytes, bool]] = deque()  # messages beyond those that may be at work
        self.owed = 0  # bytes of which the client has not been told that they are read
        self.counted = 0  # bytes of an incomplete message that are counted as taken up
        self.waiting_bytes = 0  # the same, of the messages that wait
        self.begun = False  # the response's headers are sent
        self.ended = False  # nothing more comes
        self.late: Callable[[], object] | None = None  # what the timer calls


@dataclass(frozen=True, slots=True)
class _CallHead:
    """Says what a call's headers say."""

    path: bytes
    method: GrpcMethod | None
    packing: str
    authorization: str
    traceparent: str
    timeout_s: float | None


class GrpcServer:
    """Holds what the connections of one server share.

    Args:
        handler: answers messages.
        limits: of each client.
        clock: gives the clock of the timeouts; by default the running event loop.
        access: says which calls are let in; None: all are.

    Attributes:
        connections: open ones.
        held_bytes: of the messages that have come, in part or whole, and are not answered.
        empty: set while there are no connections.
    """

    def __init__(
        self,
        handler: GrpcHandler,
        limits: GrpcLimits,
        clock: Callable[[], Clock] = asyncio.get_running_loop,
        access: Access | None = None,
    ) -> None:
        self.clock = clock
        self.access = access
        self.handler = handler
        self.limits = limits
        self.connections: set[GrpcConnection] = set()
        self.held_bytes = 0
        self.empty = asyncio.Event()
        self.empty.set()
        self.closing = False
        self.idle_patience = Sweeper(limits.keep_alive_s, clock)
        self.message_patience = Sweeper(limits.message_timeout_s, clock)
        self.write_patience = Sweeper(limits.write_timeout_s, clock)
        self.linger_patience = Sweeper(limits.linger_s, clock)
        self._heads: dict[Headers, _CallHead | None] = {}

    def connect(self) -> "GrpcConnection":
        """Makes a new connection."""
        return GrpcConnection(self)

    def announce(self) -> None:
        """Asks all clients to make no further calls here; those that they make all the same are answered."""
        for connection in list(self.connections):
            connection.announce()

    def close(self) -> None:
        """Closes idle connections now, and the others once what they have sent is answered."""
        self.closing = True
        for connection in list(self.connections):
            connection.close_soon()

    def abort(self) -> None:
        """Closes all connections at once."""
        for connection in list(self.connections):
            connection.abort()

    def head(self, headers: Headers, certificate: str, address: str) -> _CallHead | None:
        """Reads the headers of a call, and lets it in; gives None for those of something else.

        Args:
            headers: of the call.
            certificate: the name in the client's, if it showed one.
            address: of the client; empty for one on this machine.

        Raises:
            EvenkeelError: they are wrong, or the call is not allowed.
        """
        if headers in self._heads:
            head = self._heads[headers]
        else:
            head = _read_head(headers, self.handler.method)
            if len(self._heads) >= _MAX_KNOWN:
                self._heads.clear()
            self._heads[headers] = head
        if head is not None:
            self.admit(head, certificate, address)
            if head.method is None:  # which strangers need not know
                raise UnsupportedError(f"nothing is served at {head.path[:200].decode('latin-1')}")
        return head

    def admit(self, head: _CallHead, certificate: str, address: str) -> None:
        """Lets a call in, or the next message of one.

        Raises:
            EvenkeelError: it is not allowed.
        """
        if self.access is not None:
            right: Right | None = "infer" if head.method is None else head.method.right
            self.access.admit(right, head.authorization, certificate, address, not address)


def _read_head(headers: Headers, method: Callable[[bytes], GrpcMethod | None]) -> _CallHead | None:
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name.startswith(b":") and name in found:
            raise RequestError(f"header {name.decode('latin-1')[:40]} is given twice")
        found[name] = value
    if not found.get(b"content-type", b"").startswith(_CONTENT_TYPE):
        return None
    path = found.get(b":path", b"")
    if found.get(b":method") != b"POST" or not path.startswith(b"/"):
        raise RequestError("a gRPC call is a POST to /service/method")
    packing = found.get(b"grpc-encoding", b"identity").decode("latin-1")
    if packing not in ("identity", "gzip", "deflate"):
        raise UnsupportedError(f"grpc-encoding {packing[:20]!r} is not offered; send gzip, deflate or identity")
    timeout_s = None if b"grpc-timeout" not in found else read_timeout_s(found[b"grpc-timeout"])
    authorization = found.get(b"authorization", b"").decode("latin-1")
    traceparent = found.get(b"traceparent", b"").decode("latin-1")
    return _CallHead(path, method(path), packing, authorization, traceparent, timeout_s)


class GrpcConnection(asyncio.Protocol):
    """Serves one connection.

    Attributes:
        client: who is at the other end.
        limits: of the server.
    """

    _transport: asyncio.Transport
    _http2: Http2Connection

    def __init__(self, server: GrpcServer) -> None:
        self.limits = server.limits
        self._server = server
        self._calls: dict[int, _OpenCall] = {}
        self._held_bytes = 0  # this connection's share of the server's
        self._ending = False  # nothing is answered any more
        self._leaving = False  # it closes as soon as nothing is under way
        self._idle = False  # the timer of idle connections runs
        self._stuck = 0  # the stream for whose client to read the timer runs
        self._on_idle: Callable[[], object] = self._was_idle

    @property
    def checks_rights(self) -> bool:
        """Tells whether calls are let in by the rights that their keys give."""
        return self._server.access is not None

    # ---- the transport's side ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Says what clients may do, or refuses when there are too many connections."""
        server = self._server
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own have no common ancestor with asyncio's
        peer = transport.get_extra_info("peername")
        self.client = Client(peer[0] if isinstance(peer, tuple) else "")
        self._certificate = "" if server.access is None else peer_name(transport)
        self._watch_peer()
        others = len(server.connections)
        server.connections.add(self)
        server.empty.clear()
        self._http2 = Http2Connection(self, self._transport.write, self.limits.http2, client=False)
        if others >= self.limits.connections + _MAX_SENT_AWAY:
            self.abort()
        elif others >= self.limits.connections or server.closing:
            self.close_soon()
        else:
            self._rest()

    def _watch_peer(self) -> None:
        """Lets the system find out when the peer vanishes: a stream may be quiet for hours."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets everything, and lets the handler know that nobody waits any more."""
        server = self._server
        self._ending = True
        self._http2.over = True
        server.idle_patience.remove(self._on_idle)
        server.write_patience.remove(self.abort)
        server.write_patience.remove(self._abort_stuck)
        server.linger_patience.remove(self.abort)
        calls, self._calls = self._calls, {}
        for call in calls.values():
            self._forget(call)
        server.held_bytes -= self._held_bytes
        self._held_bytes = 0
        del self._on_idle  # which holds this object: only the garbage collector would free it
        server.connections.discard(self)
        if not server.connections:
            server.empty.set()

    def data_received(self, data: bytes) -> None:
        """Reads calls."""
        try:
            self._http2.feed(data)
        except Http2Error as error:
            if not self._http2.settled and data[:1].isalpha():
                self._transport.write(_NO_HTTP2 + f"{error}\n".encode())
            self._end()
        except Exception:
            _log.exception("unexpected error while reading a call")
            self.abort()

    def eof_received(self) -> None:
        """Drops the connection: the client went away."""
        self._end()

    def pause_writing(self) -> None:
        """Reads nothing while the client does not read, and gives it some time."""
        if not self._ending:
            self._transport.pause_reading()
            self._server.write_patience.add(self.abort)

    def resume_writing(self) -> None:
        """Goes on, as the client reads again."""
        if not self._ending:
            self._transport.resume_reading()
            self._server.write_patience.remove(self.abort)

    # ---- the streams' side ----

    def on_headers(self, stream: int, headers: Headers, ended: bool) -> None:
        """Begins a call."""
        if stream in self._calls:  # trailers, which mean nothing in a request
            self._on_end(self._calls[stream])
            return
        try:
            head = self._server.head(headers, self._certificate, self.client.address)
        except EvenkeelError as error:
            self._http2.send(stream, b"", b"", _HEAD + _failure(error))
            return
        if head is None:
            self._http2.send(stream, b"", b"", _NOT_GRPC)
            return
        until_s = None if head.timeout_s is None else self._server.clock().time() + head.timeout_s
        call = self._calls[stream] = _OpenCall(self, stream, head, until_s)
        if self._idle:
            self._idle = False
            self._server.idle_patience.remove(self._on_idle)
        if ended:
            self._on_end(call)
        elif not call.streams:
            self._wait_for_rest(call)

    def on_data(self, stream: int, data: bytes, ended: bool) -> None:
        """Goes on with a call."""
        call = self._calls.get(stream)
        if call is None:
            return
        reader = call.reader
        found = reader.feed(data)
        call.unread += found
        came, rest = sum(len(message) for message, _ in found), reader.rest_bytes
        self._count(came + rest - call.counted)
        call.waiting_bytes += came
        call.counted = rest
        call.owed += len(data)
        if call.streams:
            self._advance(call)
            if stream not in self._calls:
                return
        error: EvenkeelError | None = reader.error
        if error is None and not call.streams and len(call.unread) > 1:
            error = RequestError("a call of this method has one message; found more")
        if error is None and len(call.unread) > _MAX_UNREAD:
            error = OverloadedError(f"more than {_MAX_UNREAD} messages of one call wait; wait for answers")
        if error is not None:
            self.fail(call, error)
        elif ended:
            self._on_end(call)
        else:
            self._wait_for_more(call)

    def on_reset(self, stream: int, code: int) -> None:
        """Gives a call up, as its client did."""
        call = self._calls.pop(stream, None)
        if call is not None:
            self._forget(call)
            self._close_if_done()

    def on_goaway(self, code: int) -> None:
        """Needs nothing to be done: the client makes no further calls."""

    def on_room(self, stream: int) -> None:
        """Goes on with a stream whose client reads again."""
        if stream == self._stuck:
            self._stuck = 0
            self._server.write_patience.remove(self._abort_stuck)
        self._after_write()
        call = self._calls.get(stream)
        if call is not None and call.streams:
            self._advance(call)
            self._give_room(call)
        self._close_if_done()

    def _wait_for_more(self, call: _OpenCall) -> None:
        """Lets the client of a call that goes on send more, unless there is too much already."""
        rest = call.counted
        if self._is_full(rest + call.waiting_bytes):
            self.fail(call, OverloadedError(_FULL))
            return
        if call.streams and (call.late is None) == bool(rest):
            if rest:
                self._wait_for_rest(call)
            else:
                self._stop_waiting(call)
        self._give_room(call)

    def _give_room(self, call: _OpenCall) -> None:
        if call.owed and len(call.unread) < self.limits.ahead:
            self._http2.give_room(call.stream, call.owed)
            call.owed = 0

    def _on_end(self, call: _OpenCall) -> None:
        call.ended = True
        self._stop_waiting(call)
        if call.counted:
            self.fail(call, RequestError("the last message of the call is cut off"))
        elif call.streams:
            self._advance(call)
        elif call.unread:
            self._hand_over(call, *call.unread.popleft())
        else:
            self.fail(call, RequestError("a call of this method has one message; found none"))

    def _advance(self, call: _OpenCall) -> None:
        """Hands over messages of a stream, as many as may be at work; ends it when all is answered.

        While the client does not read the answers that there are, it gets no more.
        """
        http2, stream = self._http2, call.stream
        while call.unread and len(call.asks) < self.limits.ahead and stream in self._calls:
            if http2.is_blocked(stream):
                return
            self._hand_over(call, *call.unread.popleft())
        if call.ended and not call.unread and not call.asks and call.stream in self._calls:
            del self._calls[call.stream]
            self._http2.send(call.stream, b"", b"", _OK if call.begun else _HEAD + _OK)
            self._close_if_done()

    def _hand_over(self, call: _OpenCall, message: bytes, packed: bool) -> None:
        size = len(message)
        call.waiting_bytes -= size
        error: EvenkeelError | None = None
        if packed and call.packing == "identity":
            error = RequestError("a message is compressed, but no grpc-encoding says how")
        elif self._is_full(size):
            error = OverloadedError(_FULL)
        elif not call.known:
            try:
                self._server.admit(call.head, self._certificate, self.client.address)
            except EvenkeelError as refused:
                error = refused
        if error is not None:
            self._count(-size)
            self.fail(call, error)
            return
        call.known = (
            False  # of a stream the next message is asked again: it may be open for longer than its key is good
        )
        ask = Ask(call, message, call.packing if packed else "")
        ask.held = size  # as it was counted when it came
        call.asks.append(ask)
        self._server.handler.handle(ask)

    # ---- the handler's side ----

    def hold(self, ask: Ask, size: int) -> None:
        """Does what `Ask.hold` says."""
        if self._ending or ask.call.stream not in self._calls:
            return
        ask.held += size
        self._count(size)
        if self._is_full(size):
            raise OverloadedError(_FULL)

    def answer(self, ask: Ask, message: bytes) -> None:
        """Does what `Ask.respond` says."""
        call = ask.call
        if self._calls.get(call.stream) is not call or ask.answer is not None:
            return
        if not call.streams:
            del self._calls[call.stream]
            call.asks.clear()
            self._release(ask)
            self._http2.send(call.stream, _HEAD, frame_message(message), _OK)
            self._after_write()
            self._close_if_done()
            return
        ask.answer = message
        self._release(ask)
        parts = []
        while call.asks and call.asks[0].answer is not None:
            parts.append(frame_message(call.asks.popleft().answer or b""))
        if parts:
            head, call.begun = b"" if call.begun else _HEAD, True  # before it is sent, which may have more handed over
            self._http2.send(call.stream, head, b"".join(parts))
            self._after_write()
            self._advance(call)
            self._give_room(call)

    def refuse(self, ask: Ask, error: EvenkeelError) -> None:
        """Does what `Ask.fail` says."""
        call = ask.call
        if self._calls.get(call.stream) is call and ask in call.asks:
            call.asks.remove(ask)
            self._release(ask)
            self.fail(call, error)

    def fail(self, call: _OpenCall, error: EvenkeelError) -> None:
        """Ends a call with the status of an error; the handler hears which of its messages need no answer any more."""
        if self._calls.get(call.stream) is not call:
            return
        del self._calls[call.stream]
        self._forget(call)
        failure = _failure(error)
        self._http2.send(call.stream, b"", b"", failure if call.begun else _HEAD + failure)
        self._after_write()
        self._close_if_done()

    def announce(self) -> None:
        """Asks the client to make no further calls."""
        self._http2.leave(soon=True)

    def close_soon(self) -> None:
        """Takes no further calls, and closes when those under way are answered."""
        if not self._leaving:
            self._leaving = True
            self._http2.leave()
        self._close_if_done()

    def abort(self) -> None:
        """Closes at once; what is not sent yet is lost."""
        self._ending = True
        self._transport.abort()

    def _after_write(self) -> None:
        """Times the stream that has waited longest for its client to read: others may come and go meanwhile."""
        if not self._stuck and self._http2.blocked:
            self._stuck = self._http2.longest_blocked
            self._server.write_patience.add(self._abort_stuck)

    def _abort_stuck(self) -> None:
        self.abort()

    def _forget(self, call: _OpenCall) -> None:
        """Lets go of what a call held, and lets the handler know of each message without an answer."""
        self._stop_waiting(call)
        self._count(-call.counted - call.waiting_bytes)
        call.counted = call.waiting_bytes = 0
        call.unread.clear()
        asks = list(call.asks)
        call.asks.clear()
        for ask in asks:
            self._release(ask)
            if ask.answer is None:
                self._server.handler.gone(ask)

    def _release(self, ask: Ask) -> None:
        self._count(-ask.held)
        ask.held = 0

    def _count(self, size: int) -> None:
        self._held_bytes += size
        self._server.held_bytes += size

    def _is_full(self, size: int) -> bool:
        """Tells whether a message that takes up `size` is refused, because all together take up too much.

        One that is alone never is: it would not be served later, either. Nor are those of a connection with few bytes.
        """
        held, limits = self._server.held_bytes, self.limits
        return held > limits.bodies_bytes and held > size and self._held_bytes > limits.free_bytes

    # ---- times and ends ----

    def _wait_for_rest(self, call: _OpenCall) -> None:
        def late() -> None:
            call.late = None
            self.fail(call, SlowRequestError("the rest of the message did not come in time"))

        call.late = late
        self._server.message_patience.add(late)

    def _stop_waiting(self, call: _OpenCall) -> None:
        if call.late is not None:
            self._server.message_patience.remove(call.late)
            call.late = None

    def _rest(self) -> None:
        if not self._idle:
            self._idle = True
            self._server.idle_patience.add(self._on_idle)

    def _was_idle(self) -> None:
        self._idle = False
        self.close_soon()

    def _close_if_done(self) -> None:
        if self._calls or self._ending:
            return
        if not self._leaving:
            self._rest()
        elif not self._http2.blocked:
            # The client closes when it has read that nothing more is taken. To close here could destroy its answers,
            # and what it sends meanwhile is refused, so that it asks elsewhere.
            self._server.linger_patience.add(self.abort)

    def _end(self) -> None:
        """Closes once what is written is sent."""
        self._ending = True
        self._server.linger_patience.add(self.abort)
        self._transport.close()


def _failure(error: EvenkeelError) -> bytes:
    """Writes the trailers that say how a call failed."""
    text = str(error)[:_MAX_TEXT]
    fields = [(b"grpc-status", b"%d" % status_of(error)), (b"grpc-message", write_status_message(text))]
    if isinstance(error, OverloadedError):
        fields.append((b"grpc-retry-pushback-ms", b"%d" % max(1, round(error.retry_after_s * 1e3))))
    return write_headers(fields)
