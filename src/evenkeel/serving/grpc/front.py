"""Puts the gRPC service beside the HTTP server, on a port of its own: both start, drain and end together."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from evenkeel.serving.front.access import Guard
from evenkeel.serving.grpc.app import GrpcApp
from evenkeel.serving.grpc.connection import GrpcLimits, GrpcServer
from evenkeel.trust.tls_door import TlsDoor

__all__ = ["GrpcFront"]


class GrpcFront:
    """Is a front end that `run_server` runs beside the HTTP server.

    Args:
        app: answers.
        hosts: addresses to listen on.
        port: TCP port, the same for all; 0 takes a free one.
        limits: of each client.

    Attributes:
        port: that is listened on, once the server has started.
        empty: set while nobody is connected.
    """

    def __init__(self, app: GrpcApp, hosts: Sequence[str], port: int, limits: GrpcLimits) -> None:
        self._app = app
        self._server: GrpcServer | None = None
        self._limits = limits
        self.hosts = hosts
        self.port = port
        self.empty = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Counts the messages that are being answered."""
        return self._app.in_flight

    @property
    def connections(self) -> int:
        """Gives the number of clients that may be connected."""
        return self._limits.connections

    def open(
        self, guard: Guard, connections: int, keep_alive_s: float
    ) -> tuple[Callable[[], asyncio.BaseProtocol], TlsDoor | None]:
        """Starts to serve; gives what makes the protocol of a connection, and TLS in front of it.

        Raises:
            ConfigurationError: a file of TLS cannot be used.
        """
        limits = replace(self._limits, connections=connections, keep_alive_s=keep_alive_s)
        self._server = GrpcServer(self._app, limits, access=guard.access)
        self.empty = self._server.empty
        return self._server.connect, guard.door(self._server.connect, ["h2"])

    def announce(self) -> None:
        """Asks clients to go elsewhere."""
        if self._server is not None:
            self._server.announce()

    def close(self) -> None:
        """Closes connections as soon as what they have sent is answered."""
        if self._server is not None:
            self._server.close()

    def give_up(self) -> None:
        """Answers all that is still in flight with an error."""
        self._app.give_up()

    def abort(self) -> None:
        """Closes all connections at once, and lets go of the threads."""
        if self._server is not None:
            self._server.abort()
        self._app.close()
