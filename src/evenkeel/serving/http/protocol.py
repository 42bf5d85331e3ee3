"""HTTP/1.1 from the socket to a handler and back, in plain callbacks: no task, no future, no waiting.

A connection reads requests with httptools, hands whole ones to the handler one at a time, and answers in their order.
What a client could use up is bounded: sizes, times (by shared timers, see `Sweeper`), requests sent ahead, connections.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, cast

import httptools
import orjson

from evenkeel.clock import Clock
from evenkeel.serving.http.heads import ResponseHeads
from evenkeel.serving.http.sweeper import Sweeper

__all__ = ["Exchange", "Handler", "HttpLimits", "HttpProtocol", "HttpServer"]

_log = logging.getLogger(__name__)

_FRAMING = frozenset((b"connection", b"content-length", b"expect", b"transfer-encoding", b"upgrade"))
_JSON = b"content-type: application/json\r\n"
_CLOSE = b"connection: close\r\n"
_KEEP = b"connection: keep-alive\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_JOIN_UP_TO_BYTES = 1 << 16  # a body beyond is handed to the transport beside its head, not copied behind it
_MOST_AHEAD = 16  # requests that a client may send before the answer to an earlier one; beyond, reading stops
_MOST_AHEAD_BYTES = 1 << 18
_MOST_AT_ONCE = 16  # requests of one connection that are answered before other connections get their turn
_MOST_PARTS = 256  # of a body before they are put together: each costs some fifty bytes of its own
_FRAMING_SHARE = 16  # bytes on the wire for one byte of a body; chunks of a single byte take six


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one client may use up. Times are exceeded by at most as much again before they are enforced."""

    head_bytes: int = 64 << 10
    target_bytes: int = 8 << 10
    body_bytes: int = 32 << 20
    head_timeout_s: float = 20.0  # from a request's first byte to the end of its head
    body_timeout_s: float = 30.0  # from there to the end of its body
    keep_alive_s: float = 75.0  # without any request
    write_timeout_s: float = 30.0  # without the client reading what fills the buffers
    linger_s: float = 2.0  # for a client to read the answer to what it is still sending
    connections: int = 10_000


class Handler(Protocol):
    """What answers requests."""

    def handle(self, exchange: "Exchange") -> object:
        """Answer `exchange`, now or later, by one call of its `respond`. Must not raise."""

    def gone(self, exchange: "Exchange") -> object:
        """The client of an unanswered exchange went away."""


class Exchange:
    """One request and the way to answer it.

    Attributes:
        method: as sent, e.g. b"POST".
        target: as sent, e.g. b"/v2?x=1".
        headers: those that the server was told to keep, by lower-case name; one given again is joined by commas.
        body: whole.
        last: ask the client to close once nothing else is under way on its connection.
    """

    __slots__ = ("_protocol", "body", "headers", "keep", "last", "method", "refusal", "target")

    def __init__(self, protocol: "HttpProtocol") -> None:
        self._protocol = protocol
        self.method = b""
        self.target = b""
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.last = False
        self.keep = True  # the client lets the connection be kept
        self.refusal: tuple[int, str] | None = None  # answered by the protocol itself

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """Answer; ignored when the client is gone.

        Args:
            status: HTTP status.
            headers: lines, each with its line end; length, date and connection are added.
            body: whole; not sent when the method is HEAD.
        """
        self._protocol.answer(self, status, headers, body)


class HttpServer:
    """What the connections of one server share.

    Args:
        handler: answers requests.
        limits: of each client.
        headers: lower-case names of the headers that the handler reads; others are dropped.
        clock: gives the clock of the timeouts; by default the running event loop.

    Attributes:
        connections: open ones.
        empty: set while there are none.
    """

    def __init__(
        self,
        handler: Handler,
        limits: HttpLimits,
        headers: Collection[bytes],
        clock: Callable[[], Clock] = asyncio.get_running_loop,
    ) -> None:
        self.clock = clock
        self.handle = handler.handle
        self.gone = handler.gone
        self.limits = limits
        self.wanted = _FRAMING.union(headers)
        self.heads = ResponseHeads()
        self.connections: set[HttpProtocol] = set()
        self.empty = asyncio.Event()
        self.empty.set()
        self.closing = False
        self.idle_patience = Sweeper(limits.keep_alive_s, clock)
        self.head_patience = Sweeper(limits.head_timeout_s, clock)
        self.body_patience = Sweeper(limits.body_timeout_s, clock)
        self.write_patience = Sweeper(limits.write_timeout_s, clock)
        self.linger_patience = Sweeper(limits.linger_s, clock)

    def connect(self) -> "HttpProtocol":
        """The protocol of a new connection."""
        return HttpProtocol(self)

    def close(self) -> None:
        """Close idle connections now, and the others once what they have sent is answered."""
        self.closing = True
        for connection in list(self.connections):
            connection.close_if_idle()

    def abort(self) -> None:
        """Close all connections at once."""
        for connection in list(self.connections):
            connection.abort()


class HttpProtocol(asyncio.Protocol):
    """One connection."""

    __slots__ = (
        "_at_once",
        "_body_bytes",
        "_current",
        "_ending",
        "_fed_bytes",
        "_head_bytes",
        "_incoming",
        "_joined",
        "_limits",
        "_no_more",
        "_on_late",
        "_owes_continue",
        "_parser",
        "_parts",
        "_read_paused",
        "_running",
        "_seen_bytes",
        "_server",
        "_transport",
        "_waiting",
        "_waiting_bytes",
        "_wanted",
        "_watching",
        "_write_paused",
    )

    _transport: asyncio.Transport

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._limits = server.limits
        self._wanted = server.wanted
        self._parser = httptools.HttpRequestParser(self)
        self._on_late: Callable[[], object] = self._late  # one object, made once: it is added for every request
        self._watching: Sweeper | None = None  # what counts the time that the client takes to send

        self._incoming: Exchange | None = None  # being read
        self._head_bytes = 0
        self._fed_bytes = 0  # of its head, then of what is no body, in pieces that hold nothing else
        self._body_bytes = 0
        self._seen_bytes = 0  # of its body, when its pieces were counted last
        self._parts: list[bytes] = []  # of its body, when there is more than one
        self._joined = bytearray()  # the parts before those
        self._owes_continue = False

        self._current: Exchange | None = None  # with the handler
        self._waiting: deque[Exchange] = deque()
        self._waiting_bytes = 0
        self._at_once = 0
        self._running = False

        self._no_more = False  # requests are read no more
        self._ending = False  # nothing is answered any more
        self._read_paused = False
        self._write_paused = False

    # ---- the transport's side ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start to read, or refuse when there are too many connections."""
        server = self._server
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own have no common ancestor with asyncio's
        full = len(server.connections) >= self._limits.connections
        server.connections.add(self)
        server.empty.clear()
        if full:
            self._refuse(503, "too many connections are open; try again later")
        else:
            self._watch(server.idle_patience)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget everything, and tell the handler that nobody waits any more."""
        server = self._server
        self._no_more = self._ending = True
        self._unwatch()
        server.write_patience.remove(self.abort)
        server.linger_patience.remove(self.abort)
        current, self._current, self._incoming = self._current, None, None
        self._waiting.clear()
        self._forget_parts()
        # The parser holds this object's methods: without this, only the garbage collector would free the two.
        del self._parser, self._on_late
        if current is not None:
            server.gone(current)
        server.connections.discard(self)
        if not server.connections:
            server.empty.set()

    def data_received(self, data: bytes) -> None:
        """Read requests."""
        if self._no_more:
            return
        before = self._incoming
        self._at_once = 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered like any other request, and the last on its connection
        except httptools.HttpParserCallbackError:
            # Nobody knows how far it came, so there is nothing to say that would surely be in its place.
            _log.exception("unexpected error while reading a request")
            self._no_more = True
            self.abort()
        except httptools.HttpParserError:
            # Behind the last request on a connection anything may come.
            if not self._no_more:
                self._refuse(400, "Invalid HTTP request received.")
        if self._waiting:
            self._advance()
        if self._incoming is not None:
            self._wait_for_rest(before, len(data))

    def eof_received(self) -> None:
        """The client went away, or will not send any more, which cannot be told apart."""
        self._end()

    def pause_writing(self) -> None:
        """The client does not read its answers: begin no further ones, and give it some time."""
        self._write_paused = True
        self._server.write_patience.add(self.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._write_paused = False
        if not self._ending:
            self._server.write_patience.remove(self.abort)
            self._advance()

    # ---- the parser's side ----

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._no_more:
            return
        if self._watching is not None:
            self._unwatch()
        self._incoming = Exchange(self)
        self._head_bytes = self._fed_bytes = self._body_bytes = self._seen_bytes = 0

    def on_url(self, part: bytes) -> None:
        """A part of the target."""
        incoming = self._incoming
        if incoming is None:
            return
        incoming.target = incoming.target + part if incoming.target else part
        if len(incoming.target) > self._limits.target_bytes:
            self._refuse(414, f"the URL has more than {self._limits.target_bytes} bytes, the most that are taken")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a line of a chunked body's trailer."""
        incoming = self._incoming
        if incoming is None or incoming.method:
            return
        self._head_bytes += len(name) + len(value)
        name = name.lower()
        if name in self._wanted:
            headers = incoming.headers
            headers[name] = value if name not in headers else headers[name] + b", " + value

    def on_headers_complete(self) -> None:
        """The body comes next."""
        incoming = self._incoming
        if incoming is None:
            return
        if self._watching is not None:
            self._unwatch()
        self._fed_bytes = 0
        incoming.method = self._parser.get_method()
        headers = incoming.headers
        if self._head_bytes > self._limits.head_bytes:
            self._refuse_head()
            return
        declared = headers.get(b"content-length")
        if declared is not None and int(declared) > self._limits.body_bytes:
            self._refuse_body()
            return
        if b"transfer-encoding" in headers and not self._takes_encoding(headers):
            return
        if b"expect" in headers and self._parser.get_http_version() == "1.1":
            self._owes_continue = headers[b"expect"].lower() == b"100-continue"
            self._pay_continue()

    def on_body(self, part: bytes) -> None:
        """A part of the body."""
        incoming = self._incoming
        if incoming is None:
            return
        self._body_bytes += len(part)
        if self._body_bytes > self._limits.body_bytes:
            self._refuse_body()
        elif self._body_bytes == len(part):
            incoming.body = part
        else:
            parts = self._parts
            if incoming.body:
                parts.append(incoming.body)
                incoming.body = b""
            parts.append(part)
            if len(parts) > _MOST_PARTS:
                self._joined += b"".join(parts)
                parts.clear()

    def on_message_complete(self) -> None:
        """The request is whole."""
        incoming = self._incoming
        if incoming is None:
            return
        self._incoming = None
        self._owes_continue = False
        if self._watching is not None:
            self._unwatch()
        if not incoming.body and self._body_bytes:
            incoming.body = b"".join((self._joined, *self._parts))
            self._forget_parts()
        if not self._parser.should_keep_alive() or self._parser.should_upgrade():
            incoming.keep = False
            self._no_more = True
            headers = incoming.headers
            if self._parser.should_upgrade() and (b"content-length" in headers or b"transfer-encoding" in headers):
                self._refuse(501, "a change of protocol is not offered; send the request without Upgrade")
                return
        if self._current is not None or self._waiting or self._write_paused or self._at_once >= _MOST_AT_ONCE:
            self._line_up(incoming)
        else:
            self._at_once += 1
            self._current = incoming
            self._server.handle(incoming)

    # ---- the handler's side ----

    def answer(self, exchange: Exchange, status: int, headers: bytes, body: bytes) -> None:
        """See `Exchange.respond`."""
        if self._current is not exchange:
            return
        self._current = None
        keep = exchange.keep
        if keep and (exchange.last or self._server.closing):
            keep = bool(self._waiting) or self._incoming is not None or self._read_paused
        connection = b""
        if not keep:
            connection = _CLOSE
        elif b"connection" in exchange.headers and b"keep-alive" in exchange.headers[b"connection"].lower():
            connection = _KEEP  # a client that speaks HTTP/1.0 would not expect it otherwise
        head = b"%b%b%bcontent-length: %d\r\n\r\n" % (self._server.heads.start(status), headers, connection, len(body))
        if exchange.method == b"HEAD":
            self._transport.write(head)
        elif len(body) <= _JOIN_UP_TO_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))
        if not keep:
            if exchange.refusal is not None:
                self._linger()
            else:
                self._end()
        elif self._waiting:
            self._advance()
        else:
            self._rest()

    def close_if_idle(self) -> None:
        """Close unless something is under way."""
        if self._current is None and not self._waiting and self._incoming is None:
            self._end()

    def abort(self) -> None:
        """Close at once; what is not sent yet is lost."""
        self._transport.abort()

    # ---- order ----

    def _line_up(self, exchange: Exchange) -> None:
        self._waiting.append(exchange)
        self._waiting_bytes += len(exchange.body)
        full = len(self._waiting) > _MOST_AHEAD or self._waiting_bytes > _MOST_AHEAD_BYTES
        if full and not self._read_paused and not self._no_more:
            self._read_paused = True
            self._transport.pause_reading()

    def _advance(self) -> None:
        """Hand over what waits, as far as its turn has come."""
        if self._running or self._ending:
            return
        self._running = True
        for _ in range(_MOST_AT_ONCE):
            if not self._waiting or self._current is not None or self._write_paused or self._ending:
                break
            exchange = self._current = self._waiting.popleft()
            self._waiting_bytes -= len(exchange.body)
            if exchange.refusal is None:
                self._server.handle(exchange)
            else:
                self._answer_refusal(exchange, exchange.refusal)
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
        """Everything that came is answered: wait for the client."""
        if self._incoming is not None:
            self._pay_continue()
            if self._watching is None:
                self._watch_incoming(self._incoming)
        elif self._server.closing and not self._no_more:
            self._no_more = True
            self._linger()
        elif self._watching is None and not self._no_more:
            self._watching = self._server.idle_patience
            self._watching.add(self._on_late)

    def _pay_continue(self) -> None:
        if self._owes_continue and self._current is None and not self._waiting:
            self._owes_continue = False
            self._transport.write(_CONTINUE)

    # ---- limits ----

    def _wait_for_rest(self, before: Exchange | None, size: int) -> None:
        """Part of a request has come: count what it takes."""
        incoming = self._incoming
        assert incoming is not None
        limits = self._limits
        if incoming is before:
            gained, self._seen_bytes = self._body_bytes - self._seen_bytes, self._body_bytes
            if size > _FRAMING_SHARE * gained:
                self._fed_bytes += size
            if self._fed_bytes > limits.head_bytes:
                if not incoming.method:
                    self._refuse_head()
                else:
                    self._refuse(400, "the chunks of the body hold too little; send larger ones")
                return
        if self._watching is None and not self._read_paused:
            self._watch_incoming(incoming)

    def _watch_incoming(self, incoming: Exchange) -> None:
        self._watch(self._server.body_patience if incoming.method else self._server.head_patience)

    def _watch(self, patience: Sweeper) -> None:
        self._watching = patience
        patience.add(self._on_late)

    def _unwatch(self) -> None:
        if self._watching is not None:
            self._watching.remove(self._on_late)
            self._watching = None

    def _late(self) -> None:
        self._watching = None
        incoming = self._incoming
        if incoming is None:
            self.close_if_idle()
        elif self._read_paused:
            self._watch_incoming(incoming)  # it is us who do not read
        elif incoming.method:
            self._refuse(408, "the whole body did not come in time; send it faster, or in smaller requests")
        else:
            self._refuse(408, "the head of the request did not come in time")

    def _takes_encoding(self, headers: dict[bytes, bytes]) -> bool:
        if headers[b"transfer-encoding"].strip().lower() != b"chunked":
            self._refuse(501, "a Transfer-Encoding other than chunked is not offered")
        elif self._parser.get_http_version() != "1.1":
            # Whoever forwarded this may have understood something else: a way to smuggle requests.
            self._refuse(400, "Transfer-Encoding needs HTTP/1.1")
        return self._incoming is not None

    def _forget_parts(self) -> None:
        self._parts.clear()
        self._joined = bytearray()

    def _refuse_head(self) -> None:
        self._refuse(431, f"the headers have more than {self._limits.head_bytes} bytes, the most that are taken")

    def _refuse_body(self) -> None:
        self._refuse(413, f"the body has more than {self._limits.body_bytes} bytes, the most that are taken")

    # ---- ends ----

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is being read with an error, when its turn comes, and read no further."""
        if self._ending:
            return
        exchange = self._incoming or Exchange(self)
        exchange.keep = False
        exchange.refusal = (status, message)
        self._incoming = None
        self._no_more = True
        self._forget_parts()
        self._unwatch()
        if self._current is not None or self._waiting or self._write_paused:
            self._line_up(exchange)
        else:
            self._current = exchange
            self._answer_refusal(exchange, exchange.refusal)

    def _answer_refusal(self, exchange: Exchange, refusal: tuple[int, str]) -> None:
        status, message = refusal
        self.answer(exchange, status, _JSON, orjson.dumps({"error": message}))

    def _linger(self) -> None:
        """Close, but first let the client finish sending: closing now could destroy the answer on its way."""
        self._ending = True
        if not self._transport.is_closing() and self._transport.can_write_eof():
            self._transport.write_eof()
        self._server.linger_patience.add(self.abort)

    def _end(self) -> None:
        self._no_more = self._ending = True
        self._unwatch()
        self._server.write_patience.add(self.abort)
        self._transport.close()
