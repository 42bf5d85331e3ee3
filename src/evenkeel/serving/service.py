"""Runs a server from its configuration: workers, gateway and front end, started in order and ended in order."""

import asyncio
import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, Reply
from evenkeel.backends.lossy.backend import LossyBackend
from evenkeel.backends.oip.backend import OipBackend
from evenkeel.backends.worker.address import Address, parse_address
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.key import check_open, is_open, read_key
from evenkeel.backends.worker.process import ProcessBackend
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.backends.worker.session import ClientOptions
from evenkeel.clock import LoopClock
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.by_name import OwnModel
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.errors import BackendError, ConfigurationError, EvenkeelError
from evenkeel.models.cards import ModelCard, class_difference, load_card
from evenkeel.models.digest import ModelDigests, card_digest
from evenkeel.promises.certificate import read_certificate
from evenkeel.serving.config import CodeConfig, NodesConfig, ServeConfig
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.http.app import App
from evenkeel.serving.http.server import run_server
from evenkeel.serving.lossy import listen_for_images, lossy_backend
from evenkeel.serving.metrics import Metrics
from evenkeel.serving.promised import AuditFile, apply_certificate

__all__ = ["build_codes", "serve"]

_log = logging.getLogger(__name__)

# Passes of each replica before the first request: the first ones of a fresh model are slow, and the live quantiles
# should know what is usual before they decide what is late.
_WARM_UP_PASSES = 4
_WARM_UP_S = 30.0
_SWITCH_S = 1e-3
_MAX_SHOWN = 500  # characters of a reason
_REACH_S = 5.0  # for nodes elsewhere; one that takes longer joins when it is there


async def serve(config: ServeConfig, on_started: Callable[[str, str], object] = lambda url, why_not: None) -> None:
    """Serves until SIGTERM, SIGINT or SIGHUP, then drain.

    Args:
        config: what to serve.
        on_started: given the URL as soon as every worker started here has loaded its models, and why the server is not
            ready all the same; empty where it is.

    Raises:
        ConfigurationError: a card, a model or an address is wrong, or a worker cannot start with it.
        BackendError: a worker cannot be reached.
    """
    card = config.card()
    name = config.name or card.name
    codes = build_codes(config, card)
    cards = {card.name: card}
    for code_config in config.codes:
        if code_config.model is not None:
            coded = load_card(code_config.model)
            cards[coded.name] = coded
    loop = asyncio.get_running_loop()
    epoch_s = time.monotonic()
    digests_here = _digests(config)
    digests = ModelDigests(digests_here)
    if config.remote_version:
        digests.check(card.name, f"version:{config.remote_version}", "field remote_version")
    replicas = _nodes(config, "replica", config.replicas, [card], 0, epoch_s, digests)
    backups: list[Backend] = []
    if config.policy.uses_backups:
        backups = _nodes(
            config, "backup", config.backups, list(cards.values()), config.replicas.total, epoch_s, digests
        )
    audits = None if config.audit_file is None else AuditFile(config.audit_file)
    digest = "" if config.run else digests_here.get(card.name, "")  # of what answers here
    promises = apply_certificate(config, cards, codes, digests_here, audits)
    executor = ThreadPoolExecutor(2, thread_name_prefix="evenkeel-shrink")
    gateway = Gateway(
        LoopClock(loop),
        card.name,
        replicas,
        backups,
        codes,
        config.policy,
        health=config.health,
        max_outstanding=config.max_outstanding,
        pass_limit_s=config.pass_limit_s,
        costs={known.name: known.relative_cost for known in cards.values()},
        scores=ScoreForm.from_card(card),
        offload=partial(_offload, loop, executor),
        promises=promises,
    )
    own = [backend for backend in (*replicas, *backups) if isinstance(backend, ProcessBackend)]
    elsewhere = [backend for backend in (*replicas, *backups) if not isinstance(backend, ProcessBackend)]
    lossy_counts = {one.name: one.counts for one in replicas if isinstance(one, LossyBackend)}
    # Until a pass has succeeded nothing shows that a replica can do any.
    gateway.watch(_blank(card))
    app = App(
        name=name,
        version=card.version,
        card=card,
        gateway=gateway,
        metrics=Metrics(gateway, lossy_counts),
        max_body_bytes=config.max_body_bytes,
        max_connections=config.max_connections,
        max_bodies_bytes=config.max_bodies_bytes,
        decode_processes=config.decode_processes,
        decode_bytes=config.decode_memory_bytes,
        digest=digest,
        promised=promises is not None,
    )

    async def start() -> None:
        reached = [asyncio.ensure_future(_reach(backend)) for backend in elsewhere]
        try:
            async with asyncio.TaskGroup() as group:
                for backend in own:
                    group.create_task(backend.start())
        except* (ConfigurationError, BackendError) as errors:
            raise errors.exceptions[0] from None
        if reached:
            await asyncio.wait(reached)
        await _warm_up(gateway, replicas, backups, card, cards)
        # Long requests are read in threads: they hand over in the middle of it, but no sooner than this.
        sys.setswitchinterval(_SWITCH_S)
        # What is alive now stays alive: the collector need not look at it again in the middle of a request.
        gc.collect()
        gc.freeze()

    listening = None
    if config.lossy.listen:
        listening = await listen_for_images(config, gateway, card, digest)
        lossy_counts["listener"] = listening[0].counts
    stop = asyncio.Event()
    bound: asyncio.Future[int] = loop.create_future()
    hosts = [host for host in config.host if not host.startswith("unix:")]
    for host in hosts:
        if is_open(Address("tcp", host=host.strip("[]"))):
            _log.warning("listens on %s: whoever reaches it can send requests, since clients need no key", host)
    uds = next((host.removeprefix("unix:") for host in config.host if host.startswith("unix:")), None)
    # It listens before models are loaded: whoever watches it can tell that it is alive, and that it is not ready.
    server = asyncio.ensure_future(
        run_server(
            app,
            gateway,
            hosts,
            config.port,
            uds=uds,
            drain_s=config.drain_s,
            grace_s=config.grace_s,
            keep_alive_s=config.keep_alive_s,
            stop=stop,
            on_started=bound.set_result,
        )
    )
    starting = asyncio.ensure_future(start())
    try:
        await asyncio.wait([server, starting], return_when=asyncio.FIRST_COMPLETED)
        if not server.done():
            starting.result()
            why_not = "" if gateway.ready else _why_not_ready(replicas)
            if why_not:
                _log.error("this server is not ready: %s", why_not)
            on_started(_url(hosts, uds, bound.result()), why_not)
        await server
    finally:
        starting.cancel()
        stop.set()
        await asyncio.gather(starting, server, return_exceptions=True)
        if listening is not None:
            listening[0].close()
            listening[1].close()
        await asyncio.gather(*(backend.close() for backend in (*replicas, *backups)), return_exceptions=True)
        executor.shutdown(wait=False, cancel_futures=True)
        if audits is not None:
            audits.close()


def _why_not_ready(replicas: Sequence[Backend]) -> str:
    """Says what keeps the first of the replicas from working."""
    reason = next((f"; {one.name}: {one.why_not}" for one in replicas if one.why_not), "")
    return f"no replica has done a pass yet{' '.join(reason.split())[:_MAX_SHOWN]}"


def _url(hosts: Sequence[str], uds: str | None, port: int) -> str:
    if not hosts:
        return f"unix:{uds}"
    bare = hosts[0].strip("[]")
    return f"http://[{bare}]:{port}" if ":" in bare else f"http://{bare}:{port}"


def build_codes(config: ServeConfig, card: ModelCard) -> list[BackupCode]:
    """Makes the codes of a configuration, for the classifier of `card`.

    Raises:
        ConfigurationError: a coded model does not fit the classifier.
    """
    own = OwnModel(card.name, ScoreForm.from_card(card), card.layout)
    return [_code(code_config, own, card.classes, place) for place, code_config in enumerate(config.codes)]


def _code(config: CodeConfig, own: OwnModel, classes: tuple[str, ...], place: int) -> BackupCode:
    coded = None if config.model is None else load_card(config.model)
    if coded is not None and coded.classes != classes:
        raise ConfigurationError(
            f"codes[{place}].model: {coded.name} and {own.name} must have the same classes in the same order; "
            f"{class_difference(coded.classes, classes)}"
        )
    try:
        return config.settings.code(own, coded)
    except ConfigurationError as error:
        raise ConfigurationError(f"codes[{place}]: {error}") from error


def _nodes(
    config: ServeConfig,
    kind: str,
    nodes: NodesConfig,
    cards: Sequence[ModelCard],
    first: int,
    epoch_s: float,
    digests: ModelDigests,
) -> list[Backend]:
    """Makes the backends of one kind, numbered from `first` (for delays in which workers differ)."""
    wanted = [card.name for card in cards]
    backends: list[Backend] = []
    for number in range(nodes.count):
        worker = WorkerConfig(
            models=_model_specs(config, cards),
            listen="tcp://127.0.0.1:0",  # not used: the child inherits its connection
            threads=config.threads,
            max_batch=config.max_batch,
            delay=config.delay,
            delay_epoch_s=epoch_s,
            worker_number=first + number,
        )
        own = ClientOptions(start_timeout_s=config.load_limit_s)
        backends.append(ProcessBackend(f"{kind}-{number}", worker, wanted, own, digests))
    key = read_key(config.worker_key_file) if nodes.addresses else b""
    for address in nodes.addresses:
        check_open(parse_address(address), key, config.no_worker_key)
        options = ClientOptions(start_timeout_s=_REACH_S, key=key)
        backends.append(WorkerBackend(f"{kind}-{len(backends)}", address, wanted, options, digests))
    for url in nodes.urls:
        if len(cards) > 1:
            raise ConfigurationError("backups.urls: a remote server holds one model; reach backups as workers instead")
        backends.append(_remote(config, f"{kind}-{len(backends)}", url, cards[0], digests))
    for link in nodes.links:
        name = f"{kind}-{len(backends)}"
        backends.append(lossy_backend(config, name, link, cards[0], digests.known(cards[0].name)))
    return backends


def _digests(config: ServeConfig) -> dict[str, str]:
    """Hashes every model whose file is here; a gateway of workers elsewhere may have the cards alone.

    For those a certificate says which they must be; the workers and servers that say otherwise are refused.
    """
    said = {} if config.certificate is None else read_certificate(config.certificate).digests
    known: dict[str, str] = {}
    for path in (config.model, *(code.model for code in config.codes if code.model is not None)):
        card = load_card(path)
        if (path.parent / card.file).is_file():
            known[card.name] = card_digest(card, path.parent)
        elif card.name in said:
            known[card.name] = str(said[card.name])
    return known


def _remote(config: ServeConfig, name: str, url: str, card: ModelCard, digests: ModelDigests) -> Backend:
    model = config.remote_model or config.name or card.name
    version = config.remote_version
    return OipBackend(
        name,
        url,
        model,
        card,
        version=version,
        versions=digests,
        connections=config.remote_connections,
        timeout_s=config.pass_limit_s,
        start_timeout_s=_REACH_S,
    )


def _model_specs(config: ServeConfig, cards: Sequence[ModelCard]) -> tuple[str, ...]:
    runs = {config.model: config.run}
    for code in config.codes:
        if code.model is not None:
            runs.setdefault(code.model, code.run)
    # Replicas hold the first model only.
    known = zip(cards, runs.items(), strict=False)
    return tuple(f"{card.name}={run}" if run else str(path) for card, (path, run) in known)


async def _reach(backend: Backend) -> None:
    """Starts a backend whose node is elsewhere.

    What is wrong there is no error here: it may be down or wrong at the moment, and a gateway that is restarted then
    must not be down with it. The backend goes on trying.
    """
    try:
        await backend.start()
    except EvenkeelError as error:
        _log.warning("%s; going on without it, and trying again", error)


def _blank(model: ModelCard) -> Array:
    """Makes an item of zeros for a model, without a batch axis."""
    return np.zeros(model.input_shape, np.uint8 if model.datatype == "UINT8" else np.float32)


async def _warm_up(
    gateway: Gateway,
    replicas: Sequence[Backend],
    backups: Sequence[Backend],
    card: ModelCard,
    cards: dict[str, ModelCard],
) -> None:
    async def warm(backend: Backend, models: Sequence[ModelCard], passes: int, learn: bool) -> None:
        limit_s = _WARM_UP_S if isinstance(backend, ProcessBackend) else _REACH_S
        try:
            async with asyncio.timeout(limit_s):
                await warm_all(backend, models, passes, learn)
        except TimeoutError:
            _log.warning("%s did not finish its first passes in %g s", backend.name, limit_s)

    async def warm_all(backend: Backend, models: Sequence[ModelCard], passes: int, learn: bool) -> None:
        for model in models if backend.ready else ():
            blank = _blank(model)[None]
            for number in range(passes):
                began_s = time.perf_counter()
                reply = await _call(backend, model.name, blank)
                if reply.error is not None:
                    _log.warning("%s failed a first pass of %s: %s", backend.name, model.name, reply.error)
                    break
                if learn and number:
                    gateway.service_times.add(time.perf_counter() - began_s)

    await asyncio.gather(
        *(warm(backend, [card], _WARM_UP_PASSES, True) for backend in replicas),
        *(warm(backend, list(cards.values()), 1, False) for backend in backups),
    )


async def _call(backend: Backend, model: str, inputs: Array) -> Reply:
    future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    backend.submit(model, inputs, lambda reply: None if future.done() else future.set_result(reply))
    return await future


def _offload(
    loop: asyncio.AbstractEventLoop,
    executor: ThreadPoolExecutor,
    work: Callable[[], Any],
    then: Callable[[Any], object],
) -> None:
    def done(finished: Any) -> None:
        failed = finished.exception()
        if failed is not None:
            _log.warning("items could not be prepared for a group: %s: %s", type(failed).__name__, failed)
        # Either way: whoever waits goes on, without what could not be prepared.
        then(None if failed is not None else finished.result())

    loop.run_in_executor(executor, work).add_done_callback(done)
