"""Carries HTTP/1.1 from the socket to a handler and back, in plain callbacks: no task, no future, no waiting.

A connection hands the requests that its reader gives (`reader.py`) to the handler one at a time, and answers in their
order. What a client could use up is bounded: sizes, times (by shared timers, see `Sweeper`), requests sent ahead,
connections.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol, cast

import orjson

from evenkeel.clock import Clock
from evenkeel.errors import ForbiddenError, OverloadedError, UnauthenticatedError
from evenkeel.serving.front.access import Access
from evenkeel.serving.front.request_times import RequestTimes
from evenkeel.serving.front.shares import Client
from evenkeel.serving.front.sweeper import Sweeper
from evenkeel.serving.http.heads import ResponseHeads
from evenkeel.serving.http.paths import right_for
from evenkeel.serving.http.reader import ReadLimits, Refusal, Request, RequestReader, State
from evenkeel.trust.tls_door import peer_name

__all__ = ["Exchange", "Handler", "HttpConnection", "HttpLimits", "HttpServer"]

_log = logging.getLogger(__name__)

_AUTHORIZATION = b"authorization"
_JSON = b"content-type: application/json\r\n"
_CLOSE = b"connection: close\r\n"
_KEEP = b"connection: keep-alive\r\n"
_LATER = b"retry-after: 1\r\n"
_FULL = "the bodies of all requests take up as much memory as they may; try again later"
_FREE_BYTES = 64 << 10  # a body up to that is never refused for what others take up
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_JOIN_UP_TO_BYTES = 1 << 16  # a body beyond is handed to the transport beside its head, not copied behind it
_MAX_AHEAD = 16  # requests that a client may send before the answer to an earlier one; beyond, reading stops
_MAX_AHEAD_BYTES = 1 << 18
_MAX_SENT_AWAY = 32  # clients beyond the limit of connections that get their 503 in peace
_MAX_AT_ONCE = 16  # requests of one connection that are answered before other connections get their turn


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits what one client may use up. Times are enforced late, at most as much again."""

    sizes: ReadLimits = field(default_factory=ReadLimits)
    head_timeout_s: float = 20.0  # from a request's first byte to the end of its head
    body_timeout_s: float = 30.0  # from there to the end of its body
    keep_alive_s: float = 75.0  # without any request
    write_timeout_s: float = 30.0  # without the client reading what fills the buffers
    linger_s: float = 2.0  # for a client to read the answer to what it is still sending
    connections: int = 10_000
    bodies_bytes: int = 256 << 20  # of all clients together: bodies that are being read, decoded or answered


class Handler(Protocol):
    """Answers requests."""

    def handle(self, exchange: "Exchange") -> object:
        """Answers `exchange`, now or later, by one call of its `respond`. Must not raise."""

    def gone(self, exchange: "Exchange") -> object:
        """Learns that the client of an unanswered exchange went away."""


class Exchange:
    """Holds one request and the way to answer it.

    Attributes:
        times: where the handler measures it, if it does.
        last: ask the client to close once nothing else is under way on its connection.
    """

    __slots__ = ("_connection", "last", "request", "times")

    @property
    def client(self) -> Client:
        """Gives the client that sent the request."""
        return self._connection.client

    def __init__(self, connection: "HttpConnection", request: Request) -> None:
        self._connection = connection
        self.request = request
        self.times: RequestTimes | None = None
        self.last = False

    @property
    def may_manage(self) -> bool:
        """Tells whether a request that needs the right to manage may be done: who has not got it was refused before."""
        return self._connection.checks_rights

    def hold(self, size: int) -> None:
        """Counts `size` bytes more as taken up by this request until it is answered.

        Raises:
            OverloadedError: all requests together would take up too much.
        """
        self._connection.hold(self, size)

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """Sends the answer; does nothing when the client is gone.

        Args:
            status: HTTP status.
            headers: lines, each with its line end; length, date and connection are added.
            body: whole; not sent when the method is HEAD.
        """
        self._connection.answer(self, status, headers, body)

    def begin(self, status: int, headers: bytes) -> None:
        """Sends the head of an answer whose end is that of the connection; `send` sends its parts.

        It ends when the client goes, which the handler learns by `gone`, or when the server closes.
        """
        self._connection.begin(self, status, headers)

    def send(self, part: bytes) -> None:
        """Sends a part of an answer that was begun, unless the client does not read: then it misses that part."""
        self._connection.send(self, part)


class HttpServer:
    """Holds what the connections of one server share.

    Args:
        handler: answers requests.
        limits: of each client.
        headers: lower-case names of the headers that the handler reads; others are dropped.
        clock: gives the clock of the timeouts; by default the running event loop.
        responses: counts what is sent, by its status.
        access: says which requests are let in; None: all are.
        trusted: whoever can connect may manage the server.

    Attributes:
        connections: open ones.
        held_bytes: of the bodies that have come, in part or whole, and are not answered.
        empty: set while there are none.
    """

    def __init__(
        self,
        handler: Handler,
        limits: HttpLimits,
        headers: Collection[bytes],
        clock: Callable[[], Clock] = asyncio.get_running_loop,
        responses: Counter[int] | None = None,
        access: Access | None = None,
        trusted: bool = False,
    ) -> None:
        self.clock = clock
        self.responses: Counter[int] = Counter() if responses is None else responses
        self.access = access
        self.trusted = trusted
        self.handle = handler.handle
        self.gone = handler.gone
        self.limits = limits
        self.wanted = frozenset(headers) | (frozenset() if access is None else {_AUTHORIZATION})
        self.heads = ResponseHeads()
        self.connections: set[HttpConnection] = set()
        self.held_bytes = 0  # of all bodies that are here
        self.empty = asyncio.Event()
        self.empty.set()
        self.closing = False
        self.patience: dict[State, Sweeper] = {
            "idle": Sweeper(limits.keep_alive_s, clock),
            "head": Sweeper(limits.head_timeout_s, clock),
            "body": Sweeper(limits.body_timeout_s, clock),
        }
        self.write_patience = Sweeper(limits.write_timeout_s, clock)
        self.linger_patience = Sweeper(limits.linger_s, clock)

    def connect(self) -> "HttpConnection":
        """Makes a new connection."""
        return HttpConnection(self)

    def close(self) -> None:
        """Closes idle connections now, and the others once what they have sent is answered."""
        self.closing = True
        for connection in list(self.connections):
            connection.close_soon()

    def abort(self) -> None:
        """Closes all connections at once."""
        for connection in list(self.connections):
            connection.abort()


class HttpConnection(asyncio.Protocol):
    """Serves one connection.

    Attributes:
        client: who is at the other end.
    """

    __slots__ = (
        "_certificate",
        "_current",
        "_current_bytes",
        "_ending",
        "_held_bytes",
        "_is_new",
        "_on_late",
        "_read_paused",
        "_reader",
        "_running",
        "_server",
        "_streams",
        "_transport",
        "_waiting",
        "_waiting_bytes",
        "_watching",
        "_write_paused",
        "client",
    )

    _transport: asyncio.Transport

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._reader = RequestReader(server.limits.sizes, server.wanted, None if server.access is None else self._admit)
        self._certificate = ""  # the name in it, where the client showed one
        self._on_late: Callable[[], object] = self._late  # one object, made once: it is added for every request
        self._watching: Sweeper | None = None  # what counts the time that the client takes to send

        self._current: Exchange | None = None  # with the handler
        self._waiting: deque[Request | Refusal] = deque()
        self._waiting_bytes = 0
        self._running = False
        self._held_bytes = 0  # this connection's share of the server's
        self._current_bytes = 0  # of that, for the request that the handler has

        self._is_new = True  # nothing has come yet
        self._streams = False  # an answer was begun whose end is that of the connection
        self._ending = False  # nothing is answered any more
        self._read_paused = False
        self._write_paused = False

    @property
    def checks_rights(self) -> bool:
        """Tells whether only those get here who may do what they ask for."""
        return self._server.trusted or self._server.access is not None

    # ---- the transport's side ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts to read, or refuses when there are too many connections."""
        server = self._server
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own have no common ancestor with asyncio's
        peer = transport.get_extra_info("peername")
        self.client = Client(peer[0] if isinstance(peer, tuple) else "")
        if server.access is not None:
            self._certificate = peer_name(transport)
        others = len(server.connections)
        server.connections.add(self)
        server.empty.clear()
        if others >= server.limits.connections:
            self._reader.stop()
            self._refuse(Refusal(503, "too many connections are open; try again later"))
            if others >= server.limits.connections + _MAX_SENT_AWAY:
                self._end()  # without a wait for what it still sends
        elif server.closing:
            self._watch_new()
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets everything, and lets the handler know that nobody waits any more."""
        server = self._server
        self._ending = True
        self._unwatch()
        server.write_patience.remove(self.abort)
        server.linger_patience.remove(self.abort)
        current, self._current = self._current, None
        self._waiting.clear()
        self._reader.close()
        self._server.held_bytes -= self._held_bytes
        del self._on_late  # which holds this object: only the garbage collector would free it
        if current is not None:
            server.gone(current)
        server.connections.discard(self)
        if not server.connections:
            server.empty.set()

    def data_received(self, data: bytes) -> None:
        """Reads requests."""
        self._is_new = False
        reader = self._reader
        reader.now_s = monotonic()
        before = reader.state
        try:
            events = reader.feed(data)
            if self._watching is not None and (events or reader.state != before):
                self._unwatch()
            if len(events) == 1 and self._current is None and not self._waiting and not self._write_paused:
                self._hand_over(events[0])
            elif events:
                self._line_up(events)
        except Exception:
            # Nobody knows how far it came, so there is nothing to say that would surely be in its place.
            _log.exception("unexpected error while reading a request")
            self.abort()
            return
        if reader.state != "idle":
            self._wait_for_rest()

    def eof_received(self) -> None:
        """Drops the connection: the client went away or will not send any more, and one cannot see which."""
        self._end()

    def pause_writing(self) -> None:
        """Begins no further answers while the client does not read, and gives it some time."""
        self._write_paused = True
        self._server.write_patience.add(self.abort)

    def resume_writing(self) -> None:
        """Goes on with the answers, as the client reads again."""
        self._write_paused = False
        if not self._ending:
            self._server.write_patience.remove(self.abort)
            self._advance()

    def _admit(self, request: Request) -> Refusal | None:
        """Refuses a request of whom the server does not let in."""
        access, target = self._server.access, request.target
        assert access is not None
        authorization = request.headers.pop(_AUTHORIZATION, b"").decode("latin-1")  # nobody else needs it
        address = self.client.address
        try:
            request.who = access.admit(right_for(target), authorization, self._certificate, address, not address)
        except (UnauthenticatedError, ForbiddenError) as error:
            challenge = b"www-authenticate: %b\r\n" % error.challenge.encode() if error.challenge else b""
            return Refusal(error.http_status, str(error), request.method, challenge)
        return None

    # ---- the handler's side ----

    def answer(self, exchange: Exchange, status: int, headers: bytes, body: bytes) -> None:
        """Does what `Exchange.respond` says."""
        if self._current is not exchange:
            return
        self._current = None
        if self._held_bytes:
            self._current_bytes = 0
            self._recount()
        request = exchange.request
        keep = request.keep
        if keep and (exchange.last or self._server.closing):
            keep = bool(self._waiting) or self._reader.state != "idle" or self._read_paused
        connection = b""
        if not keep:
            connection = _CLOSE
        elif b"connection" in request.headers and b"keep-alive" in request.headers[b"connection"].lower():
            connection = _KEEP  # a client that speaks HTTP/1.0 would not expect it otherwise
        self._write(status, headers + connection, body, request.method)
        if not keep:
            self._end()
        elif self._waiting:
            self._advance()
        else:
            self._rest()

    def hold(self, exchange: Exchange, size: int) -> None:
        """Does what `Exchange.hold` says."""
        if self._current is exchange:
            self._current_bytes += size
            self._recount()
            if self._is_full(size):
                raise OverloadedError(_FULL)

    def begin(self, exchange: Exchange, status: int, headers: bytes) -> None:
        """Does what `Exchange.begin` says."""
        if self._current is exchange:
            self._streams = True
            self._reader.stop()  # nothing could be answered behind it
            self._waiting.clear()
            self._server.responses[status] += 1
            self._transport.write(b"%b%b%b\r\n" % (self._server.heads.start(status), headers, _CLOSE))

    def send(self, exchange: Exchange, part: bytes) -> None:
        """Does what `Exchange.send` says."""
        if self._current is exchange and not (self._write_paused or self._ending):
            self._transport.write(part)

    def close_soon(self) -> None:
        """Closes if idle, or if its answer has no end; a client that just connected gets a moment for its request."""
        if self._streams:
            self._end()
        elif self._is_new:
            self._unwatch()
            self._watch_new()
        else:
            self.close_if_idle()

    def close_if_idle(self) -> None:
        """Closes unless something is under way."""
        if self._current is None and not self._waiting and self._reader.state in ("idle", "over"):
            self._end()

    def abort(self) -> None:
        """Closes at once; what is not sent yet is lost."""
        self._reader.stop()
        self._transport.abort()

    def _write(self, status: int, headers: bytes, body: bytes, method: bytes) -> None:
        self._server.responses[status] += 1
        head = b"%b%bcontent-length: %d\r\n\r\n" % (self._server.heads.start(status), headers, len(body))
        if method == b"HEAD":
            self._transport.write(head)
        elif len(body) <= _JOIN_UP_TO_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    # ---- order ----

    def _recount(self) -> None:
        """Updates the server's count of bodies. A small one that need not wait for its turn is not counted."""
        held = self._current_bytes + self._waiting_bytes + self._reader.body_bytes
        self._server.held_bytes += held - self._held_bytes
        self._held_bytes = held

    def _is_full(self, size: int) -> bool:
        """True if a request that takes up `size` is refused, because all together take up too much.

        One that is alone never is: it would not be served later, either.
        """
        held = self._server.held_bytes
        return size > _FREE_BYTES and held > self._server.limits.bodies_bytes and held > self._held_bytes

    def _line_up(self, events: list[Request | Refusal]) -> None:
        for event in events:
            self._waiting.append(event)
            if isinstance(event, Request):
                self._waiting_bytes += event.body_bytes
        self._recount()
        full = len(self._waiting) > _MAX_AHEAD or self._waiting_bytes > _MAX_AHEAD_BYTES
        if full and not self._read_paused and self._reader.state != "over":
            self._read_paused = True
            self._transport.pause_reading()
        self._advance()

    def _hand_over(self, event: Request | Refusal) -> None:
        if isinstance(event, Request):
            exchange = self._current = Exchange(self, event)
            size = event.body_bytes
            if size > _FREE_BYTES:
                self._current_bytes = size
                self._recount()
                if self._is_full(size):
                    exchange.respond(503, _JSON + _LATER, orjson.dumps({"error": _FULL}))
                    return
            self._server.handle(exchange)
        else:
            self._refuse(event)

    def _advance(self) -> None:
        """Hands over what waits, as far as its turn has come."""
        if self._running or self._ending:
            return
        self._running = True
        for _ in range(_MAX_AT_ONCE):
            if not self._waiting or self._current is not None or self._write_paused or self._ending:
                break
            event = self._waiting.popleft()
            if isinstance(event, Request):
                self._waiting_bytes -= event.body_bytes
            self._hand_over(event)
        self._running = False
        if self._waiting:
            if self._current is None and not self._write_paused and not self._ending:
                self._server.clock().call_soon(self._advance)
        elif not self._ending:
            if self._read_paused:
                self._read_paused = False
                self._transport.resume_reading()
            if self._current is None:
                self._rest()

    def _rest(self) -> None:
        """Waits for the client, as everything that came is answered."""
        if self._running:
            return
        if self._reader.state == "idle" and self._server.closing:
            self._reader.stop()
            self._linger()
        elif self._reader.state != "over":
            self._pay_continue()
            if self._watching is None:
                self._watch()

    def _pay_continue(self) -> None:
        if self._reader.wants_continue and self._current is None and not self._waiting:
            self._reader.wants_continue = False
            self._transport.write(_CONTINUE)

    def _wait_for_rest(self) -> None:
        """Waits for the rest of a request, as long as there may be one."""
        reader = self._reader
        if reader.state == "over":
            return
        if reader.state == "body":
            self._recount()
            if self._is_full(reader.body_bytes):
                self._unwatch()
                self._line_up([reader.refuse(503, _FULL)])
                return
        if reader.wants_continue:
            self._pay_continue()
        if self._watching is None and not self._read_paused:
            self._watch()

    # ---- times ----

    def _watch(self) -> None:
        self._watching = self._server.patience[self._reader.state]
        self._watching.add(self._on_late)

    def _watch_new(self) -> None:
        self._watching = self._server.linger_patience
        self._watching.add(self._on_late)

    def _unwatch(self) -> None:
        if self._watching is not None:
            self._watching.remove(self._on_late)
            self._watching = None

    def _late(self) -> None:
        self._watching = None
        state = self._reader.state
        if state == "idle":
            self.close_if_idle()
        elif self._read_paused:
            self._watch()  # it is us who do not read
        elif state != "over":
            self._line_up([self._reader.refuse_late()])

    # ---- ends ----

    def _refuse(self, refusal: Refusal) -> None:
        body = orjson.dumps({"error": refusal.message})
        headers = _JSON + _CLOSE + refusal.headers + (_LATER if refusal.status == 503 else b"")
        self._write(refusal.status, headers, body, refusal.method)
        self._linger()

    def _linger(self) -> None:
        """Closes once the client has finished sending: closing now could destroy the answer on its way."""
        self._ending = True
        if not self._transport.is_closing() and self._transport.can_write_eof():
            self._transport.write_eof()
        self._server.linger_patience.add(self.abort)

    def _end(self) -> None:
        self._reader.stop()
        self._ending = True
        self._unwatch()
        self._server.write_patience.add(self.abort)
        self._transport.close()
