"""Connects a client to its worker: the seam between keeping a connection and what stands behind it."""

import asyncio
import os
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable

from evenkeel.backends.worker.address import Address
from evenkeel.backends.worker.connection import Connection
from evenkeel.errors import BackendLostError, ConfigurationError, EvenkeelError
from evenkeel.trust.tls import ClientTls, client_contexts, tls_reason

__all__ = ["SocketLink", "WorkerLink"]


_HANDSHAKE_S = 10.0


class WorkerLink(ABC):
    """Opens connections to one worker, one at a time.

    Attributes:
        where: the worker's address or process, for messages.
        ours: the worker is started by the link itself.
    """

    where: str
    ours: bool = False

    async def find(self, key: bytes) -> bytes:
        """Finds out where the worker is, before each connection; gives the key that both ends must prove to hold.

        Args:
            key: the client's own; a link to a worker that others cannot connect to needs none and gives an empty one.

        Raises:
            EvenkeelError: as `open`.
        """
        return b""

    @abstractmethod
    async def open(self, make: Callable[[], Connection]) -> None:
        """Connects a new `make()`.

        Raises:
            BackendLostError: not now; trying again may help.
            EvenkeelError: trying again will not help.
        """

    async def ended(self, error: EvenkeelError, greeted: bool) -> EvenkeelError:
        """Cleans up after a connection that ended by `error`; returns the error with what is known of the reason.

        Args:
            error: what the client saw.
            greeted: the worker had said hello.
        """
        return error

    async def close(self) -> None:  # noqa: B027 - most links hold nothing
        """Lets go of what stands behind the link."""


class SocketLink(WorkerLink):
    """Connects to a worker that somebody else started, at a Unix or TCP address.

    Args:
        address: of the worker.
        tls: files of TLS, for TCP; None: the link is not encrypted.

    Raises:
        ConfigurationError: the address is a file descriptor's, or a file of TLS cannot be used.
    """

    def __init__(self, address: Address, tls: ClientTls | None = None) -> None:
        if address.kind == "fd":
            raise ConfigurationError(f"a worker cannot be reached at {address}; expected unix:/path or tcp://host:port")
        self._address = address
        self._contexts = None if tls is None or address.kind != "tcp" else client_contexts(tls)
        self._name = (tls and tls.name) or address.host
        self.where = str(address)

    async def find(self, key: bytes) -> bytes:
        """Gives `key` for TCP alone: on a Unix socket only this user's processes can connect."""
        return key if self._address.kind == "tcp" else b""

    async def open(self, make: Callable[[], Connection]) -> None:
        """Connects."""
        loop = asyncio.get_running_loop()
        try:
            if self._address.kind == "unix":
                await loop.create_unix_connection(make, self._address.path)
            elif self._contexts is None:
                await loop.create_connection(make, self._address.host, self._address.port)
            else:
                await loop.create_connection(
                    make,
                    self._address.host,
                    self._address.port,
                    ssl=self._contexts.get(),
                    server_hostname=self._name,
                    ssl_handshake_timeout=_HANDSHAKE_S,
                )
        except ssl.SSLError as error:
            raise BackendLostError(f"the worker at {self._address} cannot be trusted: {tls_reason(error)}") from error
        except OSError as error:
            reason = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
            raise BackendLostError(f"no worker answers at {self._address}: {reason}") from error
