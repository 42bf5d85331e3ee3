"""Runs the application on real sockets, with a shutdown that loses no accepted request.

On SIGTERM, SIGINT or SIGHUP the application begins to drain: readiness says 503 at once, so that load balancers look
elsewhere, while for a short grace requests are still accepted and answered with `Connection: close`. Then nobody else
can connect; those whose connection the system took before that are accepted, too, and only then the listeners and idle
connections close. The server ends when what was sent to it is answered, or when its patience ends. A second signal
ends it at once.
"""

import asyncio
import ctypes
import logging
import os
import resource
import select
import signal
import socket
import stat
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from evenkeel.errors import ConfigurationError
from evenkeel.processes import ENDING_SIGNALS, asked_to_end, heeded
from evenkeel.serving.front.access import Guard
from evenkeel.serving.http.app import App
from evenkeel.serving.http.connection import HttpServer
from evenkeel.trust.tls_door import MAX_HANDSHAKES, TlsDoor

__all__ = ["FrontBeside", "run_server"]

_log = logging.getLogger(__name__)

_BACKLOG = 2048  # connections that wait to be accepted
_LAST_WRITES_S = 2  # for slow readers of the last responses
_MANAGERS = 16  # connections at once
_QUEUE_S = 2.0  # for the connections that wait to be accepted when the server ends
_RESERVE = 128  # descriptors kept free of clients: for workers that come back, remote replicas, clients sent away
_NOT_TLS_BODY = b'{"error":"this port speaks TLS: use https://"}'
_NOT_TLS = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
    % (len(_NOT_TLS_BODY), _NOT_TLS_BODY)
)
_SO_ATTACH_FILTER = 26  # of Linux


class FrontBeside(Protocol):
    """Is a further front end, with ports of its own, that starts, drains and ends with the server."""

    hosts: Sequence[str]
    port: int
    empty: asyncio.Event

    @property
    def in_flight(self) -> int:
        """Counts what is being answered."""

    @property
    def connections(self) -> int:
        """Gives the number of clients that may be connected."""

    def open(
        self, guard: Guard, connections: int, keep_alive_s: float
    ) -> tuple[Callable[[], asyncio.BaseProtocol], TlsDoor | None]:
        """Starts to serve; gives what makes the protocol of a connection, and TLS in front of it."""

    def announce(self) -> None:
        """Asks clients to go elsewhere."""

    def close(self) -> None:
        """Closes connections as soon as what they have sent is answered."""

    def give_up(self) -> None:
        """Answers all that is still in flight with an error."""

    def abort(self) -> None:
        """Ends at once."""


async def run_server(
    app: App,
    host: str | Sequence[str] | None,
    port: int,
    *,
    uds: str | Path | None = None,
    control: Path | None = None,
    drain_s: float = 30.0,
    grace_s: float = 0.2,
    keep_alive_s: float = 75,
    guard: Guard | None = None,
    beside: FrontBeside | None = None,
    stop: asyncio.Event | None = None,
    on_started: Callable[[int], object] = lambda port: None,
) -> None:
    """Serves `app` until a signal comes or `stop` is set; returns when all is answered and closed.

    Args:
        app: the application.
        host: address to listen on, or several; `::` takes IPv4 too. None for none (then `uds` is needed).
        port: TCP port, the same for all; 0 takes a free one.
        uds: path of a Unix socket to listen on as well.
        control: the same, for those who manage the server: who can connect there may do so.
        drain_s: longest wait for requests in flight.
        grace_s: how long connections are still accepted after the signal.
        keep_alive_s: how long an idle connection stays open.
        guard: TLS, on TCP alone, and who is let in; None: everybody is, without TLS.
        beside: another front end, whose `port` says afterwards where it listens.
        stop: set it to shut down as by a first signal. Signals are heeded in the main thread only.
        on_started: called with the TCP port (0 without one) as soon as connections are accepted.

    Raises:
        ConfigurationError: the address cannot be listened on, or a file of TLS cannot be used.
    """
    guard = guard or Guard()
    stop = stop or asyncio.Event()
    abort = asyncio.Event()
    limits = replace(app.limits, keep_alive_s=keep_alive_s)
    http = HttpServer(app, limits, app.headers, responses=app.responses, access=guard.access)
    door = guard.door(http.connect, ["http/1.1"], _NOT_TLS)
    managing = HttpServer(app, replace(limits, connections=_MANAGERS), app.headers, trusted=True)
    sockets = _listen(host, port, uds)
    beside_sockets: list[socket.socket] = []
    if beside is not None:
        try:
            beside_sockets = _listen(beside.hosts, beside.port, None)
        except ConfigurationError:
            for listening in sockets:
                listening.close()
            raise
        beside.port = beside_sockets[0].getsockname()[1]
    reserved = _RESERVE + (0 if door is None else MAX_HANDSHAKES)
    wanted = limits.connections + (0 if beside is None else beside.connections)
    spare = _spare_descriptors(wanted, reserved)
    share = min(1.0, spare / wanted)
    http.limits = replace(limits, connections=max(1, int(limits.connections * share)))
    signals = _heed_signals(stop, abort)
    listeners: list[asyncio.Server] = []
    doors = [door]
    try:
        for listening in sockets:
            listeners.append(await _accept(http.connect, door, listening))
        if control is not None:
            try:
                sockets.append(_listen_on_path(control))
                listeners.append(await _accept(managing.connect, None, sockets[-1]))
            except OSError as error:
                _log.warning("cannot be managed while it runs: %s: %s", control, error.strerror or error)
                control = None
        if beside is not None:
            connect, beside_door = beside.open(guard, max(1, int(beside.connections * share)), keep_alive_s)
            doors.append(beside_door)
            for listening in beside_sockets:
                listeners.append(await _accept(connect, beside_door, listening))
        on_started(sockets[0].getsockname()[1] if host else 0)
        await stop.wait()
        app.start_draining()
        if beside is not None:
            beside.announce()
        await _first_of(abort, abort, grace_s)
        if uds is not None:
            Path(uds).unlink(missing_ok=True)
            uds = None  # another server may listen there from now on
        await _empty_queues([*sockets, *beside_sockets], abort)
        for listener in listeners:
            listener.close()
        for one in (http, managing, beside):
            if one is not None:
                one.close()
        for shut in doors:
            if shut is not None:
                await _first_of(shut.idle, abort, _QUEUE_S)
        until_s = asyncio.get_running_loop().time() + drain_s
        for one in (http, beside):
            if one is not None:
                await _first_of(one.empty, abort, until_s - asyncio.get_running_loop().time())
        for answers, all_gone in ((app, http), (beside, beside)):
            if answers is not None and all_gone is not None and answers.in_flight and not abort.is_set():
                _log.warning("%d requests are given up", answers.in_flight)
                answers.give_up()
                await _first_of(all_gone.empty, abort, _LAST_WRITES_S)
    finally:
        for shut in doors:
            if shut is not None:
                shut.abort()
        http.abort()
        managing.abort()
        if beside is not None:
            beside.abort()
        for listener in listeners:
            listener.close()
        for number in signals:
            asyncio.get_running_loop().remove_signal_handler(number)
        for listening in (*sockets, *beside_sockets):
            listening.close()
        for path in (uds, control):
            if path is not None:
                Path(path).unlink(missing_ok=True)
        app.close()


async def _accept(
    connect: Callable[[], asyncio.BaseProtocol], door: TlsDoor | None, listening: socket.socket
) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    if listening.family == socket.AF_UNIX:
        return await loop.create_unix_server(connect, sock=listening, backlog=_BACKLOG)
    make = connect if door is None else door.connect
    return await loop.create_server(make, sock=listening, backlog=_BACKLOG)


async def _empty_queues(sockets: list[socket.socket], abort: asyncio.Event) -> None:
    """Lets nobody else connect, and waits until all who did are accepted: closing would reset them."""
    waiting = select.poll()
    for listening in sockets:
        _shut_out(listening)
        waiting.register(listening, select.POLLIN)
    until_s = asyncio.get_running_loop().time() + _QUEUE_S
    while waiting.poll(0) and not abort.is_set() and asyncio.get_running_loop().time() < until_s:
        await asyncio.sleep(0.001)


def _shut_out(listening: socket.socket) -> None:
    """Drops what further clients send to connect, on Linux. They try again, and are refused by the closed port."""
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # a filter program: return 0, take nothing
    with suppress(OSError):
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(code)))


def _spare_descriptors(connections: int, reserved: int = _RESERVE) -> int:
    """Counts the clients that may be connected, at most `connections`, so that descriptors are left for all else.

    The soft limit of descriptors is raised as far as that takes and the hard one lets.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/dev/fd"))
    if soft == resource.RLIM_INFINITY:
        return connections
    wanted = taken + connections + reserved
    if soft < wanted and hard != soft:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = max(1, soft - taken - min(reserved, soft // 4))
    if room < connections:
        _log.warning(
            "the limit of open files, %d, leaves room for %d clients instead of %d; raise it (ulimit -n, LimitNOFILE)",
            soft,
            room,
            connections,
        )
    return min(room, connections)


def _listen(host: str | Sequence[str] | None, port: int, uds: str | Path | None) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    hosts = [host] if isinstance(host, str) else list(host or ())
    where: str | Path | None = None
    try:
        for where in hosts:
            bare = where.strip("[]")
            family = socket.AF_INET6 if ":" in bare else socket.AF_INET
            both = bare == "::" and socket.has_dualstack_ipv6()
            sockets.append(socket.create_server((bare, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both))
            port = sockets[0].getsockname()[1]
            where = f"{where}:{port}"
        if uds is not None:
            where = uds
            sockets.append(_listen_on_path(Path(uds)))
    except OSError as error:
        for listening in sockets:
            listening.close()
        at = f"{where}:{port}" if where in hosts else where
        raise ConfigurationError(f"cannot listen on {at}: {error.strerror or error}") from error
    if not sockets:
        raise ConfigurationError("nothing to listen on: give a host or the path of a Unix socket")
    return sockets


def _listen_on_path(path: Path) -> socket.socket:
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.stat().st_mode) and not _is_answered(path):
            path.unlink()  # left behind by a server that was killed
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
    except OSError:
        listening.close()
        raise
    return listening


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def _heed_signals(stop: asyncio.Event, abort: asyncio.Event) -> list[signal.Signals]:
    def heed() -> None:
        if stop.is_set():
            abort.set()
        stop.set()

    taken = []
    for number in (number for number in ENDING_SIGNALS if heeded(number)):
        # Outside of the main thread there are no signals; `stop` remains.
        with suppress(ValueError, RuntimeError):
            asyncio.get_running_loop().add_signal_handler(number, heed)
            taken.append(number)
    if taken and asked_to_end():  # before there was anybody to heed it
        stop.set()
    return taken


async def _first_of(wanted: asyncio.Event, abort: asyncio.Event, timeout_s: float) -> None:
    """Waits for either event, but no longer than the time given."""
    waits = [asyncio.ensure_future(event.wait()) for event in (wanted, abort)]
    await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
