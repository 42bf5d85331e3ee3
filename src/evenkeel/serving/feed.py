"""Keeps the nodes of a fleet as a discovery says where they are."""

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from evenkeel.backends.backend import Backend
from evenkeel.errors import EvenkeelError
from evenkeel.serving.discovery.discovery import Discovery
from evenkeel.serving.fleet import LiveFleet
from evenkeel.serving.gateway.gateway import NodeKind

__all__ = ["Feed"]

_log = logging.getLogger(__name__)
_PAUSE_S = 5.0


class Feed:
    """Has nodes join a fleet when their address is found, and leave when it no longer is.

    A discovery that finds nothing at all changes nothing: a fleet is not emptied by what may be a fault elsewhere.

    Args:
        fleet: in which the nodes are.
        kind: of the nodes.
        make: makes the backend of a node at an address.
        discovery: says where they are.

    Attributes:
        settled: set once the first nodes that were found have joined.
    """

    def __init__(
        self, fleet: LiveFleet, kind: NodeKind, make: Callable[[NodeKind, str], Backend], discovery: Discovery
    ) -> None:
        self._fleet, self._kind, self._make, self._discovery = fleet, kind, make, discovery
        self._here: dict[str, str] = {}  # address -> the node's name
        self._wanted: list[str] = []
        self._changed = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()
        self.settled = asyncio.Event()

    async def run(self) -> None:
        """Goes on until cancelled."""
        await asyncio.gather(_for_ever(self._follow), _for_ever(lambda: self._discovery.watch(self._found)))

    def _found(self, addresses: Collection[str]) -> None:
        if not addresses:
            _log.warning("no %s was found; those that are here stay", self._kind)
            return
        self._wanted = list(dict.fromkeys(addresses))
        self._changed.set()

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted = self._wanted
            new = [address for address in wanted if address not in self._here]
            gone = [address for address in self._here if address not in wanted]
            # The new ones first, so that there are never fewer than needed.
            await asyncio.gather(*(self._join(address) for address in new))
            for address in gone:
                leaving = asyncio.ensure_future(self._leave(address, self._here.pop(address)))
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)
            self.settled.set()

    async def _join(self, address: str) -> None:
        try:
            backend = self._make(self._kind, address)
            await self._fleet.join(backend, self._kind, patient=True)
        except EvenkeelError as error:
            _log.warning("the %s at %s does not join: %s", self._kind, address, error)
        else:
            self._here[address] = backend.name

    async def _leave(self, address: str, name: str) -> None:
        try:
            await self._fleet.leave(name)
        except EvenkeelError as error:
            _log.warning("the %s at %s: %s", self._kind, address, error)


async def _for_ever(steps: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Goes on after whatever goes wrong: a fleet that follows nothing any more would not show it."""
    while True:
        try:
            await steps()
        except Exception:
            _log.exception("what finds nodes failed, and begins again")
        await asyncio.sleep(_PAUSE_S)
