"""Keeps the process that speaks to Ray for a gateway, and the workers that it has there."""

import asyncio
import contextlib
import itertools
import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from evenkeel.backends.ray_actors.options import RayOptions
from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.connection import Connection
from evenkeel.backends.worker.links import SocketLink, WorkerLink
from evenkeel.backends.worker.process import LastWords
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.backends.worker.session import ClientOptions
from evenkeel.errors import BackendError, BackendLostError, ConfigurationError, EvenkeelError, MissingExtraError
from evenkeel.models.digest import ModelDigests

__all__ = ["RayEngine", "RayWorkers"]

_log = logging.getLogger(__name__)
_AGAIN_S = 5.0  # between two attempts to join a cluster: each takes a second of processor time
_EXIT_S = 4.0  # for the process to leave the cluster
_SLACK_S = 60.0  # beyond what a request itself may take: Ray may look for a cluster that is gone
_RELEASE_S = 2.0
_CONNECT_S = 5.0  # to a worker that Ray says is there
_KINDS = {"lost": BackendLostError, "wrong": ConfigurationError}
_TOLD = ("threads", "max_queued", "delay", "delay_cost", "max_clients", "max_rows", "max_batch", "drain_s")


class RayEngine:
    """Speaks to one Ray cluster through a process of its own, which lives while anything here uses it.

    Args:
        address: of the cluster; see `RayOptions`.
        program: the command of that process; None: `driver.py`. It gets a socket's descriptor and the address.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, address: str, program: Sequence[str] | None = None) -> None:
        if program is None and find_spec("ray") is None:
            raise MissingExtraError("Ray", "ray")
        # -P: a file beside the user's must not be taken for a module of ours.
        self._program = program or [sys.executable, "-P", "-m", "evenkeel.backends.ray_actors.driver"]
        self._address = address
        self._users: set[object] = set()
        self._numbers = itertools.count(1)
        self._starting = asyncio.Lock()
        self._process: _RayProcess | None = None

    async def ask(self, user: object, limit_s: float, **request: Any) -> dict[str, Any]:
        """Has the process do something for `user`.

        Raises:
            BackendLostError: Ray cannot do it now.
            EvenkeelError: it cannot do it at all.
        """
        self._users.add(user)
        async with self._starting:
            if self._process is not None and self._process.refused_s + _AGAIN_S > time.monotonic():
                raise self._process.lost()
            if self._process is None or self._process.ended:
                starting = asyncio.ensure_future(_RayProcess.start([*self._program], self._address))
                try:
                    self._process = await asyncio.shield(starting)
                except asyncio.CancelledError:  # who wanted it is gone; `leave` ends it, if nobody else does want it
                    self._process = await starting
                    raise
            process = self._process
        return await process.ask(next(self._numbers), request, limit_s)

    async def leave(self, user: object, **request: Any) -> None:
        """Has the process do a last thing for `user`, and ends it if that was the last user."""
        if user not in self._users:
            return
        self._users.discard(user)
        process = self._process
        if process is not None and not process.ended:
            with contextlib.suppress(EvenkeelError):
                await process.ask(next(self._numbers), request, _RELEASE_S)
        if not self._users and self._process is not None:
            process, self._process = self._process, None
            await process.close()


class _RayProcess:
    """Holds one process that speaks to Ray: requests go in as lines of JSON, answers come out of order."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        lines: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        words: tuple[asyncio.BaseTransport, LastWords],
    ) -> None:
        self._process, (self._reader, self._writer), (self._output, self._words) = process, lines, words
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._error: EvenkeelError | None = None
        self.ended = False
        self.refused_s = -math.inf  # when it could not join the cluster
        self._listener = asyncio.ensure_future(self._listen())

    @classmethod
    async def start(cls, program: list[str], address: str) -> "_RayProcess":
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        try:
            # A session of its own: Ctrl-C in a terminal is for the gateway alone, which finishes what it accepted.
            process = subprocess.Popen(
                [*program, str(theirs.fileno()), address],
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            os.close(read_end)
            raise BackendLostError(f"the process that speaks to Ray cannot be started: {error}") from error
        finally:
            theirs.close()
            os.close(write_end)
        pipe = os.fdopen(read_end, "rb", buffering=0)
        words = await loop.connect_read_pipe(lambda: LastWords("the process that speaks to Ray"), pipe)
        return cls(process, await asyncio.open_connection(sock=ours), words)

    async def ask(self, number: int, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[number] = future
        try:
            if not self.ended:
                self._writer.write(json.dumps({"id": number, **request}).encode() + b"\n")
                async with asyncio.timeout(limit_s):
                    return await future
            raise self.lost()
        except TimeoutError:
            raise BackendLostError(f"Ray gave no answer in {limit_s:g} s") from None
        finally:
            self._open.pop(number, None)

    async def close(self) -> None:
        """Ends the process: it leaves the cluster, by force if need be."""
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_S):
                await asyncio.shield(self._listener)
        self._process.kill()
        await self._listener

    async def _listen(self) -> None:
        """Hands answers to those who wait for them, until the process ends."""
        try:
            while line := await self._reader.readline():
                self._hear(json.loads(line))
        except OSError:  # it was killed
            pass
        except ValueError as error:
            _log.warning("the process that speaks to Ray said something else than was agreed: %s", error)
            self._process.kill()
        self.ended = True
        self._writer.close()
        await asyncio.get_running_loop().run_in_executor(None, self._wait)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._words.closed
        self._output.close()
        await asyncio.sleep(0)  # asyncio closes the pipe in its next round
        for future in self._open.values():
            if not future.done():
                future.set_exception(self.lost())

    def _wait(self) -> int:
        try:
            return self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _hear(self, answer: Mapping[str, Any]) -> None:
        error = None
        if "error" in answer:
            error = _KINDS.get(answer["kind"], BackendError)(answer["error"])
        if answer["id"] == 0:  # it could not join the cluster; its end follows
            self._error, self.refused_s = error, time.monotonic()
            return
        future = self._open.get(answer["id"])
        if future is None or future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(answer["result"])

    def lost(self) -> EvenkeelError:
        """Gives the error for who asks it after its end."""
        if self._error is not None:
            return type(self._error)(*self._error.args)
        said = f"; its last words: {self._words.text()}" if self._words.text() else ""
        return BackendLostError(f"the process that speaks to Ray ended{said}")


class RayWorkers:
    """Makes the workers of one kind that a gateway has on Ray.

    Args:
        engine: speaks to the cluster.
        name: of the kind, such as `cifar10-base/replica`.
        options: what Ray is asked for.
        worker: what each serves and how; address, key and files on this machine do not count.
        models: names that each must hold.
        load_s: for a worker to load its models.
        digests: as for `WorkerBackend`.
    """

    def __init__(
        self,
        engine: RayEngine,
        name: str,
        options: RayOptions,
        worker: WorkerConfig,
        models: Sequence[str],
        load_s: float = 120.0,
        digests: ModelDigests | None = None,
    ) -> None:
        self._engine, self._models, self._digests, self._load_s = engine, tuple(models), digests, load_s
        self._worker_number = worker.worker_number
        self._shared = bool(options.fleet)
        self._settings = {name: getattr(worker, name) for name in _TOLD}
        self._request = {
            "group": f"{options.fleet}/{name}" if options.fleet else name,
            "options": asdict(options),
            "models": list(worker.models),
        }
        self._taken: set[int] = set()

    def make(self, name: str) -> WorkerBackend:
        """Makes a backend for one more worker, in the first place of the group that is free; Ray places it on start."""
        number = next(number for number in itertools.count() if number not in self._taken)
        self._taken.add(number)
        settings = {**self._settings, "worker_number": self._worker_number + number}
        request = {**self._request, "number": number, "settings": settings}
        link = _RayLink(self._engine, request, self._load_s, lambda: self._taken.discard(number))
        options = ClientOptions(start_timeout_s=self._load_s)
        backend = WorkerBackend(name, link, self._models, options, self._digests)
        backend.managed = not self._shared
        return backend


class _RayLink(WorkerLink):
    """Finds an actor through Ray before each connection, and so has one that died replaced."""

    _numbers = itertools.count(1)

    def __init__(
        self, engine: RayEngine, request: Mapping[str, Any], load_s: float, on_closed: Callable[[], object]
    ) -> None:
        self._engine, self._load_s, self._on_closed = engine, load_s, on_closed
        self._request = {**request, "worker": next(self._numbers)}
        self._where = self.where = f"worker {request['number']} of {request['group']} on Ray"
        self._socket: SocketLink | None = None

    async def find(self, key: bytes) -> bytes:
        """Has Ray say where the worker is, and place it anew if need be; gives the key that it made."""
        limit_s = self._load_s + _SLACK_S
        said = await self._engine.ask(self, limit_s, do="reach", load_s=self._load_s, **self._request)
        self._socket = SocketLink(parse_address(said["address"]))
        self.where = f"{said['address']}, {self._where} node {said['node'][:8]}"
        return bytes.fromhex(said["key"])

    async def open(self, make: Callable[[], Connection]) -> None:
        """Connects to where the worker was found."""
        assert self._socket is not None
        try:
            async with asyncio.timeout(_CONNECT_S):
                await self._socket.open(make)
        except TimeoutError:
            raise BackendLostError(f"{self.where} did not accept a connection in {_CONNECT_S:g} s") from None

    async def close(self) -> None:
        """Lets the worker go: Ray ends it, unless other gateways share it."""
        await self._engine.leave(self, do="release", **self._request)
        self._on_closed()
