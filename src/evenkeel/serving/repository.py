"""Loads the models of a configuration, and puts new versions in the place of old ones while requests are answered.

A new version has workers and a gateway of its own. Only when it is ready do requests go to it, all of them from one
moment on; the old one finishes what it has, and is closed then. Whatever is wrong with the new one, the old one stays.
"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from evenkeel.errors import BackendError, ConfigurationError, OverloadedError, UnknownModelError
from evenkeel.models.cards import class_difference, load_card
from evenkeel.serving.config import ServeConfig, server_differences
from evenkeel.serving.front.management import Management, ModelState, NodeState, ReloadReport
from evenkeel.serving.front.served import ServedModels
from evenkeel.serving.gateway.gateway import NodeKind
from evenkeel.serving.gateway.traced import Tracer
from evenkeel.serving.hosted import HostedModel, ModelFiles, model_paths, read_files, served_name

__all__ = ["ModelRepository"]

_log = logging.getLogger(__name__)
_MAX_SHOWN = 100  # characters of a name that a client gave
_LOOK_S = 0.02  # between two looks at whether a model is still in use


class ModelRepository(Management):
    """Holds the models of a configuration.

    Args:
        models: where front ends find those that are loaded.
        config: of the server and its models.
        reread: reads it again.
        tracer: traces the items of all of them; None: nothing is traced.

    Raises:
        ConfigurationError: a card, a model or an address is wrong.
    """

    def __init__(
        self,
        models: ServedModels,
        config: ServeConfig,
        reread: Callable[[], ServeConfig],
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._models = models
        self._config = config
        self._configs = {served_name(one): one for one in config.each}
        self._reread = reread
        self._hosted: dict[str, HostedModel] = {}
        self._reasons: dict[str, str] = {}  # why a model is not loaded
        self._starting: set[HostedModel] = set()
        self._leaving: dict[HostedModel, asyncio.Task[None]] = {}
        self._changing = ""  # what is under way
        for name, one in self._configs.items():
            hosted = self._hosted[name] = HostedModel(one, tracer=tracer)
            models.put(hosted.served)

    @property
    def hosted(self) -> Sequence[HostedModel]:
        """Gives the models that are loaded."""
        return tuple(self._hosted.values())

    def hosted_as(self, name: str) -> HostedModel:
        """Gives the loaded model of that name.

        Raises:
            UnknownModelError: there is none.
        """
        self._models.find(name)
        return self._hosted[name]

    async def start(self) -> None:
        """Starts the workers of all models.

        Raises:
            ConfigurationError: a worker cannot start with what it was given.
            BackendError: a worker started here died while it loaded.
        """
        async with self._change("the start"):
            for hosted in self.hosted:
                await hosted.start()

    @property
    def why_not_ready(self) -> str:
        """Says what keeps the first of the models from answering; empty where all do."""
        return next((hosted.why_not_ready for hosted in self.hosted if hosted.why_not_ready), "")

    async def close(self) -> None:
        """Ends the workers of all models."""
        for task in self._leaving.values():
            task.cancel()
        everything = (*self.hosted, *self._starting, *self._leaving)
        await asyncio.gather(*(hosted.close() for hosted in everything), return_exceptions=True)

    # ---- what front ends offer ----

    def index(self) -> list[ModelState]:
        """Gives the models of the configuration."""
        return [self._state(name) for name in self._configs]

    def _state(self, name: str) -> ModelState:
        hosted = self._hosted.get(name)
        if hosted is None:
            leaves = any(old.served.name == name for old in self._leaving)
            reason = self._reasons.get(name, "")
            return ModelState(name, "", "UNLOADING" if leaves else "UNAVAILABLE", reason)
        why_not = hosted.why_not_ready
        return ModelState(name, hosted.served.version, "LOADING" if why_not else "READY", why_not)

    def nodes(self) -> dict[str, list[NodeState]]:
        """Gives the nodes of every model that is loaded."""
        return {hosted.served.name: hosted.fleet.states for hosted in self.hosted}

    async def load(self, name: str) -> None:
        """Loads a model as the configuration is now; see `Management`."""
        async with self._change(f"the load of {name!r}"):
            configs = {served_name(one): one for one in self._reread().each}
            if name not in configs:
                known = ", ".join(map(repr, configs))
                raise UnknownModelError(f"unknown model {name[:_MAX_SHOWN]!r}; the configuration has {known}")
            await self._load(configs[name], await _read_aside(configs[name]))

    async def unload(self, name: str) -> None:
        """Serves a model no longer; see `Management`."""
        async with self._change(f"the unload of {name!r}"):
            self._models.remove(name)
            hosted = self._hosted.pop(name)
            self._reasons[name] = "unloaded"
            _log.info("%s is unloaded", name)
            await self._let_go(hosted)

    async def reload(self) -> ReloadReport:
        """Reads the configuration again, and loads what it changed; see `Management`."""
        async with self._change("a reload"):
            whole = self._reread()
            configs = {served_name(one): one for one in whole.each}
            for name in self._hosted:
                if name not in configs:
                    raise ConfigurationError(f"model {name!r} is no longer in the configuration; unload it first")
            names = []
            for name, config in configs.items():
                if name not in self._hosted and self._reasons.get(name) == "unloaded":
                    continue
                read = await _read_aside(config)
                hosted = self._hosted.get(name)
                if hosted is None or hosted.config != config or hosted.read != read:
                    await self._load(config, read)
                    names.append(name)
            need_restart = server_differences(self._config, whole)
            if need_restart:
                _log.warning("these fields have changed, and take effect with a restart only: %s", need_restart)
            return ReloadReport(names, need_restart)

    async def restart(self, at_once: int) -> None:
        """Replaces all workers of this server; see `Management`."""
        async with self._change("a restart"):
            for hosted in self.hosted:
                await hosted.fleet.restart(at_once=at_once)

    async def resize(self, name: str, kind: NodeKind, count: int) -> None:
        """Starts or ends workers of a model; see `Management`."""
        async with self._change(f"a resize of {name!r}"):
            await self.hosted_as(name).fleet.resize(kind, count)

    def files(self) -> list[Path]:
        """Gives the files that the loaded models were made from."""
        return [path for hosted in self.hosted for path in model_paths(hosted.config)]

    # ---- one change at a time ----

    @asynccontextmanager
    async def _change(self, what: str) -> AsyncIterator[None]:
        if self._changing:
            raise OverloadedError(f"{self._changing} is under way; try again when it is done")
        self._changing = what
        try:
            yield
        finally:
            self._changing = ""

    async def _load(self, config: ServeConfig, read: ModelFiles) -> None:
        name = served_name(config)
        before = self._hosted.get(name)
        if before is not None:
            _check_fit(config, before)
        hosted = HostedModel(config, read, before, self._tracer)
        if before is not None:
            hosted.served.times = before.served.times
        self._starting.add(hosted)
        try:
            # One worker after the other: each takes processor time from those that serve.
            await hosted.start(at_once=None if before is None else 1)
            if not hosted.gateway.ready:
                raise BackendError(f"{name!r} stays as it was: the new one is not ready: {hosted.why_not_ready}")
            _check_strength(name, hosted, before)
        except BaseException:
            await hosted.close()
            raise
        finally:
            self._starting.discard(hosted)
        hosted.take_audits(before)
        self._configs[name] = config
        self._hosted[name] = hosted
        self._reasons.pop(name, None)
        # From here on every request that begins goes to the new one.
        self._models.put(hosted.served)
        _log.info("%s %s is loaded", name, hosted.served.version)
        if before is not None:
            await self._let_go(before)

    async def _let_go(self, hosted: HostedModel) -> None:
        """Closes a model as soon as no request needs it, or its patience ends; also if nobody waits for that."""
        task = self._leaving[hosted] = asyncio.ensure_future(self._close_unused(hosted))
        task.add_done_callback(lambda _: self._leaving.pop(hosted, None))
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)

    async def _close_unused(self, hosted: HostedModel) -> None:
        loop = asyncio.get_running_loop()
        hosted.gateway.start_draining()
        until_s = loop.time() + hosted.config.drain_s
        while hosted.served.in_use and loop.time() < until_s:
            await asyncio.sleep(_LOOK_S)
        await hosted.close()
        # The old one's objects were frozen with all else, and refer to each other.
        gc.unfreeze()
        gc.collect()
        gc.freeze()


async def _read_aside(config: ServeConfig) -> ModelFiles:
    return await asyncio.get_running_loop().run_in_executor(None, read_files, config)


def _check_strength(name: str, hosted: HostedModel, before: HostedModel | None) -> None:
    """Refuses a version of which fewer replicas are there than answer now, unless the configuration wants no more.

    Raises:
        BackendError: there are too few.
    """
    wanted = min(hosted.config.replicas.total, 0 if before is None else before.ready_replicas)
    if hosted.ready_replicas < wanted:
        ready = hosted.ready_replicas
        raise BackendError(f"{name!r} stays as it was: of the new one {ready} replicas are ready, and {wanted} now")


def _check_fit(config: ServeConfig, before: HostedModel) -> None:
    """Refuses a model that clients of the present one could not be answered by.

    Raises:
        ConfigurationError: it has other classes, or takes other images.
    """
    if before.config.lossy.listen:
        raise ConfigurationError("lossy.listen: clients that send images asked for this very model; restart the server")
    old, new = before.served.card, load_card(config.model)
    name = before.served.name
    if new.classes != old.classes:
        raise ConfigurationError(
            f"{name!r} stays as it was: the new model has other classes: {class_difference(new.classes, old.classes)}; "
            "serve it under a name of its own"
        )
    for what, of_old, of_new in (
        ("shape", list(old.input_shape), list(new.input_shape)),
        ("datatype", old.datatype, new.datatype),
        ("input", old.input_name, new.input_name),
    ):
        if of_old != of_new:
            raise ConfigurationError(
                f"{name!r} stays as it was: the new model's {what} is {of_new}, and clients send {of_old}; "
                "serve it under a name of its own"
            )
