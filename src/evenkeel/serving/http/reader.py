"""Reads HTTP/1.1 requests: bytes in, whole requests and refusals out; no socket, no clock, no waiting.

    state   what has come of a request      next state
    idle    nothing                         head, at its first byte
    head    a part of its head              body, at the end of its head
    body    its head, a part of its body    idle, when it is whole; over, when it is the last one
    over    a request that is the last      none: whatever comes is dropped

A refusal, too, is the last event: it leads from any state to *over*. Events depend on the bytes alone, not on how they
are cut, with one exception: when a message is given up that holds next to nothing but framing, or whose head does not
end.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import httptools

__all__ = ["ReadLimits", "Refusal", "Request", "RequestReader", "State"]

State = Literal["idle", "head", "body", "over"]
_StateStep = Literal["begin", "head ends", "whole", "last", "refuse"]

# A step that is not in the row of a state is not taken: what the parser says then is about bytes that nobody reads.
_STATES: dict[State, dict[_StateStep, State]] = {
    "idle": {"begin": "head", "refuse": "over"},
    "head": {"head ends": "body", "refuse": "over"},
    "body": {"whole": "idle", "last": "over", "refuse": "over"},
    "over": {},
}
_IN_BODY = _STATES["body"]
_LATE: dict[State, str] = {
    "head": "the head of the request did not come in time",
    "body": "the whole body did not come in time; send it faster, or in smaller requests",
}
_FRAMING = frozenset((b"connection", b"content-length", b"expect", b"host", b"transfer-encoding"))
# RFC 3986: a name, an address or an address in brackets, and a port. Two lines are joined by ", ", which is neither.
_HOST = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]+\]|\[v[0-9A-Fa-f]+\.[\w.~!$&'()*+,;=:-]+\]|(?:[\w.~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)"
    rb"(?::[0-9]{0,5})?"
)
_HEADER_FRAMING_BYTES = 4  # a colon, a blank and a line end
_MAX_PARTS = 256  # of a body before they are put together: each costs some fifty bytes of its own
_MAX_JOINED_BYTES = 1 << 20  # a longer body is put together by who wants it, since that takes a while
_FRAMING_SHARE = 16  # bytes on the wire for one byte of a body; chunks of a single byte take six


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """Limits the sizes of the parts of a request."""

    head_bytes: int = 64 << 10
    target_bytes: int = 8 << 10
    body_bytes: int = 32 << 20


class Request:
    """Holds one request.

    Attributes:
        method: as sent, e.g. b"POST".
        target: as sent, e.g. b"/v2?x=1".
        headers: those that the reader keeps, by lower-case name; one given again is joined by ", ".
        body: whole, or empty where the body is long and `parts` hold it.
        parts: of a long body.
        body_bytes: of the body.
        since_s: when its first byte came, as the reader was told.
        keep: the client lets the connection be kept; when it does not, this is the last request.
        who: sent it; empty where that is not known.
    """

    __slots__ = ("body", "body_bytes", "headers", "keep", "method", "parts", "since_s", "target", "who")

    def __init__(self, since_s: float = 0.0) -> None:
        self.since_s = since_s
        self.method = b""
        self.target = b""
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.parts: list[bytes] = []
        self.body_bytes = 0
        self.keep = True
        self.who = ""

    def whole_body(self) -> bytes:
        """Puts a long body together, and lets go of its parts; from a thread that holds up nobody for it."""
        if self.parts:
            # Of bytes alone, `join` lets other threads run meanwhile.
            self.body, self.parts = b"".join(self.parts), []
        return self.body


_NO_REQUEST = Request()  # while none is being read


@dataclass(frozen=True, slots=True)
class Refusal:
    """Holds the answer to a request that is not taken; nothing is read behind it.

    Attributes:
        method: of the request; empty when its head was not whole.
        headers: further lines of the answer, each with its line end.
    """

    status: int
    message: str
    method: bytes = b""
    headers: bytes = b""


class RequestReader:
    """Cuts the bytes of one connection into requests.

    Args:
        limits: what is refused.
        headers: lower-case names of the headers that are kept, besides those about the request's framing.
        guard: is given a request as soon as its head is whole, before any of its body is taken, and may refuse it.

    Attributes:
        state: see the module.
        now_s: when the bytes came that are fed next.
        wants_continue: the client waits for a word before it sends the body.
    """

    __slots__ = (
        "_body_bytes",
        "_events",
        "_fed_bytes",
        "_guard",
        "_head_bytes",
        "_host",
        "_joined",
        "_limits",
        "_max_head_bytes",
        "_parser",
        "_parts",
        "_reads_on",
        "_request",
        "_seen_bytes",
        "_wanted",
        "now_s",
        "state",
        "wants_continue",
    )

    def __init__(
        self,
        limits: ReadLimits = ReadLimits(),
        headers: Collection[bytes] = (),
        guard: Callable[[Request], Refusal | None] | None = None,
    ) -> None:
        self._guard = guard
        self.state: State = "idle"
        self.now_s = 0.0
        self.wants_continue = False
        self._limits = limits
        self._max_head_bytes = limits.head_bytes
        self._wanted = _FRAMING.union(headers)
        self._parser = httptools.HttpRequestParser(self)
        self._reads_on = False  # the parser is fed a head that it need not report
        self._events: list[Request | Refusal] = []
        self._host = b""  # the last one that was found right
        self._request = _NO_REQUEST
        self._head_bytes = 0
        self._fed_bytes = 0  # of its head, then of what is no body, in pieces that hold nothing else
        self._body_bytes = 0
        self._seen_bytes = 0  # of its body, when its pieces were counted last
        self._parts: list[bytes] = []  # of its body, when there is more than one
        self._joined: list[bytes] = []  # the parts before those, put together some at a time

    def feed(self, data: bytes) -> list[Request | Refusal]:
        """Gives the requests, or the refusal, that `data` completes."""
        events = self._events = []
        if self.state == "over":
            return events
        before = self._request
        rest = data
        while True:
            try:
                self._parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]
                self._read_on()
                continue
            except httptools.HttpParserCallbackError:
                raise
            except httptools.HttpParserError:
                # Behind the last request on a connection anything may come.
                self._refuse(400, "Invalid HTTP request received.")
            break
        if self.state == "head" or self.state == "body":
            self._count(len(data), self._request is before)
        return events

    @property
    def body_bytes(self) -> int:
        """Counts the bytes that have come of the body that is being read."""
        return self._body_bytes if self.state == "body" else 0

    def refuse_late(self) -> Refusal:
        """Gives up the request that is being read, which took too long."""
        return self.refuse(408, _LATE[self.state])

    def refuse(self, status: int, message: str) -> Refusal:
        """Gives up the request that is being read, and reads no further."""
        self._events = []
        self._refuse(status, message)
        (refusal,) = self._events
        assert isinstance(refusal, Refusal)
        return refusal

    def stop(self) -> None:
        """Reads no further."""
        self.state = "over"
        self.wants_continue = False
        self._request = _NO_REQUEST
        self._forget_parts()

    def close(self) -> None:
        """Reads no further, and lets go of the parser."""
        self.stop()
        # They hold this object: without this, only the garbage collector would free it.
        del self._parser
        self._guard = None

    # ---- what the parser calls ----

    def on_message_begin(self) -> None:
        """Begins a request."""
        following = _STATES[self.state].get("begin")
        if following is None or self._reads_on:
            return
        self.state = following
        self._request = Request(self.now_s)
        self._head_bytes = self._fed_bytes = self._body_bytes = self._seen_bytes = 0

    def on_url(self, part: bytes) -> None:
        """Takes a part of the target."""
        if self.state != "head":
            return
        request = self._request
        request.target = request.target + part if request.target else part

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header, or a line of a chunked body's trailer."""
        if self.state != "head":
            return
        self._head_bytes = head_bytes = self._head_bytes + len(name) + len(value) + _HEADER_FRAMING_BYTES
        if head_bytes > self._max_head_bytes:
            self._refuse_head()
            return
        name = name.lower()
        if name in self._wanted:
            headers = self._request.headers
            headers[name] = value if name not in headers else headers[name] + b", " + value

    def on_headers_complete(self) -> None:
        """Checks the whole head; the body comes next."""
        if self._reads_on:
            self._reads_on = False
            return
        following = _STATES[self.state].get("head ends")
        if following is None:
            return
        self.state = following
        request, limits = self._request, self._limits
        headers = request.headers
        self._fed_bytes = 0
        request.method = self._parser.get_method()
        if len(request.target) > limits.target_bytes:
            self._refuse_target()
            return
        host = headers.get(b"host")
        if host != self._host and not self._takes_host(host):
            return
        if self._guard is not None:
            refusal = self._guard(request)
            if refusal is not None:
                self.stop()
                self._events.append(refusal)
                return
        if b"content-length" in headers and int(headers[b"content-length"]) > limits.body_bytes:
            self._refuse_body()
            return
        if b"transfer-encoding" in headers and not self._takes_encoding(headers):
            return
        if b"expect" in headers and self._parser.get_http_version() == "1.1":
            self.wants_continue = headers[b"expect"].lower() == b"100-continue"

    def on_body(self, part: bytes) -> None:
        """Takes a part of the body."""
        if self.state != "body":
            return
        self._body_bytes += len(part)
        if self._body_bytes > self._limits.body_bytes:
            self._refuse_body()
        elif self._body_bytes == len(part):
            self._request.body = part
        else:
            parts = self._parts
            request = self._request
            if request.body:
                parts.append(request.body)
                request.body = b""
            parts.append(part)
            if len(parts) > _MAX_PARTS:
                self._joined.append(b"".join(parts))
                parts.clear()

    def on_message_complete(self) -> None:
        """Ends a request that is whole, or whose head is whole and asks for another protocol."""
        if self.state != "body":
            return
        request, parser = self._request, self._parser
        keep = parser.should_keep_alive()
        if parser.should_upgrade():
            if request.method == b"CONNECT":
                keep = False  # what follows is for somebody else
            elif self._has_body():
                return  # the parser goes no further than the head; another one does
        if (not keep or b"connection" in request.headers) and parser.get_http_version() not in ("1.0", "1.1"):
            self._refuse(505, "this version of HTTP is not offered; use HTTP/1.1")
            return
        self.wants_continue = False
        request.body_bytes = self._body_bytes
        if not request.body and self._body_bytes:
            parts = [*self._joined, *self._parts]
            if self._body_bytes <= _MAX_JOINED_BYTES:
                request.body = b"".join(parts)
            else:
                request.parts = parts
            self._forget_parts()
        if keep:
            self.state = _IN_BODY["whole"]
        else:
            request.keep = False
            self.state = _IN_BODY["last"]
        self._request = _NO_REQUEST
        self._events.append(request)

    # ---- what it does with it ----

    def _has_body(self) -> bool:
        headers = self._request.headers
        return b"transfer-encoding" in headers or headers.get(b"content-length", b"0").strip(b"0") != b""

    def _read_on(self) -> None:
        """Reads on behind a head that asks for another protocol, as if it did not: a server may ignore that.

        The parser leaves the rest to that protocol. A fresh one reads on, fed with as much of the head as it must know.
        """
        version = self._parser.get_http_version().encode()
        self._parser = httptools.HttpRequestParser(self)
        if self.state == "body":
            self._reads_on = True
            known = self._request.headers.items()
            lines = [b"%b: %b\r\n" % line for line in known if line[0] in _FRAMING]
            self._parser.feed_data(b"POST / HTTP/%b\r\n%b\r\n" % (version, b"".join(lines)))

    def _count(self, size: int, same: bool) -> None:
        """Counts a piece of `size` bytes after which a request is still not whole, and checks that it holds enough."""
        if not same:
            return
        limits = self._limits
        gained, self._seen_bytes = self._body_bytes - self._seen_bytes, self._body_bytes
        if size > _FRAMING_SHARE * gained:
            self._fed_bytes += size
        if self.state == "body":
            if self._fed_bytes > limits.head_bytes:
                self._refuse(400, "the chunks of the body hold too little; send larger ones")
        elif self._fed_bytes > 2 * limits.head_bytes + limits.target_bytes:
            # The parser says nothing of a target or a header before its end, and nothing of blanks at all.
            if len(self._request.target) > limits.target_bytes:
                self._refuse_target()
            else:
                self._refuse_head()

    def _takes_host(self, host: bytes | None) -> bool:
        if host is None:
            if self._parser.get_http_version() == "1.1":
                self._refuse(400, "the Host header is missing")
        elif _HOST.fullmatch(host) is None:
            self._refuse(400, "the Host header must be one host name or address, with a port at most")
        else:
            self._host = host
        return self.state == "body"

    def _takes_encoding(self, headers: dict[bytes, bytes]) -> bool:
        if headers[b"transfer-encoding"].strip().lower() != b"chunked":
            self._refuse(501, "a Transfer-Encoding other than chunked is not offered")
        elif self._parser.get_http_version() != "1.1":
            # Whoever forwarded this may have understood something else: a way to smuggle requests.
            self._refuse(400, "Transfer-Encoding needs HTTP/1.1")
        return self.state == "body"

    def _forget_parts(self) -> None:
        self._parts.clear()
        self._joined.clear()

    def _refuse_target(self) -> None:
        self._refuse(414, f"the URL has more than {self._limits.target_bytes} bytes, which is the limit")

    def _refuse_head(self) -> None:
        self._refuse(431, f"the headers have more than {self._limits.head_bytes} bytes, which is the limit")

    def _refuse_body(self) -> None:
        self._refuse(413, f"the body has more than {self._limits.body_bytes} bytes, which is the limit")

    def _refuse(self, status: int, message: str) -> None:
        if "refuse" in _STATES[self.state]:
            method = self._request.method if self.state == "body" else b""
            self.stop()
            self._events.append(Refusal(status, message, method))
