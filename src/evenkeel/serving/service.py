"""Runs a server from its configuration: its models and their front ends, started in order and ended in order."""

import asyncio
import gc
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from evenkeel.errors import ConfigurationError, EvenkeelError, OverloadedError
from evenkeel.serving.changed_files import when_changed
from evenkeel.serving.config import ServeConfig
from evenkeel.serving.control import own_socket
from evenkeel.serving.front.served import ServedModels
from evenkeel.serving.grpc.app import GrpcApp
from evenkeel.serving.grpc.connection import GrpcLimits
from evenkeel.serving.grpc.front import GrpcFront
from evenkeel.serving.http.app import App
from evenkeel.serving.http.server import run_server
from evenkeel.serving.lossy import listen_for_images
from evenkeel.serving.metrics import LossyCounts, Metrics
from evenkeel.serving.repository import ModelRepository
from evenkeel.serving.tracing import start_tracing
from evenkeel.serving.trusted import exposures, guard_of

__all__ = ["serve"]

_log = logging.getLogger(__name__)

_SWITCH_S = 1e-3


async def serve(
    config: ServeConfig,
    on_started: Callable[[str, str], object] = lambda url, why_not: None,
    *,
    reread: Callable[[], ServeConfig] | None = None,
    files: Sequence[Path] = (),
) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP, then drain.

    Args:
        config: what to serve.
        on_started: given the URL as soon as every worker started here has loaded its models, and why the server is not
            ready all the same; empty where it is.
        reread: reads the configuration again, for a reload; by default it stays what it is.
        files: that the configuration was read from.

    Raises:
        ConfigurationError: a card, a model or an address is wrong, or a worker cannot start with it.
        BackendError: a worker cannot be reached.
    """
    loop = asyncio.get_running_loop()
    guard = guard_of(config)
    models = ServedModels()

    def configured() -> ServeConfig:
        guard.reload()
        return config if reread is None else reread()

    tracer, end_tracing = start_tracing(config.tracing) if config.tracing.endpoint else (None, None)
    repository = ModelRepository(models, config, configured, tracer)
    listener_counts: dict[str, Mapping[str, int]] = {}  # by model
    responses: Counter[int] = Counter()
    app = App(
        models,
        metrics=Metrics(models, partial(_lossy_counts, repository, listener_counts), responses, guard),
        responses=responses,
        live=config.live,
        traced=tracer is not None,
        management=repository,
        max_body_bytes=config.max_body_bytes,
        max_connections=config.max_connections,
        max_bodies_bytes=config.max_bodies_bytes,
    )

    async def start() -> None:
        await repository.start()
        # Long requests are read in threads: they hand over in the middle of it, but no sooner than this.
        sys.setswitchinterval(_SWITCH_S)
        # What is alive now stays alive: the collector need not look at it again in the middle of a request.
        gc.collect()
        gc.freeze()

    listening = None
    if config.lossy.listen:
        (served,) = models
        listening = await listen_for_images(config, repository.hosted[0].gateway, served.card, served.digest)
        listener_counts[served.name] = listening[0].counts
    stop = asyncio.Event()
    bound: asyncio.Future[int] = loop.create_future()
    hosts = [host for host in config.host if not host.startswith("unix:")]
    for warning in exposures(config):
        _log.warning("%s", warning)
    uds = next((host.removeprefix("unix:") for host in config.host if host.startswith("unix:")), None)
    front = None if config.grpc_port is None else _grpc(config, models, repository, hosts, tracer is not None)
    # It listens before models are loaded: whoever watches it can tell that it is alive, and that it is not ready.
    server = asyncio.ensure_future(
        run_server(
            app,
            hosts,
            config.port,
            uds=uds,
            control=_control(config),
            beside=front,
            drain_s=config.drain_s,
            grace_s=config.grace_s,
            keep_alive_s=config.keep_alive_s,
            guard=guard,
            stop=stop,
            on_started=bound.set_result,
        )
    )
    starting = asyncio.ensure_future(start())
    watching = None
    if config.watch_files_s:
        watching = asyncio.ensure_future(_reload_when_changed(repository, files, config.watch_files_s))
    try:
        await asyncio.wait([server, starting], return_when=asyncio.FIRST_COMPLETED)
        if not server.done():
            starting.result()
            why_not = repository.why_not_ready
            if why_not:
                _log.error("this server is not ready: %s", why_not)
            secure = guard.tls is not None
            url = _url(hosts, uds, bound.result(), secure)
            if front is not None:
                url += f" and {_url(hosts, None, front.port, secure).replace('http', 'grpc', 1)}"
            on_started(url, why_not)
        await server
    finally:
        starting.cancel()
        if watching is not None:
            watching.cancel()
        stop.set()
        await asyncio.gather(starting, server, return_exceptions=True)
        if listening is not None:
            listening[0].close()
            listening[1].close()
        await repository.close()
        if end_tracing is not None:
            await loop.run_in_executor(None, end_tracing)


def _grpc(
    config: ServeConfig, models: ServedModels, repository: ModelRepository, hosts: Sequence[str], traced: bool
) -> GrpcFront:
    limits = GrpcLimits(
        message_bytes=config.max_body_bytes,
        connections=min(config.max_connections, GrpcLimits().connections),
        bodies_bytes=config.max_bodies_bytes,
    )
    app = GrpcApp(models, repository, max_message_bytes=config.max_body_bytes, traced=traced)
    assert config.grpc_port is not None
    return GrpcFront(app, hosts, config.grpc_port, limits)


def _lossy_counts(repository: ModelRepository, listeners: Mapping[str, Mapping[str, int]]) -> LossyCounts:
    counts: LossyCounts = {(model, "listener"): counted for model, counted in listeners.items()}
    for hosted in repository.hosted:
        counts |= {(hosted.served.name, end): counted for end, counted in hosted.lossy_counts.items()}
    return counts


def _control(config: ServeConfig) -> Path | None:
    """Gives the path at which the server listens to those who manage it; None where it cannot."""
    try:
        return own_socket()
    except ConfigurationError as error:
        _log.warning("this server cannot be managed while it runs: %s", error)
        return None


async def _reload_when_changed(repository: ModelRepository, files: Sequence[Path], every_s: float) -> None:
    async def reload() -> bool:
        try:
            report = await repository.reload()
            _log.info("files have changed; loaded: %s", ", ".join(report.loaded) or "nothing")
        except OverloadedError:  # another change is under way
            return False
        except EvenkeelError as error:
            _log.error("files have changed, and all stays as it was: %s", error)
        except Exception:  # a server that looks no more would not show it
            _log.exception("files have changed, and cannot be used; all stays as it was")
        return True

    await when_changed(lambda: [*files, *repository.files()], every_s, reload)


def _url(hosts: Sequence[str], uds: str | None, port: int, tls: bool) -> str:
    if not hosts:
        return f"unix:{uds}"
    bare, scheme = hosts[0].strip("[]"), "https" if tls else "http"
    return f"{scheme}://[{bare}]:{port}" if ":" in bare else f"{scheme}://{bare}:{port}"
