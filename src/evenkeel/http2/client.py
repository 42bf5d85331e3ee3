"""Calls methods of one gRPC server: callbacks over one connection, which carries many calls at once.

Laws:

- after `call` its `on_done` is called exactly once, never from inside `call`, with the answer or the error that says
  why there is none; after `GrpcExchange.abort` it is not called any more;
- a call that the server has surely not begun, or whose connection was lost before anything came back over one that had
  been used before, is sent once more, over a fresh connection.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

from evenkeel.errors import (
    BackendBusyError,
    BackendError,
    BackendLostError,
    ConfigurationError,
    Http2Error,
    ProtocolError,
    TaskRefusedError,
)
from evenkeel.http2.connection import CANCEL, NO_ERROR, REFUSED_STREAM, Http2Connection, Http2Limits
from evenkeel.http2.grpc import GrpcMessageReader, GrpcStatus, frame_message, read_status_message, write_timeout
from evenkeel.http2.hpack import Headers, write_headers
from evenkeel.http_client.client import NotConnectedError
from evenkeel.text_values import without_password
from evenkeel.trust.credentials import Credentials
from evenkeel.trust.tls import ClientTls, client_contexts, tls_reason

__all__ = ["GrpcClient", "GrpcExchange"]

_log = logging.getLogger(__name__)

_PORTS = {"grpc": 8001, "grpcs": 443}
_HANDSHAKE_S = 10.0
_PROTOCOLS = ("h2",)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST = re.compile(r"[A-Za-z0-9._~-]+|[0-9A-Fa-f:.]+", re.ASCII)
_MAX_TEXT = 300  # characters of a server's words
_MAX_DIGITS = 9
# By these a server says that the request is wrong, so that any other server would say the same.
_THE_REQUESTS_FAULT = frozenset({GrpcStatus.INVALID_ARGUMENT, GrpcStatus.OUT_OF_RANGE})
_NO_ROOM = frozenset({GrpcStatus.UNAVAILABLE, GrpcStatus.RESOURCE_EXHAUSTED})

OnGrpcAnswer = Callable[[bytes | BackendError], object]


class GrpcExchange:
    """Holds one call on its way."""

    __slots__ = (
        "_again",
        "_client",
        "_connection",
        "_fields",
        "_heard",
        "_message",
        "_on_done",
        "_reader",
        "_stream",
        "answer",
    )

    def __init__(
        self,
        client: "GrpcClient",
        fields: list[tuple[bytes, bytes]],
        message: bytes,
        max_bytes: int,
        on_done: OnGrpcAnswer,
    ) -> None:
        self._client = client
        self._fields, self._message = fields, message
        self._on_done: OnGrpcAnswer | None = on_done
        self._reader = GrpcMessageReader(max_bytes)
        self._connection: _GrpcClientConnection | None = None
        self._stream = 0
        self._heard = False  # something of an answer has come
        self._again = True  # it may be sent once more
        self.answer: bytes | None = None

    def abort(self) -> None:
        """Gives the call up."""
        self._on_done = None
        self._client._pending.pop(self, None)
        if self._connection is not None:
            self._connection.abandon(self)

    def _finish(self, result: bytes | BackendError) -> None:
        on_done, self._on_done = self._on_done, None
        self._connection = None
        if on_done is not None:
            try:
                on_done(result)
            except Exception:
                _log.exception("unexpected error while an answer was handled")


class GrpcClient:
    """Calls methods of the server at one URL.

    Args:
        url: `grpc://host:port` or `grpcs://host:port`.
        timeout_s: said to the server with each call.
        credentials: sent with each call.
        tls: files for `grpcs://`; None: the system's authorities, and no certificate of one's own.

    Raises:
        ConfigurationError: the URL is none of those, or a file of TLS cannot be used.
    """

    def __init__(
        self, url: str, *, timeout_s: float, credentials: Credentials | None = None, tls: ClientTls | None = None
    ) -> None:
        shown = without_password(url)
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise ConfigurationError(f"{shown!r} is not a URL that can be reached") from None
        if parts.scheme not in _PORTS:
            raise ConfigurationError(f"url must begin with grpc:// or grpcs://, found {shown!r}")
        if not _HOST.fullmatch(host) or parts.path.strip("/") or parts.query or parts.fragment or parts.username:
            raise ConfigurationError(f"{shown!r} must be grpc://host:port or grpcs://host:port and nothing else")
        secure = parts.scheme == "grpcs"
        if tls is not None and not secure:
            raise ConfigurationError(f"{shown!r}: TLS needs a URL that begins with grpcs://")
        self._host, self._port = host, port or _PORTS[parts.scheme]
        self._contexts = client_contexts(tls or ClientTls(), _PROTOCOLS) if secure else None
        self._name = (tls and tls.name) or host
        self._credentials = credentials or Credentials()
        if not secure and self._credentials and host not in _LOOPBACK:
            _log.warning("%s: credentials can be read on their way there; use grpcs://", shown)
        named = f"[{host}]" if ":" in host else host
        self._head = write_headers([
            (b":method", b"POST"),
            (b":scheme", b"https" if secure else b"http"),
            (b":authority", f"{named}:{self._port}".encode()),
        ])  # fmt: skip
        self._tail = write_headers([
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"evenkeel"),
            (b"grpc-timeout", write_timeout(timeout_s)),
        ])  # fmt: skip
        self._connection: _GrpcClientConnection | None = None  # that takes further calls
        self._connections: set[_GrpcClientConnection] = set()
        self._connecting: asyncio.Task[None] | None = None
        self._pending: dict[GrpcExchange, None] = {}
        self._closed = False

    def call(
        self, method: str, message: bytes, max_bytes: int, on_done: OnGrpcAnswer, traceparent: str = ""
    ) -> GrpcExchange:
        """Calls a method; see the module for when `on_done` is called.

        Args:
            method: full name, as /package.Service/Method.
            message: of the request.
            max_bytes: that the answer may have.
            on_done: called with the answer or an error.
            traceparent: says which trace the call is part of; empty for none.

        Raises:
            BackendLostError: this client was closed.
        """
        if self._closed:
            raise BackendLostError("the client was closed")
        fields = [(b":path", method.encode())]
        if traceparent:
            fields.append((b"traceparent", traceparent.encode()))
        exchange = GrpcExchange(self, fields, message, max_bytes, on_done)
        self._pending[exchange] = None
        self._send_pending()
        return exchange

    async def ask(self, method: str, message: bytes, max_bytes: int) -> bytes:
        """Calls a method and waits for its answer; for calls that are rare.

        Raises:
            BackendError: there is none, or it cannot be read.
        """
        answered: asyncio.Future[bytes | BackendError] = asyncio.get_running_loop().create_future()

        def on_done(result: bytes | BackendError) -> None:
            if not answered.done():  # else who waited was cancelled, and has not run yet
                answered.set_result(result)

        exchange = self.call(method, message, max_bytes, on_done)
        try:
            answer = await answered
        except asyncio.CancelledError:
            # A connection whose other end has vanished would take all further calls along.
            if exchange._connection is not None and not exchange._heard:
                exchange._connection.drop(BackendLostError("connection lost: the server does not answer"))
            raise
        finally:
            exchange.abort()
        if isinstance(answer, BackendError):
            raise answer
        return answer

    async def close(self) -> None:
        """Closes all connections; open calls get a BackendLostError."""
        self._closed = True
        error = BackendLostError("the client was closed")
        if self._connecting is not None:
            self._connecting.cancel()
        self._fail_pending(error)
        connections = list(self._connections)
        for connection in connections:
            connection.drop(error)
        await asyncio.gather(*(connection.lost for connection in connections), return_exceptions=True)

    def _block(self, fields: list[tuple[bytes, bytes]]) -> bytes:
        fields = list(fields)
        for line in self._credentials.lines().split(b"\r\n"):
            name, colon, value = line.partition(b":")
            if colon:
                fields.append((name.strip().lower(), value.strip()))
        return self._head + write_headers(fields) + self._tail

    def _send_pending(self) -> None:
        connection = self._connection
        if connection is None:
            if self._pending and self._connecting is None and not self._closed:
                self._connecting = asyncio.get_running_loop().create_task(self._connect())
            return
        while self._pending and connection is self._connection and connection.has_room:
            connection.begin(self._pending_first())

    def _pending_first(self) -> GrpcExchange:
        exchange = next(iter(self._pending))
        del self._pending[exchange]
        return exchange

    def _fail_pending(self, error: BackendError) -> None:
        pending, self._pending = self._pending, {}
        for exchange in pending:
            exchange._finish(error)

    async def _connect(self) -> None:
        context = None if self._contexts is None else self._contexts.get()
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _GrpcClientConnection(self),
                self._host,
                self._port,
                ssl=context,
                server_hostname=self._name if context else None,
                ssl_handshake_timeout=_HANDSHAKE_S if context else None,
            )
        except Exception as error:  # of the socket, of TLS, of the name's encoding
            self._connecting = None
            why = f"cannot connect to {self._host}:{self._port}: {tls_reason(error)}"
            self._fail_pending(NotConnectedError(why))
            return
        self._connecting = None
        if connection.lost.done():
            self._fail_pending(NotConnectedError(f"{self._host}:{self._port} closed the connection at once"))
            return
        self._connection = connection
        self._send_pending()

    def _resend(self, exchange: GrpcExchange) -> None:
        exchange._connection = None
        exchange._again = False
        self._pending[exchange] = None
        self._send_pending()

    def _leave(self, connection: "_GrpcClientConnection") -> None:
        """Makes no further calls over a connection."""
        if self._connection is connection:
            self._connection = None
            self._send_pending()


class _GrpcClientConnection(asyncio.Protocol):
    """Carries calls over one connection.

    Attributes:
        lost: done once it is closed.
    """

    _transport: asyncio.Transport
    _http2: Http2Connection

    def __init__(self, client: GrpcClient) -> None:
        self._client = client
        self._exchanges: dict[int, GrpcExchange] = {}
        self._used = False  # an answer has come
        self._leaving = False
        self._over = False
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def has_room(self) -> bool:
        """Tells whether the server takes a further call now."""
        return not self._over and self._http2.open_streams < self._http2.peer_streams

    def begin(self, exchange: GrpcExchange) -> None:
        """Sends a call."""
        exchange._connection = self
        exchange._stream = self._http2.open(self._client._block(exchange._fields), frame_message(exchange._message))
        self._exchanges[exchange._stream] = exchange
        if self._http2.used_up:  # after days of a thousand calls a second
            self._leaving = True
            self._client._leave(self)

    def abandon(self, exchange: GrpcExchange) -> None:
        """Gives a call up."""
        if self._exchanges.pop(exchange._stream, None) is not None:
            exchange._connection = None
            self._http2.reset(exchange._stream, CANCEL)
            self._go_on()

    def drop(self, error: BackendError) -> None:
        """Closes at once."""
        self._end(error)
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Is ready for its first call."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own have no common ancestor with asyncio's
        self._client._connections.add(self)
        self._http2 = Http2Connection(self, self._transport.write, Http2Limits(), client=True)

    def data_received(self, data: bytes) -> None:
        """Reads answers."""
        try:
            self._http2.feed(data)
        except Http2Error as error:
            self.drop(ProtocolError(f"the server breaks the rules of HTTP/2: {error}"))
        except Exception as error:
            _log.exception("unexpected error while reading an answer")
            self.drop(BackendError(f"an answer could not be read: {type(error).__name__}: {error}"))

    def eof_received(self) -> None:
        """Closes, as the server has."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Sends calls once more, or says that they are lost."""
        self._client._connections.discard(self)
        why = "the server closed it" if exc is None else tls_reason(exc)
        self._end(BackendLostError(f"connection lost: {why}"))
        if not self.lost.done():
            self.lost.set_result(None)

    def _end(self, error: BackendError) -> None:
        if self._over:
            return
        self._over = True
        self._http2.over = True
        exchanges, self._exchanges = self._exchanges, {}
        client = self._client
        client._leave(self)
        for exchange in exchanges.values():
            if isinstance(error, BackendLostError) and self._used and self._may_resend(exchange):
                client._resend(exchange)
            else:
                exchange._finish(error)

    def _may_resend(self, exchange: GrpcExchange) -> bool:
        return exchange._again and not exchange._heard and not self._client._closed

    def _go_on(self) -> None:
        """Takes the next call, or closes if there is to be none."""
        if self._leaving and not self._exchanges:
            self._transport.close()
        elif not self._leaving:
            self._client._send_pending()

    # ---- the streams' side ----

    def on_headers(self, stream: int, headers: Headers, ended: bool) -> None:
        """Reads the head of an answer, or what it ends with."""
        exchange = self._exchanges.get(stream)
        if exchange is None:
            return
        exchange._heard = self._used = True
        fields = dict(headers)
        if fields.get(b":status", b"200") != b"200":
            status = fields[b":status"][:3].decode("latin-1")
            self._finish(exchange, ProtocolError(f"the server answered HTTP {status}, so it does not speak gRPC"))
        elif b"grpc-status" in fields:
            self._finish(exchange, _result(exchange, fields))
        elif ended:
            self._finish(exchange, ProtocolError("the answer ends without a status"))
        elif fields.get(b"grpc-encoding", b"identity") != b"identity":
            self._finish(exchange, ProtocolError("the answer is compressed, which was not requested"))

    def on_data(self, stream: int, data: bytes, ended: bool) -> None:
        """Reads a part of an answer."""
        exchange = self._exchanges.get(stream)
        if exchange is None:
            return
        found = exchange._reader.feed(data)
        self._http2.give_room(stream, len(data))
        if exchange._reader.error is not None:
            self._finish(exchange, ProtocolError(f"the answer cannot be read: {exchange._reader.error}"))
        elif len(found) > 1 or (found and (exchange.answer is not None or found[0][1])):
            self._finish(exchange, ProtocolError("the answer has several messages, or a compressed one"))
        elif ended:
            self._finish(exchange, ProtocolError("the answer ends without a status"))
        elif found:
            exchange.answer = found[0][0]

    def on_reset(self, stream: int, code: int) -> None:
        """Hears that a call is over before its end."""
        exchange = self._exchanges.pop(stream, None)
        if exchange is None or (code == NO_ERROR and exchange._on_done is None):
            return
        if code == REFUSED_STREAM and self._may_resend(exchange):
            self._client._resend(exchange)
            return
        exchange._finish(BackendError(f"the server gave the call up (HTTP/2 code {code})"))
        self._go_on()

    def on_goaway(self, code: int) -> None:
        """Makes no further calls here."""
        self._leaving = True
        self._client._leave(self)
        if not self._exchanges:
            self._transport.close()

    def on_room(self, stream: int) -> None:
        """Needs nothing to be done."""

    def _finish(self, exchange: GrpcExchange, result: bytes | BackendError) -> None:
        del self._exchanges[exchange._stream]
        self._http2.reset(exchange._stream, CANCEL)  # of what has ended nothing is sent
        exchange._finish(result)
        self._go_on()


def _result(exchange: GrpcExchange, fields: dict[bytes, bytes]) -> bytes | BackendError:
    said = fields[b"grpc-status"]
    status = int(said) if said.isdigit() and len(said) < _MAX_DIGITS else -1
    if status == GrpcStatus.OK:
        if exchange.answer is None or exchange._reader.rest_bytes:
            return ProtocolError("the answer has no message, or half of one")
        return exchange.answer
    name = GrpcStatus(status).name if status in set(GrpcStatus) else f"status {said[:20].decode('latin-1')}"
    text = f"the server answered {name}: {read_status_message(fields.get(b'grpc-message', b''))[:_MAX_TEXT]}"
    if status in _THE_REQUESTS_FAULT:
        return TaskRefusedError(text)
    if status in _NO_ROOM:
        after = fields.get(b"grpc-retry-pushback-ms", b"")
        return BackendBusyError(text, int(after) / 1e3 if after.isdigit() and len(after) < _MAX_DIGITS else None)
    return BackendError(text)
