"""Runs one model of a server: its workers, codes and gateway, started in order and ended in order."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evenkeel.arrays import Array
from evenkeel.backends.backend import Backend, Reply
from evenkeel.backends.lossy.backend import LossyBackend
from evenkeel.backends.worker.process import ProcessBackend
from evenkeel.clock import LoopClock
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.by_name import OwnModel
from evenkeel.coding.answers.scores import ScoreForm
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import ModelCard, class_difference, load_card
from evenkeel.models.digest import ModelDigests
from evenkeel.serving.autoscale import Autoscaler
from evenkeel.serving.config import CodeConfig, NodesConfig, ServeConfig
from evenkeel.serving.discovery.by_name import discovery_of
from evenkeel.serving.feed import Feed
from evenkeel.serving.fleet import FleetMember, LiveFleet
from evenkeel.serving.front.served import ServedModel
from evenkeel.serving.gateway.gateway import Gateway, NodeKind
from evenkeel.serving.gateway.traced import TracedGateway, Tracer
from evenkeel.serving.nodes import REACH_S, NodeMaker, known_digests
from evenkeel.serving.promised import AuditFile, apply_certificate

__all__ = ["HostedModel", "ModelFiles", "build_codes", "model_paths", "read_files", "served_name"]

_log = logging.getLogger(__name__)

# Passes of each replica before the first request: the first ones of a fresh model are slow, and the live quantiles
# should know what is usual before they decide what is late.
_WARM_UP_PASSES = 4
_WARM_UP_S = 30.0
_FIRST_NODES_S = 10.0  # for those that are to be found; they join later otherwise
_AT_ONCE_ON_RAY = 8  # workers that autoscaling has placed at a time
_MAX_SHOWN = 500  # characters of a reason


class HostedModel:
    """Owns one model's gateway, backends and codes.

    Args:
        config: what to serve.
        read: what `read_files` gave for it; by default that is read now.
        before: the version whose place it takes: its counters go on, and so does what audits have shown where the
            models and the certificate are the same.

    Attributes:
        config: what is served.
        read: what its files held when it was made.
        served: for the front ends.
        gateway: answers its items; not ready before `start`.
        fleet: the gateway's nodes.
        lossy_counts: what each end of a link that loses packets counts, by its name.

    Raises:
        ConfigurationError: a card, a model or an address is wrong.
    """

    def __init__(
        self,
        config: ServeConfig,
        read: "ModelFiles | None" = None,
        before: "HostedModel | None" = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.config = config
        self.read = read_files(config) if read is None else read
        card = self._card = config.card()
        codes = build_codes(config, card)
        self._cards = {card.name: card}
        for code_config in config.codes:
            if code_config.model is not None:
                coded = load_card(code_config.model)
                self._cards[coded.name] = coded
        loop = asyncio.get_running_loop()
        digests_here = self.read.digests
        digests = ModelDigests(dict(digests_here))
        if config.remote_version:
            digests.check(card.name, f"version:{config.remote_version}", "field remote_version")
        make = NodeMaker(config, list(self._cards.values()), digests)
        replicas = make.configured("replica", config.replicas)
        backups = make.configured("backup", config.backups) if config.policy.uses_backups else []
        self._started = False
        self._autoscale = config.replicas.autoscale
        # Workers that load here take processor time from those that serve; those on Ray load elsewhere.
        self._at_once = 1 if config.replicas.ray is None else _AT_ONCE_ON_RAY
        self._scaling: asyncio.Task[None] | None = None
        kept = before is not None and self._keeps_promise_of(before)
        audited = config.promises.audit_file is not None and not kept
        self._audits = AuditFile(config.promises.audit_file) if audited and config.promises.audit_file else None
        digest = "" if config.run else digests_here.get(card.name, "")  # of what answers here
        promises = apply_certificate(config, self._cards, codes, digests_here, self._audits)
        if kept and before is not None and promises is not None:
            promises = before.gateway.promises  # a reload makes no alarm undone
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="evenkeel-shrink")
        gateway = Gateway if tracer is None else partial(TracedGateway, tracer)
        self.gateway: Gateway = gateway(
            LoopClock(loop),
            card.name,
            replicas,
            backups,
            codes,
            config.policy,
            health=config.health,
            max_outstanding=config.max_outstanding,
            pass_limit_s=config.pass_limit_s,
            costs={known.name: known.relative_cost for known in self._cards.values()},
            scores=ScoreForm.from_card(card),
            offload=partial(_offload, loop, self._executor),
            promises=promises,
            backups_join=bool(config.policy.uses_backups and config.backups.discover),
            stats=None if before is None else before.gateway.stats,
        )
        self.lossy_counts = {one.name: one.counts for one in replicas if isinstance(one, LossyBackend)}
        members = [*(FleetMember(one, "replica") for one in replicas), *(FleetMember(one, "backup") for one in backups)]
        self.fleet = LiveFleet(self.gateway, members, self._warm_up, make.own, drain_s=config.drain_s)
        self._feeds = [
            Feed(self.fleet, kind, make.at, discovery_of(text))
            for kind, nodes in _kinds(config)
            for text in nodes.discover
        ]
        self._feeding: list[asyncio.Task[None]] = []
        # Until a pass has succeeded nothing shows that a replica can do any.
        self.gateway.watch(_blank(card))
        self.served = ServedModel(
            served_name(config),
            card.version,
            card,
            self.gateway,
            digest=digest,
            promised=promises is not None,
            decode_processes=config.decode_processes,
            decode_bytes=config.decode_memory_bytes,
        )

    def _keeps_promise_of(self, before: "HostedModel") -> bool:
        one, other = self.config, before.config
        same = (one.certificate, one.promises, one.policy) == (other.certificate, other.promises, other.policy)
        return same and one.certificate is not None and self.read == before.read

    def take_audits(self, before: "HostedModel | None") -> None:
        """Takes over the file of audits from the version whose place it takes, if it goes on with its promise."""
        if (
            before is not None
            and self.gateway.promises is not None
            and self.gateway.promises is before.gateway.promises
        ):
            self._audits, before._audits = before._audits, None

    async def start(self, *, at_once: int | None = None) -> None:
        """Starts the workers and has them do their first passes; what is elsewhere may be missing for now.

        Args:
            at_once: workers of this process that are started at a time; all by default.

        Raises:
            ConfigurationError: a worker cannot start with what it was given.
            BackendError: a worker started here died while it loaded.
        """
        await self.fleet.start(at_once=at_once)
        self._started = True
        self._feeding = [asyncio.ensure_future(feed.run()) for feed in self._feeds]
        settled = [asyncio.ensure_future(feed.settled.wait()) for feed in self._feeds]
        if settled:
            _, pending = await asyncio.wait(settled, timeout=_FIRST_NODES_S)
            for waiting in pending:
                waiting.cancel()
        if self._autoscale is not None:
            scaler = Autoscaler(self.gateway, self.fleet, self._autoscale, time.monotonic, self._at_once)
            self._scaling = asyncio.ensure_future(scaler.run())

    @property
    def ready_replicas(self) -> int:
        """Counts the replicas that could do a task now."""
        return sum(member.backend.ready for member in self.fleet.members if member.kind == "replica")

    @property
    def why_not_ready(self) -> str:
        """Says what keeps the first of the replicas from working; empty if the model is ready."""
        if self.gateway.ready:
            return ""
        replicas = (member.backend for member in self.fleet.members if member.kind == "replica")
        reason = next((f"; {one.name}: {one.why_not}" for one in replicas if one.why_not), "")
        return f"no replica has done a pass yet{' '.join(reason.split())[:_MAX_SHOWN]}"

    async def close(self) -> None:
        """Ends the workers, and lets go of everything."""
        self.served.close()
        if self._scaling is not None:
            self._scaling.cancel()
            await asyncio.wait([self._scaling])
        for feeding in self._feeding:
            feeding.cancel()
        await self.fleet.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._audits is not None:
            self._audits.close()

    async def _warm_up(self, backend: Backend, kind: NodeKind) -> bool:
        """Has a node do its first passes; tells whether it could."""
        models, passes = ([self._card], _WARM_UP_PASSES) if kind == "replica" else (list(self._cards.values()), 1)
        # In a fleet at work a fresh worker's times would say little of what is usual.
        learn = kind == "replica" and not self._started
        limit_s = _WARM_UP_S if isinstance(backend, ProcessBackend) else REACH_S
        try:
            async with asyncio.timeout(limit_s):
                return backend.ready and all([await self._do_passes(backend, one, passes, learn) for one in models])
        except TimeoutError:
            _log.warning("%s did not finish its first passes in %g s", backend.name, limit_s)
            return False

    async def _do_passes(self, backend: Backend, model: ModelCard, passes: int, learn: bool) -> bool:
        blank = _blank(model)[None]
        for number in range(passes):
            began_s = time.perf_counter()
            reply = await _call(backend, model.name, blank)
            if reply.error is not None:
                _log.warning("%s failed a first pass of %s: %s", backend.name, model.name, reply.error)
                return False
            if learn and number:
                self.gateway.service_times.add(time.perf_counter() - began_s)
        return True


def _kinds(config: ServeConfig) -> list[tuple[NodeKind, NodesConfig]]:
    backups: list[tuple[NodeKind, NodesConfig]] = [("backup", config.backups)] if config.policy.uses_backups else []
    return [("replica", config.replicas), *backups]


@dataclass(frozen=True)
class ModelFiles:
    """Holds what the files of a model say: the digests of its models, and the bytes of its small files."""

    digests: Mapping[str, str]
    small: Mapping[Path, bytes]


def model_paths(config: ServeConfig) -> list[Path]:
    """Gives the files that a model is made from: cards, what those describe that can be read now, the certificate."""
    cards, described = _card_paths(config), []
    for path in cards:
        with suppress(ConfigurationError):  # somebody may be at work on it
            described.append(path.parent / load_card(path).file)
    return [*cards, *described, *([] if config.certificate is None else [config.certificate])]


def _card_paths(config: ServeConfig) -> list[Path]:
    return [config.model, *(code.model for code in config.codes if code.model is not None)]


def read_files(config: ServeConfig) -> ModelFiles:
    """Reads the files of a model; of large ones that takes long.

    Raises:
        ConfigurationError: one cannot be read.
    """
    small = {}
    for path in [*_card_paths(config), *([] if config.certificate is None else [config.certificate])]:
        try:
            small[path] = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from error
    return ModelFiles(known_digests(config), small)


def served_name(config: ServeConfig) -> str:
    """Gives the name by which clients call the model of a configuration."""
    return config.name or config.card().name


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


def _blank(model: ModelCard) -> Array:
    """Makes an item of zeros for a model, without a batch axis."""
    return np.zeros(model.input_shape, np.uint8 if model.datatype == "UINT8" else np.float32)


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
