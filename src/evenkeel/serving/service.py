"""A whole server from its configuration: workers, gateway and front end, started in order and ended in order."""

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
from evenkeel.backends.oip.backend import OipBackend
from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.config import WorkerConfig
from evenkeel.backends.worker.key import check_open, read_key
from evenkeel.backends.worker.process import ProcessBackend
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.backends.worker.session import ClientOptions
from evenkeel.clock import LoopClock
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.by_name import OwnModel
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.errors import BackendError, BackendLostError, ConfigurationError
from evenkeel.models.cards import ModelCard, load_card
from evenkeel.models.digest import ModelDigests, card_digest
from evenkeel.serving.config import CodeConfig, NodesConfig, ServeConfig
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.http.app import App
from evenkeel.serving.http.server import run_server
from evenkeel.serving.metrics import Metrics

__all__ = ["build_codes", "serve"]

_log = logging.getLogger(__name__)

# Passes of each replica before the first request: the first ones of a fresh model are slow, and the live quantiles
# should know what is usual before they decide what is late.
_WARM_UP_PASSES = 4
_WARM_UP_S = 30.0
_SWITCH_S = 1e-3
_REACH_S = 5.0  # for nodes elsewhere; one that takes longer joins when it is there


async def serve(config: ServeConfig, on_started: Callable[[str], object] = lambda url: None) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        config: what to serve.
        on_started: told the URL as soon as requests are answered.

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
    digests = ModelDigests(_digests(config))
    if config.remote_version:
        digests.check(card.name, f"version:{config.remote_version}", "field remote_version")
    replicas = _nodes(config, "replica", config.replicas, [card], 0, epoch_s, digests)
    backups: list[Backend] = []
    if config.policy.uses_backups:
        backups = _nodes(
            config, "backup", config.backups, list(cards.values()), config.replicas.total, epoch_s, digests
        )
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
        costs={known.name: known.relative_cost for known in cards.values()},
        scores=ScoreForm.from_card(card),
        offload=partial(_offload, loop, executor),
    )
    started: list[Backend] = []
    try:
        await _start([*replicas, *backups], started)
        gateway.replicas.refresh()
        await _warm_up(gateway, replicas, backups, card, cards)
        app = App(
            name=name,
            version=card.version,
            card=card,
            gateway=gateway,
            metrics=Metrics(gateway),
            max_body_bytes=config.max_body_bytes,
            max_connections=config.max_connections,
            max_bodies_bytes=config.max_bodies_bytes,
            decode_processes=config.decode_processes,
            decode_bytes=config.decode_memory_bytes,
        )
        # Long requests are read in threads: they hand over in the middle of it, but no sooner than this.
        sys.setswitchinterval(_SWITCH_S)
        # What is alive now stays alive: the collector need not look at it again in the middle of a request.
        gc.collect()
        gc.freeze()
        host = f"[{config.host}]" if ":" in config.host else config.host
        await run_server(
            app,
            gateway,
            config.host,
            config.port,
            drain_s=config.drain_s,
            on_started=lambda port: on_started(f"http://{host}:{port}"),
        )
    finally:
        await asyncio.gather(*(backend.close() for backend in started), return_exceptions=True)
        executor.shutdown(wait=False, cancel_futures=True)


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
            f"codes[{place}].model: {coded.name} and {own.name} must have the same classes; "
            f"they have {len(coded.classes)} and {len(classes)}"
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
    """Backends of one kind, numbered from `first` (for delays in which workers differ)."""
    wanted = [card.name for card in cards]
    backends: list[Backend] = []
    for number in range(nodes.count):
        worker = WorkerConfig(
            models=_model_specs(config, cards),
            listen="tcp://127.0.0.1:0",  # not used: the child inherits its connection
            threads=config.threads,
            delay=config.delay,
            delay_epoch_s=epoch_s,
            worker_number=first + number,
        )
        backends.append(ProcessBackend(f"{kind}-{number}", worker, wanted, digests=digests))
    key = read_key(config.worker_key_file) if nodes.addresses else b""
    for address in nodes.addresses:
        check_open(parse_address(address), key, config.no_worker_key)
        options = ClientOptions(start_timeout_s=_REACH_S, key=key)
        backends.append(WorkerBackend(f"{kind}-{len(backends)}", address, wanted, options, digests))
    for url in nodes.urls:
        if len(cards) > 1:
            raise ConfigurationError("backups.urls: a remote server holds one model; reach backups as workers instead")
        backends.append(_remote(config, f"{kind}-{len(backends)}", url, cards[0], digests))
    return backends


def _digests(config: ServeConfig) -> dict[str, str]:
    """Of every model whose file is here; a gateway of workers elsewhere may have the cards alone."""
    known: dict[str, str] = {}
    for path in (config.model, *(code.model for code in config.codes if code.model is not None)):
        card = load_card(path)
        if (path.parent / card.file).is_file():
            known[card.name] = card_digest(card, path.parent)
    return known


def _remote(config: ServeConfig, name: str, url: str, card: ModelCard, digests: ModelDigests) -> Backend:
    model = config.remote_model or config.name or card.name
    version = config.remote_version
    return OipBackend(name, url, model, card, version=version, versions=digests, start_timeout_s=_REACH_S)


def _model_specs(config: ServeConfig, cards: Sequence[ModelCard]) -> tuple[str, ...]:
    runs = {config.model: config.run}
    for code in config.codes:
        if code.model is not None:
            runs.setdefault(code.model, code.run)
    # Replicas hold the first model only.
    known = zip(cards, runs.items(), strict=False)
    return tuple(f"{card.name}={run}" if run else str(path) for card, (path, run) in known)


async def _start(backends: Sequence[Backend], started: list[Backend]) -> None:
    """Start all at once; the first error ends it, with those that did start in `started`.

    A node elsewhere that cannot be reached is no such error: it may be down at the moment, and a gateway that is
    restarted then must not be down with it. The backend goes on trying.
    """

    async def start(backend: Backend) -> None:
        started.append(backend)
        try:
            await backend.start()
        except BackendError as error:
            if isinstance(backend, ProcessBackend) or not (
                isinstance(backend, OipBackend) or isinstance(error, BackendLostError)
            ):
                raise
            _log.warning("%s; going on without it, and trying again", error)

    try:
        async with asyncio.TaskGroup() as group:
            for backend in backends:
                group.create_task(start(backend))
    except* (ConfigurationError, BackendError) as errors:
        raise errors.exceptions[0] from None


async def _warm_up(
    gateway: Gateway,
    replicas: Sequence[Backend],
    backups: Sequence[Backend],
    card: ModelCard,
    cards: dict[str, ModelCard],
) -> None:
    async def warm(backend: Backend, models: Sequence[ModelCard], passes: int, learn: bool) -> None:
        try:
            async with asyncio.timeout(_WARM_UP_S):
                await warm_all(backend, models, passes, learn)
        except TimeoutError:
            _log.warning("%s did not finish its first passes in %g s", backend.name, _WARM_UP_S)

    async def warm_all(backend: Backend, models: Sequence[ModelCard], passes: int, learn: bool) -> None:
        for model in models if backend.ready else ():
            blank = np.zeros((1, *model.input_shape), dtype=np.uint8 if model.datatype == "UINT8" else np.float32)
            for number in range(passes):
                began_s = time.perf_counter()
                reply = await _call(backend, model.name, blank)
                if learn and number and reply.outputs is not None:
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
        if finished.exception() is None:
            then(finished.result())
        else:
            _log.warning("an item could not be prepared for a group: %s", finished.exception())

    loop.run_in_executor(executor, work).add_done_callback(done)
