"""Sends HTTP/1.1 requests to one server: callbacks, no task for a request, connections that are kept.

Laws:

- after `send` its `on_done` is called exactly once, never from inside `send`, with the reply or the error that says why
  there is none; after `ClientExchange.abort` it is not called any more;
- a connection has one request at a time, and a request that was given up takes its connection along;
- a server may close a connection that it has kept at any moment, and what was sent as it did so is lost. So a request
  that loses a kept connection before any byte of a reply is sent once more, over a fresh one.
"""

import asyncio
import base64
import logging
import re
import socket
import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast
from urllib.parse import quote, unquote, urlsplit

from evenkeel.errors import BackendError, BackendLostError, ConfigurationError, ProtocolError
from evenkeel.http_client.reply import HttpReply, ReplyReader
from evenkeel.text_values import without_password
from evenkeel.trust.credentials import Credentials
from evenkeel.trust.tls import ClientTls, client_contexts, tls_reason

__all__ = ["NO_ACCESS", "ClientAccess", "ClientExchange", "HttpClient", "NotConnectedError", "OnDone", "request_once"]

_log = logging.getLogger(__name__)

OnDone = Callable[[HttpReply | BackendError], object]

# Below the two to five seconds after which common servers close idle connections: what is sent as they do so is lost.
_IDLE_S = 1.0
_NEXT_ADDRESS_S = 0.25  # RFC 8305: when the next address of a name is tried beside one that does not answer
_JOIN_UP_TO_BYTES = 16 << 10  # of a body that is copied behind its head, so that both go out together
_MAX_BYTES = 1 << 20
_HANDSHAKE_S = 10.0
_PROTOCOLS = ("http/1.1",)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST = re.compile(r"[A-Za-z0-9._~-]+|[0-9A-Fa-f:.]+(?:%[\w.-]+)?", re.ASCII)  # a name or IPv4; IPv6
_PATH_SIGNS = "/%:@!$&'()*+,;=~"


class NotConnectedError(BackendLostError):
    """No connection could be made, so that the server is not at work on the request."""


class ClientExchange:
    """Holds one request on its way."""

    __slots__ = ("_body", "_connecting", "_connection", "_head", "_kept", "_max_bytes", "_on_done")

    def __init__(self, head: bytes, body: bytes, max_bytes: int, on_done: OnDone) -> None:
        self._head, self._body, self._max_bytes = head, body, max_bytes
        self._on_done: OnDone | None = on_done
        self._connecting: asyncio.Task[None] | None = None
        self._connection: _ClientConnection | None = None
        self._kept = False  # its connection had been used before

    def abort(self) -> None:
        """Gives the request up and closes its connection."""
        self._on_done = None
        if self._connecting is not None:
            self._connecting.cancel()
        elif self._connection is not None:
            self._connection.abort()

    def _finish(self, result: HttpReply | BackendError) -> None:
        on_done, self._on_done = self._on_done, None
        self._connecting = self._connection = None
        if on_done is not None:
            try:
                on_done(result)
            except Exception:
                _log.exception("unexpected error while a reply was handled")


@dataclass(frozen=True)
class ClientAccess:
    """Says what a server is shown to let a client in, and whom the client believes; see `HttpClient`."""

    credentials: Credentials | None = None
    tls: ClientTls | None = None

    @classmethod
    def of_files(cls, key_file: Path | None, ca: Path | None) -> Self:
        """Reads a bearer key, and authorities of one's own.

        Raises:
            ConfigurationError: a file cannot be used.
        """
        credentials = None if key_file is None else Credentials(bearer_file=key_file)
        return cls(credentials, None if ca is None else ClientTls(ca=ca))

    def headers(self) -> dict[str, str]:
        """Gives what is sent with each request."""
        lines = b"" if self.credentials is None else self.credentials.lines()
        parts = (line.partition(": ") for line in lines.decode("ascii").splitlines())
        return {name: value for name, _, value in parts}

    def context(self) -> ssl.SSLContext | None:
        """Gives the context for `https://`; None: the system's."""
        return None if self.tls is None else client_contexts(self.tls).get()


NO_ACCESS = ClientAccess()


class HttpClient:
    """Sends requests to the server at one URL.

    Args:
        url: `http://` or `https://`, a host, and if need be a name and password, a port and the beginning of all paths.
        headers: lower-case names of the headers of replies that are kept.
        idle_s: for how long an unused connection is kept.
        credentials: sent with each request.
        tls: files for `https://`; None: the system's authorities, and no certificate of one's own.

    Raises:
        ConfigurationError: the URL is none of those, a file of TLS cannot be used, or the three contradict each other.
    """

    def __init__(
        self,
        url: str,
        headers: Collection[bytes] = (),
        *,
        idle_s: float = _IDLE_S,
        credentials: Credentials | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        self._wanted = frozenset(headers)
        self._idle_s = idle_s
        shown = without_password(url)
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            host = host if ":" in host else host.encode("idna").decode("ascii")
        except (ValueError, UnicodeError):
            raise ConfigurationError(f"{shown!r} is not a URL that can be reached") from None
        if parts.scheme not in ("http", "https"):
            raise ConfigurationError(f"url must begin with http:// or https://, found {shown!r}")
        if not _HOST.fullmatch(host):
            raise ConfigurationError(f"{shown!r} names no host that can be reached")
        if parts.query or parts.fragment:
            raise ConfigurationError(f"{shown!r} must end with its path: what follows a ? or # is not sent")
        secure = parts.scheme == "https"
        self._host, self._port = host, port or (443 if secure else 80)
        self._secure = secure
        if tls is not None and not secure:
            raise ConfigurationError(f"{shown!r}: TLS needs a URL that begins with https://")
        # The system's authorities take a while to read, so that they are read when they are needed.
        self._contexts = None if tls is None else client_contexts(tls, _PROTOCOLS)
        self._name = (tls and tls.name) or host
        self._credentials = credentials or Credentials()
        if not secure and self._credentials and host not in _LOOPBACK:
            _log.warning("%s: credentials can be read on their way there; use https://", shown)
        self._path = quote(parts.path.rstrip("/"), safe=_PATH_SIGNS)
        named = f"[{host.partition('%')[0]}]" if ":" in host else host
        lines = f"host: {named}{'' if port is None else f':{port}'}\r\nuser-agent: evenkeel\r\naccept: */*\r\n"
        lines += "accept-encoding: identity\r\n"  # a short reply could become a long one
        if parts.username is not None:
            if b"authorization:" in self._credentials.lines().lower():
                raise ConfigurationError(f"{shown!r}: a password in the URL and a bearer key exclude each other")
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            lines += f"authorization: Basic {base64.b64encode(secret).decode()}\r\n"
        self._lines = lines.encode("ascii")
        self._connections: set[_ClientConnection] = set()
        self._connecting: dict[asyncio.Task[None], ClientExchange] = {}
        self._idle: dict[_ClientConnection, float] = {}  # since when, in that order
        self._sweeping: asyncio.TimerHandle | None = None
        self._closed = False

    def start_of(self, method: str, path: str) -> bytes:
        """Writes the first lines of a request's head; more header lines may be put behind them."""
        return f"{method} {self._path}{path} HTTP/1.1\r\n".encode("ascii") + self._lines

    def send(self, head: bytes, body: bytes | None, max_bytes: int, on_done: OnDone) -> ClientExchange:
        """Sends a request; see the module for when `on_done` is called.

        Args:
            head: from `start_of`, and any further header lines, each with its line end; credentials are added.
            body: whole; None for a request without one.
            max_bytes: that the body of the reply may have.
            on_done: called with the reply or an error.

        Raises:
            BackendLostError: this client was closed.
        """
        if self._closed:
            raise BackendLostError("the client was closed")
        head += self._credentials.lines()
        head += b"\r\n" if body is None else b"content-length: %d\r\n\r\n" % len(body)
        exchange = ClientExchange(head, body or b"", max_bytes, on_done)
        idle = self._idle
        if idle:
            # The one that was used last: if that has been idle for too long, so have all others.
            connection, since_s = idle.popitem()
            if asyncio.get_running_loop().time() - since_s <= self._idle_s:
                exchange._kept = True
                connection.begin(exchange)
                return exchange
            connection.abort()
        self._connect(exchange)
        return exchange

    async def request(
        self, method: str, path: str, body: bytes | None = None, headers: bytes = b"", max_bytes: int = _MAX_BYTES
    ) -> HttpReply:
        """Sends a request and waits for its reply; for requests that are rare.

        Raises:
            BackendError: there is none, or it cannot be read.
        """
        replied: asyncio.Future[HttpReply | BackendError] = asyncio.get_running_loop().create_future()

        def on_done(result: HttpReply | BackendError) -> None:
            if not replied.done():  # else who waited was cancelled, and has not run yet
                replied.set_result(result)

        exchange = self.send(self.start_of(method, path) + headers, body, max_bytes, on_done)
        try:
            reply = await replied
        finally:
            exchange.abort()
        if isinstance(reply, BackendError):
            raise reply
        return reply

    async def __aenter__(self) -> Self:
        """Gives the client, which is closed at the end."""
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Closes the client."""
        await self.close()

    @property
    def connections(self) -> int:
        """Counts the open connections."""
        return len(self._connections)

    async def close(self) -> None:
        """Closes all connections; open requests get a BackendLostError."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
        connecting, connections = dict(self._connecting), list(self._connections)
        for task, exchange in connecting.items():
            task.cancel()
            exchange._finish(BackendLostError("the client was closed"))
        for connection in connections:
            connection.drop()
        await asyncio.gather(*connecting, *(connection.lost for connection in connections), return_exceptions=True)

    def _connect(self, exchange: ClientExchange) -> None:
        task = exchange._connecting = asyncio.get_running_loop().create_task(self._open(exchange))
        self._connecting[task] = exchange
        task.add_done_callback(self._connecting.pop)

    async def _open(self, exchange: ClientExchange) -> None:
        try:
            connection = await self._dial()
        except Exception as error:  # of the socket, of TLS, of the name's encoding
            why = tls_reason(error)
            exchange._finish(NotConnectedError(f"cannot connect to {self._host}:{self._port}: {why}"))
        else:
            exchange._connecting = None
            if connection.lost.done():
                exchange._finish(BackendLostError("connection lost: the server closed it at once"))
            else:
                # Not before: one whose making is cancelled closes without a word on some event loops.
                self._connections.add(connection)
                connection.begin(exchange)

    async def _dial(self) -> "_ClientConnection":
        """Connects to whichever of the host's addresses answers first; they are tried in order, each with a start."""
        loop = asyncio.get_running_loop()
        if self._secure and self._contexts is None:
            self._contexts = client_contexts(ClientTls(), _PROTOCOLS)
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if len(addresses) == 1:
            return await self._reach(self._host)
        running: set[asyncio.Task[_ClientConnection]] = set()
        problem: BaseException | None = None
        try:
            while addresses or running:
                if addresses:
                    running.add(loop.create_task(self._reach(addresses.pop(0))))
                patience_s = _NEXT_ADDRESS_S if addresses else None
                done, _ = await asyncio.wait(running, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    running.discard(task)
                    problem = task.exception()
                    if problem is None:
                        return task.result()
        finally:
            for task in running:
                task.add_done_callback(_drop_loser)
                task.cancel()
        raise problem or OSError("its name has no address")

    async def _reach(self, address: str) -> "_ClientConnection":
        context = None if self._contexts is None else self._contexts.get()
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _ClientConnection(self),
            address,
            self._port,
            ssl=context,
            server_hostname=self._name if context else None,
            ssl_handshake_timeout=_HANDSHAKE_S if context else None,
        )
        return connection

    # ---- what connections call ----

    def _keep(self, connection: "_ClientConnection") -> None:
        loop = asyncio.get_running_loop()
        self._idle[connection] = loop.time()
        if self._sweeping is None:
            self._sweeping = loop.call_later(self._idle_s, self._sweep)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for connection, since_s in list(self._idle.items()):
            if now_s - since_s < self._idle_s:
                break
            del self._idle[connection]
            connection.abort()
        self._sweeping = loop.call_later(self._idle_s, self._sweep) if self._idle else None


async def request_once(url: str, path: str, access: ClientAccess = NO_ACCESS) -> HttpReply:
    """Gets what is at `path` of the server at `url`.

    Raises:
        BackendError: there is no reply, or it cannot be read.
    """
    async with HttpClient(url, credentials=access.credentials, tls=access.tls) as client:
        return await client.request("GET", path)


def _drop_loser(task: "asyncio.Task[_ClientConnection]") -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().abort()


class _ClientConnection(asyncio.Protocol):
    """Sends one request at a time over one connection.

    Attributes:
        lost: done once the connection is closed.
    """

    __slots__ = ("_client", "_exchange", "_reader", "_transport", "lost")

    _transport: asyncio.Transport

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._exchange: ClientExchange | None = None
        self._reader = ReplyReader(client._wanted)
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self, exchange: ClientExchange) -> None:
        """Sends a request."""
        self._exchange = exchange
        exchange._connection = self
        self._reader.expect(exchange._max_bytes)
        head, body = exchange._head, exchange._body
        if len(body) <= _JOIN_UP_TO_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def abort(self) -> None:
        """Closes at once; nobody waits for a reply any more."""
        self._exchange = None
        self._transport.abort()

    def drop(self) -> None:
        """Closes at once, as the client is closed."""
        self._fail(BackendLostError("the client was closed"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Is ready for its first request."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own have no common ancestor with asyncio's

    def data_received(self, data: bytes) -> None:
        """Reads the reply."""
        exchange = self._exchange
        if exchange is None:
            self._leave()  # nothing was requested, so that nobody knows what this is
            return
        try:
            reply = self._reader.feed(data)
        except ProtocolError as error:
            self._fail(error)
        except Exception as error:
            _log.exception("unexpected error while reading a reply")
            self._fail(BackendError(f"a reply could not be read: {type(error).__name__}: {error}"))
        else:
            if reply is not None:
                self._exchange = None
                # A reply that comes before the whole request was taken leaves the rest of that behind it.
                if self._reader.keep and not self._client._closed and not self._transport.get_write_buffer_size():
                    self._client._keep(self)
                else:
                    self._transport.abort()
                exchange._finish(reply)

    def eof_received(self) -> None:
        """Takes a reply that lasts as long as its connection, and closes."""
        self._client._idle.pop(self, None)
        self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Sends the request once more, or says that it is lost."""
        self._client._connections.discard(self)
        self._client._idle.pop(self, None)
        self._end(exc)
        self._reader.close()
        if not self.lost.done():
            self.lost.set_result(None)

    def _end(self, problem: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        reader, client = self._reader, self._client
        reply = reader.end() if problem is None else None
        if reply is not None:
            exchange._finish(reply)
        elif exchange._kept and not reader.begun and not client._closed:
            exchange._kept = False
            exchange._connection = None
            client._connect(exchange)
        else:
            why = "the server closed it" if problem is None else tls_reason(problem)
            exchange._finish(BackendLostError(f"connection lost: {why}"))

    def _fail(self, error: BackendError) -> None:
        exchange, self._exchange = self._exchange, None
        self._leave()
        if exchange is not None:
            exchange._finish(error)

    def _leave(self) -> None:
        self._client._idle.pop(self, None)
        self._transport.abort()
