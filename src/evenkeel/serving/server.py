"""The application on real sockets, with a shutdown that loses no accepted request.

On SIGTERM or SIGINT the gateway is told to drain: readiness says 503 at once, so that load balancers look elsewhere,
while for a short grace requests are still accepted and answered with `Connection: close`. Then the listeners close,
and the server ends when nothing is in flight any more, or when its patience does. A second signal ends it at once.
"""

import asyncio
import logging
import signal
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from evenkeel.errors import ConfigurationError
from evenkeel.serving.http import App

__all__ = ["Drains", "run_server"]

_log = logging.getLogger(__name__)

_POLL_S = 0.01  # how often a draining server looks whether it is done
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
    server = uvicorn.Server(_uvicorn_config(app, keep_alive_s))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    signals = _heed_signals(stop, abort)
    try:
        await server.startup(sockets=sockets)
        ticking = asyncio.create_task(server.main_loop())  # keeps the Date header right
        on_started(sockets[0].getsockname()[1] if host is not None else 0)
        await stop.wait()
        gateway.start_draining()
        await _set_within(abort, grace_s)
        for listener in server.servers:
            listener.close()
        await _drained(app, abort, drain_s)
        if app.in_flight:
            _log.warning("%d requests are given up", app.in_flight)
            await _give_up(server)
        server.should_exit = True
        await ticking
        server.force_exit = abort.is_set()
        if abort.is_set():
            for connection in list(server.server_state.connections):
                connection.transport.abort()
        await server.shutdown(sockets=sockets)
    finally:
        for number in signals:
            asyncio.get_running_loop().remove_signal_handler(number)
        for listening in sockets:
            listening.close()
        if uds is not None:
            Path(uds).unlink(missing_ok=True)
        app.close()


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, except that what is no HTTP at all is answered in JSON like every other error."""

    def send_400_response(self, msg: str) -> None:
        """Say that the request is no HTTP, and close."""
        body = orjson.dumps({"error": msg})
        head = (
            f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def _uvicorn_config(app: App, keep_alive_s: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        interface="asgi3",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=2048,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=_LAST_WRITES_S,
    )


def _listen(host: str | None, port: int, uds: str | Path | None) -> list[socket.socket]:
    sockets = []
    try:
        if host is not None:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sockets.append(socket.create_server((host, port), family=family, backlog=2048))
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


async def _set_within(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


async def _give_up(server: uvicorn.Server) -> None:
    """Have the requests that are still in flight answered with 503."""
    tasks = list(server.server_state.tasks)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=_LAST_WRITES_S)


async def _drained(app: App, abort: asyncio.Event, drain_s: float) -> None:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + drain_s
    while app.in_flight and not abort.is_set() and loop.time() < end_s:
        await _set_within(abort, _POLL_S)
