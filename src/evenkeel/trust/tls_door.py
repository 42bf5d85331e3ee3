"""Puts TLS in front of a server's protocols, with handshakes that are bounded in number, time and bytes.

The event loop's own TLS calls a protocol only once its handshake is done, so that no limit of connections sees who
never finishes one. Here a connection is counted from its first moment; where too many are under way, the oldest ends.
Handshakes are computed one at a time, between other events: a crowd of them holds nobody up for longer than one does.
It is also quicker: a request that comes in one record costs one read of it, and none that ends in an exception.
"""

import asyncio
import contextlib
import logging
import ssl
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, cast

from evenkeel.trust.reloaded import Reloaded
from evenkeel.trust.tls import tls_reason

__all__ = ["MAX_HANDSHAKES", "TlsDoor", "peer_name"]

_log = logging.getLogger(__name__)

MAX_HANDSHAKES = 512
_READ_BYTES = 16 << 10  # a record holds no more
_WRITE_BYTES = 256 << 10  # of an answer that are encrypted at a time
_MAX_HANDSHAKE_BYTES = 64 << 10  # of a client, until it is done
_RECORD_OF_HANDSHAKE = 0x16
_LOG_EVERY_S = 10.0


class TlsDoor:
    """Makes protocols that speak TLS with a client and hand on to another protocol what is inside.

    Args:
        contexts: gives the context for each new connection.
        make: makes the protocol inside, which is connected once the handshake is done.
        handshake_s: that a client may take for it.
        max_handshakes: that are under way at once; for one more, the oldest is ended.
        plain_answer: sent to who speaks no TLS at all; empty: nothing is.
        outcomes: counts how handshakes ended: `done`, `failed`, `late`, `crowded`, `plain`.

    Attributes:
        idle: set while no handshake is under way.
    """

    def __init__(
        self,
        contexts: Reloaded[ssl.SSLContext],
        make: Callable[[], asyncio.BaseProtocol],
        *,
        handshake_s: float = 10.0,
        max_handshakes: int = MAX_HANDSHAKES,
        plain_answer: bytes = b"",
        outcomes: Counter[str] | None = None,
    ) -> None:
        self.contexts, self.make, self.plain_answer = contexts, make, plain_answer
        self.handshake_s, self.max_handshakes = handshake_s, max_handshakes
        self.outcomes: Counter[str] = Counter() if outcomes is None else outcomes
        self.idle = asyncio.Event()
        self.idle.set()
        self.shaking: dict[_TlsConnection, None] = {}  # in the order in which they came
        self._turns: deque[_TlsConnection] = deque()
        self._next_log_s = 0.0

    def connect(self) -> asyncio.Protocol:
        """Makes a new connection."""
        return _TlsConnection(self)

    def abort(self) -> None:
        """Ends all handshakes that are under way."""
        for connection in list(self.shaking):
            connection.abort()

    def begins(self, connection: "_TlsConnection") -> None:
        """Counts a connection in."""
        self.shaking[connection] = None
        self.idle.clear()
        if len(self.shaking) > self.max_handshakes:
            oldest = next(iter(self.shaking))
            oldest.give_up("crowded", None)

    def ends(self, connection: "_TlsConnection", outcome: str, reason: str = "") -> None:
        """Counts a connection whose handshake ended."""
        if connection in self.shaking:
            del self.shaking[connection]
            self.outcomes[outcome] += 1
            if not self.shaking:
                self.idle.set()
            if reason:
                self._log(reason)

    def in_turn(self, connection: "_TlsConnection") -> None:
        """Has the connection go on with its handshake when its turn comes."""
        self._turns.append(connection)
        if len(self._turns) == 1:
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        connection = self._turns.popleft()
        if self._turns:
            asyncio.get_running_loop().call_soon(self._next)
        connection.shake()

    def _log(self, reason: str) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._next_log_s:
            self._next_log_s = now_s + _LOG_EVERY_S
            _log.warning("a handshake failed: %s (%s so far)", reason, f"{self.outcomes['failed']:,}")


class _TlsConnection(asyncio.Protocol):
    """Stands between a transport, to which it is a protocol, and a protocol, to which it is a transport."""

    def __init__(self, door: TlsDoor) -> None:
        self._door = door
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        self._inner: asyncio.BaseProtocol | None = None  # once the handshake is done
        self._buffered = False
        self._timer: asyncio.TimerHandle | None = None
        self._shaken_bytes = 0
        self._waits_for_turn = False
        self._paused = False
        self._deaf = False
        self._closed = False

    # ---- what the transport calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Waits for a handshake."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own have no common ancestor with asyncio's
        door = self._door
        self._timer = asyncio.get_running_loop().call_later(door.handshake_s, self.give_up, "late", None)
        door.begins(self)

    def data_received(self, data: bytes) -> None:
        """Goes on with the handshake, or hands on what is inside."""
        if self._deaf:
            return
        self._in.write(data)
        if self._inner is not None:
            self._read()
            return
        if self._closed:
            return
        if not self._shaken_bytes and data[0] != _RECORD_OF_HANDSHAKE:
            self._transport.write(self._door.plain_answer)
            self._closed = True
            self._door.ends(self, "plain")
            self._transport.close()
            return
        if self._tls is None:  # not before: who connects and says nothing costs next to nothing
            self._tls = self._door.contexts.get().wrap_bio(self._in, self._out, server_side=True)
        self._shaken_bytes += len(data)
        if not self._waits_for_turn:
            self._waits_for_turn = True
            self._transport.pause_reading()  # its end may come together with any amount of what follows
            self._door.in_turn(self)

    def eof_received(self) -> bool | None:
        """Says that the client sends no more."""
        if self._inner is None:
            self.give_up("failed", None)
        elif not self._closed:
            self._end_of_input()
        return None

    def pause_writing(self) -> None:
        """Passes it on."""
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Passes it on."""
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Passes it on, and lets go of everything: the two sides hold each other."""
        self._door.ends(self, "failed")
        if self._timer is not None:
            self._timer.cancel()
        self._closed = True
        inner, self._inner, self._tls = self._inner, None, None
        if inner is not None:
            inner.connection_lost(exc)

    # ---- the handshake ----

    def shake(self) -> None:
        """Goes a step further in the handshake, with what has come so far."""
        self._waits_for_turn = False
        if self._tls is None or self._closed or self._inner is not None or self not in self._door.shaking:
            return
        if not self._transport.is_closing():
            self._transport.resume_reading()
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            if self._shaken_bytes > _MAX_HANDSHAKE_BYTES:
                self.give_up("failed", "it is longer than any")
            return
        except ssl.SSLError as error:
            self._flush()  # the alert
            self.give_up("failed", tls_reason(error), gently=True)
            return
        self._flush()
        assert self._timer is not None
        self._timer.cancel()
        self._inner = self._door.make()
        self._buffered = isinstance(self._inner, asyncio.BufferedProtocol)
        self._inner.connection_made(cast(asyncio.BaseTransport, self))
        self._door.ends(self, "done")  # not before: who waits for the last connection sees it here or there
        self._read()

    def give_up(self, outcome: str, reason: str | None, gently: bool = False) -> None:
        """Ends a connection whose handshake is not done."""
        self._door.ends(self, outcome, reason or "")
        self._closed = True
        if gently:
            self._transport.close()
        else:
            self._transport.abort()

    # ---- what comes ----

    def _read(self) -> None:
        """Hands on what is inside, for as long as the protocol reads."""
        tls, inner = self._tls, self._inner
        if tls is None or inner is None:
            return
        try:
            while not self._paused and not self._closed and not self._deaf:
                if self._buffered:
                    room = cast(memoryview, cast(asyncio.BufferedProtocol, inner).get_buffer(-1))
                    count = cast(int, tls.read(len(room), room))  # its type is that of a read without a buffer
                    if count:
                        cast(asyncio.BufferedProtocol, inner).buffer_updated(count)
                else:
                    data = tls.read(_READ_BYTES)
                    count = len(data)
                    if count:
                        cast(asyncio.Protocol, inner).data_received(data)
                if not count:
                    self._end_of_input()
                    return
                if not self._in.pending and not tls.pending():
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self._flush()
            _log.info("a connection broke: %s", tls_reason(error))
            self._transport.abort()
            return
        if self._out.pending:
            self._flush()

    def _end_of_input(self) -> None:
        if not cast(asyncio.Protocol, self._inner).eof_received():
            self.close()

    def _say_end(self) -> None:
        if self._tls is not None:
            # The other side has not said it yet, and nobody waits for that.
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._flush()

    def _flush(self) -> None:
        if self._out.pending:
            self._transport.write(self._out.read())

    # ---- the protocol's transport ----

    def write(self, data: "bytes | bytearray | memoryview[int]") -> None:
        """Sends `data`."""
        if self._closed or self._deaf or self._tls is None:
            return
        try:
            if len(data) <= _WRITE_BYTES:
                self._tls.write(data)
                self._transport.write(self._out.read())
                return
            view = memoryview(data).cast("B")
            for start in range(0, len(view), _WRITE_BYTES):
                self._tls.write(view[start : start + _WRITE_BYTES])
                self._transport.write(self._out.read())
        except ssl.SSLError as error:
            _log.info("a connection broke: %s", tls_reason(error))
            self._transport.abort()

    def writelines(self, pieces: "Any") -> None:
        """Sends all `pieces`."""
        for piece in pieces:
            self.write(piece)

    def close(self) -> None:
        """Ends the connection after what was sent, with the words of TLS for it."""
        if self._closed:
            return
        self._closed = True
        if not self._deaf:
            self._say_end()
        self._transport.close()

    def abort(self) -> None:
        """Ends the connection at once."""
        self._closed = True
        self._transport.abort()

    def is_closing(self) -> bool:
        """True once the connection ends."""
        return self._closed or self._transport.is_closing()

    def can_write_eof(self) -> bool:
        """True: the other side learns that nothing more comes."""
        return True

    def write_eof(self) -> None:
        """Says that nothing more is sent; what still comes is dropped, and its end is handed on."""
        if not self._closed and not self._deaf:
            self._deaf = True
            self._say_end()
            self._transport.write_eof()

    def pause_reading(self) -> None:
        """Hands on nothing until `resume_reading`."""
        if not self._paused and not self._closed:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Hands on what comes, and what has come already."""
        if self._paused and not self._closed:
            self._paused = False
            self._transport.resume_reading()
            asyncio.get_running_loop().call_soon(self._read)

    def is_reading(self) -> bool:
        """True unless it was paused."""
        return not self._paused and not self._closed

    def get_write_buffer_size(self) -> int:
        """Counts the bytes that are not sent yet."""
        return self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Gives what the transport knows, and the `ssl_object`."""
        return self._tls if name == "ssl_object" else self._transport.get_extra_info(name, default)


def peer_name(transport: asyncio.BaseTransport) -> str:
    """Gives the name in the certificate that the client showed: its common name, or else its first other name.

    Empty where it showed none, or TLS is not used. The certificate was verified: else there would be no connection.
    """
    tls = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert() if tls is not None else None
    if not certificate:
        return ""
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    names += [value for _, value in certificate.get("subjectAltName", ())]
    return names[0][:64] if names else "unnamed"
