"""Runs one framed connection on an event loop: the same on the worker's side and on the client's."""

import asyncio
import socket
from collections.abc import Callable, Iterable
from typing import cast

from evenkeel.backends.worker.frames import MAX_PAYLOAD_BYTES, Frame, FrameReader
from evenkeel.errors import ProtocolError

__all__ = ["Connection"]


class Connection(asyncio.BufferedProtocol):
    """Gives frames as they come, and says once when and why it ended.

    Args:
        on_frame: called with every frame; a ProtocolError that it raises ends the connection.
        on_end: called once, with the error that ended the connection, or None where the peer (or we) just closed it.
        on_open: called once the connection stands.
        refuse: makes the error that is sent to a peer that broke the rules; None, or nothing made: nothing is sent.
        hold_back: stop reading while the peer does not read what we send. For workers only: if both sides did, two full
            sockets would wait for each other for ever.
    """

    def __init__(
        self,
        on_frame: Callable[[Frame], object],
        on_end: Callable[[Exception | None], object],
        on_open: Callable[[], object] = lambda: None,
        refuse: Callable[[ProtocolError], bytes] | None = None,
        hold_back: bool = False,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        self._on_frame, self._on_end, self._on_open, self._refuse = on_frame, on_end, on_open, refuse
        self._hold_back = hold_back
        self._reader = FrameReader(max_payload_bytes)
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None
        self._closing = False

    def limit_payload(self, max_payload_bytes: int) -> None:
        """Refuses longer payloads from the next frame on."""
        self._reader.max_payload_bytes = max_payload_bytes

    def send(self, pieces: "Iterable[bytes | memoryview]") -> None:
        """Sends a frame; does nothing once the connection is closing."""
        if not self._closing and self._transport is not None:
            for piece in pieces:
                self._transport.write(piece)

    def close(self) -> None:
        """Ends the connection after what was sent so far."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    def abort(self, error: Exception | None = None) -> None:
        """Ends the connection now; `on_end` will be called with `error`."""
        self._error = self._error or error
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport, and has small frames sent at once."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        plain = transport.get_extra_info("socket")
        if plain is not None and plain.family in (socket.AF_INET, socket.AF_INET6):
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(plain)
        if self._closing:  # aborted while it was being opened
            self._transport.abort()
        else:
            self._on_open()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Gives the memory into which the transport puts the next bytes."""
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Hands on the frames that these bytes complete."""
        try:
            for frame in self._reader.advance(nbytes):
                if self._closing:
                    return
                self._on_frame(frame)
            if self._reader.error is not None and not self._closing:
                raise self._reader.error
        except ProtocolError as error:
            self._error = error.with_traceback(None)  # which would keep alive whatever is on the stack
            said = b"" if self._refuse is None else self._refuse(error)
            if said:
                self.send([said])
            self.close()

    def pause_writing(self) -> None:
        """Stops reading from a peer that does not read."""
        if self._hold_back and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Reads on."""
        if self._hold_back and self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Reports the end."""
        self._closing = True
        self._on_end(self._error or exc)


def _keep_alive(plain: socket.socket) -> None:
    """Lets the kernel notice a peer that vanished silently: after 10 s without traffic, and three probes in 5 s."""
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 15_000)):
        if hasattr(socket, name):
            plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
