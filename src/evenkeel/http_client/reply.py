"""Reads HTTP/1.1 replies: bytes in, one whole reply out; no socket, no clock, no waiting."""

from collections.abc import Collection

import httptools

from evenkeel.errors import ProtocolError

__all__ = ["HttpReply", "ReplyReader"]

_MAX_HEAD_BYTES = 64 << 10
_MAX_REASON_BYTES = 100
_FRAMING_SHARE = 16  # bytes on the wire for one byte of a body; chunks of a single byte take six
_FRAMING = frozenset((b"content-length", b"transfer-encoding"))
_SWITCHING_PROTOCOLS = 101


class HttpReply:
    """Holds one reply.

    Attributes:
        status: e.g. 200.
        reason: the words behind the status; the first hundred bytes.
        headers: those that the reader keeps, by lower-case name; one given again is joined by ", ".
        body: whole, as it was sent.
    """

    __slots__ = ("body", "headers", "reason", "status")

    def __init__(self) -> None:
        self.status = 0
        self.reason = b""
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    def header(self, name: bytes) -> str | None:
        """Gives a header's value as text, or None where the reply has none."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


class ReplyReader:
    """Reads the replies of one connection, one after the other: `expect`, then `feed` until there is a reply.

    Args:
        headers: lower-case names of the headers that are kept, besides those about the reply's framing.

    Attributes:
        begun: some byte has come since `expect`.
        keep: once there is a reply, whether the connection can take another request.
    """

    __slots__ = (
        "_body_bytes",
        "_fed_bytes",
        "_head_bytes",
        "_in_body",
        "_max_bytes",
        "_parser",
        "_parts",
        "_problem",
        "_reply",
        "_wanted",
        "_whole",
        "begun",
        "keep",
    )

    def __init__(self, headers: Collection[bytes] = ()) -> None:
        self._wanted = _FRAMING.union(headers)
        self._parser = httptools.HttpResponseParser(self)
        self._begin()
        self.expect(0)

    def expect(self, max_bytes: int) -> None:
        """Waits for the next reply, whose body may have `max_bytes`."""
        self.begun = False
        self.keep = False
        self._max_bytes = max_bytes
        self._whole = False
        self._problem = ""
        self._fed_bytes = self._body_bytes = 0
        self._in_body = False

    def feed(self, data: bytes) -> HttpReply | None:
        """Gives the reply as soon as it is whole.

        Raises:
            ProtocolError: this is no reply, or it is too long; nothing more can be read from the connection.
        """
        self.begun = True
        self._fed_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserUpgrade:
            pass  # behind a whole reply, after which the connection is not kept
        except httptools.HttpParserError as error:
            self.keep = False
            if not self._whole:
                self._problem = self._problem or f"a reply is not HTTP/1.1: {str(error)[:100]}"
        if self._problem:
            raise ProtocolError(self._problem)
        if self._whole:
            return self._reply
        if self._fed_bytes > _MAX_HEAD_BYTES + _FRAMING_SHARE * self._body_bytes:
            raise ProtocolError(f"the head or the framing of a reply has more than {_MAX_HEAD_BYTES} bytes")
        return None

    def end(self) -> HttpReply | None:
        """Hears that the server sends nothing more; gives the reply if it is whole by that."""
        if self._whole or not self._in_body or not _FRAMING.isdisjoint(self._reply.headers):
            return None
        self._complete()
        return self._reply

    def close(self) -> None:
        """Lets go of the parser, which holds this object's methods: only the garbage collector would free the two."""
        del self._parser

    def _begin(self) -> None:
        self._reply = HttpReply()
        self._in_body = False
        self._head_bytes = self._body_bytes = 0
        self._parts: bytearray | None = None

    def _complete(self) -> None:
        self._whole = True
        if self._parts is not None:
            self._reply.body = bytes(self._parts)

    # ---- what the parser calls ----

    def on_message_begin(self) -> None:
        """Begins a reply, also the one that follows an interim reply."""
        if self._whole:
            self.keep = False  # nothing was requested that this could be a reply to
        else:
            self._begin()

    def on_status(self, part: bytes) -> None:
        """Takes a part of the words behind the status."""
        if not self._whole and len(self._reply.reason) < _MAX_REASON_BYTES:
            self._reply.reason = (self._reply.reason + part)[:_MAX_REASON_BYTES]

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes a header, or a line of a chunked body's trailer."""
        if self._in_body or self._whole or self._problem:
            return
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > _MAX_HEAD_BYTES:
            self._problem = f"the head of a reply has more than {_MAX_HEAD_BYTES} bytes"
            return
        name = name.lower()
        if name in self._wanted:
            headers = self._reply.headers
            headers[name] = value if name not in headers else headers[name] + b", " + value

    def on_headers_complete(self) -> None:
        """Checks the whole head; the body comes next."""
        if self._whole or self._problem:
            return
        self._in_body = True
        reply = self._reply
        reply.status = self._parser.get_status_code()
        headers = reply.headers
        if b"content-length" in headers and int(headers[b"content-length"]) > self._max_bytes:
            self._refuse_body()
        elif b"transfer-encoding" in headers and headers[b"transfer-encoding"].strip().lower() != b"chunked":
            self._problem = "a reply has a transfer encoding other than chunked, which was not requested"

    def on_body(self, part: bytes) -> None:
        """Takes a part of the body."""
        if self._whole or self._problem:
            return
        self._body_bytes += len(part)
        if self._body_bytes > self._max_bytes:
            self._refuse_body()
        elif self._body_bytes == len(part):
            self._reply.body = part
        elif self._parts is None:
            self._parts = bytearray(self._reply.body)
            self._parts += part
        else:
            self._parts += part

    def on_message_complete(self) -> None:
        """Ends a reply; one of the kind `100 Continue` is passed over."""
        if self._whole or self._problem or not self._in_body:
            return
        status = self._reply.status
        self._in_body = False
        if status >= 200 or status == _SWITCHING_PROTOCOLS:
            self.keep = self._parser.should_keep_alive() and status != _SWITCHING_PROTOCOLS
            self._complete()

    def _refuse_body(self) -> None:
        self._problem = f"a reply has more than {self._max_bytes} bytes"
