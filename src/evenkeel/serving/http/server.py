"""The application on real sockets, with a shutdown that loses no accepted request.

On SIGTERM or SIGINT the gateway is told to drain: readiness says 503 at once, so that load balancers look elsewhere,
while for a short grace requests are still accepted and answered with `Connection: close`. Then the listeners and idle
connections close, and the server ends when what was sent to it is answered, or when its patience ends. A second signal
ends it at once.
"""

import asyncio
import logging
import signal
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from evenkeel.errors import ConfigurationError
from evenkeel.serving.http.app import App
from evenkeel.serving.http.connection import HttpServer

__all__ = ["Drains", "run_server"]

_log = logging.getLogger(__name__)

_BACKLOG = 2048  # connections that wait to be accepted
_LAST_WRITES_S = 2  # for slow readers of the last responses


class Drains(Protocol):
    """What the server needs of the gateway."""

    def start_draining(self) -> None:
        """Say not ready from now on."""


async def run_server(
    app: App,
    gateway: Drains,
    host: str | None,
    port: int,
    *,
    uds: str | Path | None = None,
    drain_s: float = 30.0,
    grace_s: float = 0.2,
    keep_alive_s: int = 75,
    stop: asyncio.Event | None = None,
    on_started: Callable[[int], object] = lambda port: None,
) -> None:
    """Serve `app` until a signal comes or `stop` is set; returns when all is answered and closed.

    Args:
        app: the application.
        gateway: drained on shutdown.
        host: address to listen on; None for none (then `uds` is needed).
        port: TCP port; 0 takes a free one.
        uds: path of a Unix socket to listen on as well.
        drain_s: longest wait for requests in flight.
        grace_s: how long connections are still accepted after the signal.
        keep_alive_s: how long an idle connection stays open.
        stop: set it to shut down as by a first signal. Signals are heeded in the main thread only.
        on_started: called with the TCP port (0 without one) as soon as connections are accepted.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    stop = stop or asyncio.Event()
    abort = asyncio.Event()
    sockets = _listen(host, port, uds)
    http = HttpServer(app, replace(app.limits, keep_alive_s=keep_alive_s), app.headers)
    signals = _heed_signals(stop, abort)
    listeners: list[asyncio.Server] = []
    try:
        for listening in sockets:
            listeners.append(await _accept(http, listening))
        on_started(sockets[0].getsockname()[1] if host is not None else 0)
        await stop.wait()
        gateway.start_draining()
        await _first_of(abort, abort, grace_s)
        for listener in listeners:
            listener.close()
        http.close()
        await _first_of(http.empty, abort, drain_s)
        if app.in_flight and not abort.is_set():
            _log.warning("%d requests are given up", app.in_flight)
            app.give_up()
            await _first_of(http.empty, abort, _LAST_WRITES_S)
    finally:
        http.abort()
        for listener in listeners:
            listener.close()
        for number in signals:
            asyncio.get_running_loop().remove_signal_handler(number)
        for listening in sockets:
            listening.close()
        if uds is not None:
            Path(uds).unlink(missing_ok=True)
        app.close()


async def _accept(http: HttpServer, listening: socket.socket) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    if listening.family == socket.AF_UNIX:
        return await loop.create_unix_server(http.connect, sock=listening, backlog=_BACKLOG)
    return await loop.create_server(http.connect, sock=listening, backlog=_BACKLOG)


def _listen(host: str | None, port: int, uds: str | Path | None) -> list[socket.socket]:
    sockets = []
    try:
        if host is not None:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sockets.append(socket.create_server((host, port), family=family, backlog=_BACKLOG))
        if uds is not None:
            sockets.append(_listen_on_path(Path(uds)))
    except OSError as error:
        for listening in sockets:
            listening.close()
        where = f"{host}:{port}" if host is not None and not sockets else uds
        raise ConfigurationError(f"cannot listen on {where}: {error.strerror or error}") from error
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

    heeded = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # Outside of the main thread there are no signals; `stop` remains.
        with suppress(ValueError, RuntimeError):
            asyncio.get_running_loop().add_signal_handler(number, heed)
            heeded.append(number)
    return heeded


async def _first_of(wanted: asyncio.Event, abort: asyncio.Event, timeout_s: float) -> None:
    """Wait for either event, but no longer than the time given."""
    waits = [asyncio.ensure_future(event.wait()) for event in (wanted, abort)]
    await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
