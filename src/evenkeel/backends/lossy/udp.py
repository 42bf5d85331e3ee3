"""Carries the lossy transport's datagrams over UDP, on asyncio."""

import asyncio
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

from evenkeel.backends.lossy.backend import DatagramLink
from evenkeel.backends.lossy.server import AnswerImage, LossyServer, ServerLimits
from evenkeel.backends.worker.address import Address, parse_address
from evenkeel.backends.worker.key import check_open
from evenkeel.clock import LoopClock
from evenkeel.errors import BackendLostError, ConfigurationError
from evenkeel.text_values import without_password

__all__ = ["UdpLink", "serve_udp", "udp_address"]


def udp_address(text: str) -> Address:
    """Reads `udp://host:port`; without a host it is the loopback one.

    Raises:
        ConfigurationError: it names none.
    """
    try:
        if not text.startswith("udp://"):
            raise ConfigurationError("of another kind")
        return parse_address("tcp://" + text.removeprefix("udp://"))
    except ConfigurationError:
        raise ConfigurationError(f"address {without_password(text)!r}: expected udp://host:port") from None


class UdpLink(DatagramLink):
    """Reaches a server at a host and port."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.where = f"udp://{host}:{port}"
        self._transport: asyncio.DatagramTransport | None = None

    async def open(self, received: Callable[[bytes], object]) -> None:
        """Opens a socket that takes datagrams of the server's address alone."""
        loop = asyncio.get_running_loop()
        try:
            self._transport, _ = await loop.create_datagram_endpoint(
                lambda: _Datagrams(lambda data, _: received(data)), remote_addr=(self._host, self._port)
            )
        except OSError as error:
            raise BackendLostError(f"{self.where} cannot be reached: {error.strerror or error}") from error

    def send(self, data: bytes) -> None:
        """Sends one datagram."""
        if self._transport is not None:
            self._transport.sendto(data)

    def close(self) -> None:
        """Closes the socket."""
        if self._transport is not None:
            self._transport.close()


async def serve_udp(
    answer: AnswerImage,
    host: str,
    port: int,
    models: Mapping[str, str],
    *,
    key: bytes = b"",
    no_key: bool = False,
    limits: ServerLimits | None = None,
) -> tuple[LossyServer, asyncio.DatagramTransport]:
    """Receives images at a host and port, until the transport is closed; see `LossyServer`.

    Raises:
        ConfigurationError: the address cannot be had, or others can reach it although there is no key.
    """
    check_open(Address("tcp", host=host, port=port), key, no_key)
    loop = asyncio.get_running_loop()
    transport: asyncio.DatagramTransport | None = None

    def send(data: bytes, peer: Hashable) -> None:
        if transport is not None:
            transport.sendto(data, cast("tuple[Any, ...]", peer))  # as asyncio gave it to us

    server = LossyServer(answer, send, LoopClock(loop), models, key, limits)
    try:
        transport, _ = await loop.create_datagram_endpoint(
            lambda: _Datagrams(server.received), local_addr=(host, port)
        )  # fmt: skip
    except OSError as error:
        raise ConfigurationError(f"udp://{host}:{port} cannot be had: {error.strerror or error}") from error
    return server, transport


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, received: Callable[[bytes, Any], object]) -> None:
        self._received = received

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._received(data, addr)

    def error_received(self, exc: Exception) -> None:
        """Is told that nobody listens there; silence will say so, too."""
