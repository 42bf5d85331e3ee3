"""Keeps the nodes of one gateway, which come and go while it answers.

A node joins once it has started and done its first passes; one that leaves gets no more work, finishes what it has, and
is closed then. So a fleet is resized and restarted without losing a request: a successor joins before its predecessor
leaves.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evenkeel.backends.backend import Backend
from evenkeel.backends.worker.process import ProcessBackend
from evenkeel.errors import BackendError, ConfigurationError, EvenkeelError
from evenkeel.serving.front.management import NodeState
from evenkeel.serving.gateway.gateway import Gateway, NodeKind

__all__ = ["FleetMember", "LiveFleet"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FleetMember:
    """Describes one node of a fleet; `own` if the gateway had it started."""

    backend: Backend
    kind: NodeKind

    @property
    def name(self) -> str:
        """Gives the node's name, unique in its fleet."""
        return self.backend.name

    @property
    def own(self) -> bool:
        """Tells whether it is a worker that is there because the gateway had it started."""
        return self.backend.managed


class LiveFleet:
    """Starts nodes, lets them into a gateway, and takes them out of it.

    Args:
        gateway: that uses them.
        members: that the gateway was made with; `start` starts them.
        warm_up: has a node do its first passes, and says whether it could.
        make: makes one more worker of the gateway's own, of a new name.
        drain_s: longest wait for the tasks of a node that leaves.
    """

    def __init__(
        self,
        gateway: Gateway,
        members: Iterable[FleetMember],
        warm_up: Callable[[Backend, NodeKind], Awaitable[bool]],
        make: Callable[[NodeKind], Backend],
        *,
        drain_s: float = 30.0,
    ) -> None:
        self._gateway = gateway
        self._members = {member.name: member for member in members}
        self._warm_up = warm_up
        self._make = make
        self._drain_s = drain_s
        self._changing = asyncio.Lock()  # a resize or a restart is under way
        self._under_way: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def members(self) -> Sequence[FleetMember]:
        """Gives the nodes that get work, in the order in which they joined."""
        return tuple(self._members.values())

    @property
    def states(self) -> list[NodeState]:
        """Says how each node is."""
        tasks = {node.backend.name: len(node.open) for node in (*self._gateway.replicas.all, *self._gateway.backups)}
        return [
            NodeState(one.name, one.kind, one.own, one.backend.ready, tasks.get(one.name, 0)) for one in self.members
        ]

    async def start(self, *, at_once: int | None = None) -> None:
        """Starts the nodes that the gateway was made with; what is elsewhere may be missing for now.

        Args:
            at_once: workers of this process that are started at a time; all by default.

        Raises:
            ConfigurationError: a worker cannot start with what it was given.
            BackendError: a worker started here died while it loaded.
        """
        here = [one.backend for one in self.members if isinstance(one.backend, ProcessBackend)]
        reached = [asyncio.ensure_future(_reach(one.backend)) for one in self.members if one.backend not in here]
        step = at_once or max(1, len(here))
        try:
            for first in range(0, len(here), step):
                async with asyncio.TaskGroup() as group:
                    for backend in here[first : first + step]:
                        group.create_task(backend.start())
        except* (ConfigurationError, BackendError) as errors:
            raise errors.exceptions[0] from None
        if reached:
            await asyncio.wait(reached)
        await asyncio.gather(*(self._warm_up(member.backend, member.kind) for member in self.members))

    async def join(self, backend: Backend, kind: NodeKind = "replica", *, patient: bool = False) -> None:
        """Starts a node, has it do its first passes, and lets it in. If that fails, all is as before.

        Args:
            backend: the node, of a new name; the fleet closes it.
            kind: whether it is a replica or a backup.
            patient: lets it in also where it cannot be reached now: it is tried until it can.

        Raises:
            ConfigurationError: it does not fit, its name is taken, or there is no use for backups.
            BackendError: it could not be started, or not do a first pass.
        """
        await self._look_after(self._join(backend, kind, patient))

    async def _join(self, backend: Backend, kind: NodeKind, patient: bool) -> None:
        try:
            self._gateway.check_join(backend.name, kind)  # before it takes time and memory to start
            if patient:
                await _reach(backend)
            else:
                await backend.start()
            tried = backend.ready and await self._warm_up(backend, kind)
            if not (tried or patient):
                raise BackendError(f"{backend.name} could not do its first passes, so it does not join")
            if self._closed:
                raise BackendError(f"{backend.name} does not join: the server is shutting down")
            self._gateway.join(backend, kind, tried=tried)
        except BaseException:
            await backend.close()
            raise
        self._members[backend.name] = FleetMember(backend, kind)
        _log.info("%s joined", backend.name)

    async def leave(self, name: str, drain_s: float | None = None) -> None:
        """Gives a node no more work, waits until it has none, and closes it.

        Args:
            name: of the node.
            drain_s: longest wait; what is left then is done by others. The fleet's own by default.

        Raises:
            ConfigurationError: there is no such node.
        """
        member = self._members.pop(name, None)
        if member is None:
            raise ConfigurationError(f"no node is called {name!r}; there are {', '.join(self._members) or 'none'}")
        left: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_left(given_up: int) -> None:
            if not left.done():  # else the server is shutting down
                left.set_result(given_up)

        # From here on also if nobody waits for it any more: the gateway does not use the node again.
        self._gateway.retire(name, self._drain_s if drain_s is None else drain_s, on_left)
        await self._look_after(self._close_when(left, member))

    async def _close_when(self, left: "asyncio.Future[int]", member: FleetMember) -> None:
        try:
            if given_up := await left:
                _log.warning("%s left with %d tasks, which others do", member.name, given_up)
        finally:
            await member.backend.close()
        _log.info("%s left", member.name)

    async def replace(self, name: str, backend: Backend) -> None:
        """Has a node take another one's place: it joins, and only then the other one leaves.

        Raises:
            ConfigurationError: as for `join` and `leave`; the fleet is as it was.
            BackendError: as for `join`; the fleet is as it was.
        """
        member = self._members.get(name)
        if member is None:
            raise ConfigurationError(f"no node is called {name!r}; there are {', '.join(self._members) or 'none'}")
        await self.join(backend, member.kind)
        await self.leave(name)

    async def resize(self, kind: NodeKind, count: int, *, at_once: int = 1) -> None:
        """Starts or ends the gateway's own workers until there are so many of a kind.

        Args:
            kind: replicas or backups.
            count: of the workers that it had started, here or on Ray.
            at_once: workers that are started at a time: each takes processor time from those that serve.

        Raises:
            ConfigurationError: no replica would be left, or a worker cannot start.
            BackendError: a worker could not be started; those that were stay.
        """
        async with self._changing:
            elsewhere = sum(member.kind == kind and not member.own for member in self.members)
            if count < 0 or (kind == "replica" and not count + elsewhere):
                raise ConfigurationError(f"a fleet needs at least one replica, found {count}")
            own = [member for member in self.members if member.own and member.kind == kind]
            for first in range(len(own), count, at_once):
                new = [self._make(kind) for _ in range(min(at_once, count - first))]
                await _all_of(self.join(backend, kind) for backend in new)
            await _all_of(self.leave(member.name) for member in own[count:])

    async def restart(self, *, at_once: int = 1) -> None:
        """Replaces every worker of the gateway's own by a fresh one; the others are restarted where they are.

        Args:
            at_once: workers that are replaced at a time. There are never fewer than before, for a while so many more.

        Raises:
            ConfigurationError: a worker cannot start; what is left of the fleet is as it was.
            BackendError: the same.
        """
        async with self._changing:
            own = [member for member in self.members if member.own]
            for first in range(0, len(own), at_once):
                some = own[first : first + at_once]
                await _all_of(self.replace(member.name, self._make(member.kind)) for member in some)

    async def close(self) -> None:
        """Closes every node; their open tasks are lost."""
        self._closed = True
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, *(one.backend.close() for one in self.members), return_exceptions=True)

    async def _look_after(self, steps: Coroutine[Any, Any, None]) -> None:
        """Does the steps to their end, also if whoever waits for them gives up; `close` alone ends them sooner."""
        task = asyncio.ensure_future(steps)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # and not whoever waits
                raise BackendError("the server is shutting down") from None
            raise


async def _reach(backend: Backend) -> None:
    """Starts a backend whose node is elsewhere.

    What is wrong there is no error here: it may be down or wrong at the moment, and a gateway that is restarted then
    must not be down with it. The backend goes on trying.
    """
    try:
        await backend.start()
    except EvenkeelError as error:
        _log.warning("%s; going on without it, and trying again", error)


async def _all_of(steps: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does all at once, each to its end, and raises the first error then."""
    for result in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
