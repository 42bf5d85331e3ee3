"""Answers the Open Inference Protocol's gRPC service, with Triton's streaming extension, and gRPC's health service.

It answers as the HTTP front end does, item by item the same. An error becomes the status that stands for its HTTP
status.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from evenkeel.errors import (
    DeadlineError,
    EvenkeelError,
    ForbiddenError,
    OverloadedError,
    RequestError,
    UnknownModelError,
    UnsupportedError,
)
from evenkeel.oip.grpc import (
    RepeatedCalls,
    parse_infer_request,
    read_target,
    write_infer_response,
    write_outputs,
)
from evenkeel.oip.protobuf import MessageTable, read, write, write_field
from evenkeel.oip.service import (
    CONFIG,
    HEALTH,
    INDEX,
    INDEX_REQUEST,
    LIVE,
    MODEL_METADATA,
    MODEL_REQUEST,
    READY,
    REPOSITORY_REQUEST,
    SERVER_METADATA,
    SERVICE,
    STATISTICS,
)
from evenkeel.serving.front.inference import Inference, Wanted, check_tensor
from evenkeel.serving.front.management import Management
from evenkeel.serving.front.request_times import CLIENT_GONE
from evenkeel.serving.front.served import ServedModel, ServedModels
from evenkeel.serving.front.statistics import model_configuration, model_statistics
from evenkeel.serving.gateway.gateway import Outcome
from evenkeel.serving.grpc.connection import Ask, GrpcMethod
from evenkeel.serving.http.bodies import decompress
from evenkeel.version import __version__

__all__ = ["GrpcApp"]

_log = logging.getLogger(__name__)

_EXTENSIONS = ["parameters", "cancel_on_disconnect", "model_repository", "model_configuration", "statistics"]
_READ_ASIDE_FROM_BYTES = 256 << 10  # typed values of that many bytes would hold up all other calls
_MAX_HEADS = 256
_SUCCESS = 200  # as HTTP says it


class GrpcApp:
    """Serves models through their gateways: the handler of a `GrpcServer`.

    Args:
        models: that are served; they may come and go.
        management: loads and unloads models; None: they stay as they are.
        max_message_bytes: limit of a message, compressed and decompressed.
        traced: calls may say which trace they are part of.
    """

    def __init__(
        self,
        models: ServedModels,
        management: Management | None = None,
        *,
        max_message_bytes: int = 32 << 20,
        traced: bool = False,
    ) -> None:
        self._models = models
        self._management = management
        self._changes: set[asyncio.Task[None]] = set()
        self._max_message_bytes = max_message_bytes
        self._inference: Inference[Ask] = Inference(self._landed, self._failed, _parent if traced else None)
        self._calls = RepeatedCalls()
        self._heads: dict[tuple[str, str, tuple[str, ...]], bytes] = {}
        self._answers: dict[bytes, Callable[[Ask], object]] = {}
        self._methods: dict[bytes, GrpcMethod] = {}
        infer = GrpcMethod()
        self._add("ModelInfer", infer, self._infer)
        self._add("ModelStreamInfer", GrpcMethod(streams=True), self._infer)
        self._add("ServerLive", GrpcMethod(right=None), self._say(LIVE, lambda: {"live": True}))
        self._add("ServerReady", GrpcMethod(right=None), self._say(READY, lambda: {"ready": models.ready}))
        self._add("ServerMetadata", infer, self._say(SERVER_METADATA, _server_metadata))
        self._add("ModelReady", infer, self._say_of_model(READY, self._model_ready))
        self._add("ModelMetadata", infer, self._say_of_model(MODEL_METADATA, ServedModel.metadata))
        self._add("ModelConfig", infer, self._say_of_model(CONFIG, lambda one: {"config": model_configuration(one)}))
        self._add("ModelStatistics", infer, self._statistics)
        self._add("Check", GrpcMethod(right=None), self._say(HEALTH, self._health), service="grpc.health.v1.Health")
        manage = GrpcMethod(right="manage")
        self._add("RepositoryIndex", infer, self._index)
        self._add("RepositoryModelLoad", manage, partial(self._change, Management.load))
        self._add("RepositoryModelUnload", manage, partial(self._change, Management.unload))
        models.follow(self._heads.clear)

    def _add(self, name: str, method: GrpcMethod, answer: Callable[[Ask], object], service: str = SERVICE) -> None:
        path = f"/{service}/{name}".encode()
        self._methods[path] = method
        self._answers[path] = answer

    @property
    def in_flight(self) -> int:
        """Counts the messages that are being answered."""
        return self._inference.in_flight

    def close(self) -> None:
        """Lets go of the threads."""
        self._inference.close()

    def method(self, path: bytes) -> GrpcMethod | None:
        """Gives the method of that full name; None if there is none."""
        return self._methods.get(path)

    def handle(self, ask: Ask) -> None:
        """Answers a message, now or later."""
        self._inference.begin(ask)
        try:
            self._answers[ask.path](ask)
        except Exception as error:
            self._inference.fail(ask, error)

    def gone(self, ask: Ask) -> None:
        """Gives up a message whose client went away."""
        if ask.times is not None:
            ask.times.add(CLIENT_GONE, ask.since_s)
        self._inference.gone(ask)

    def give_up(self) -> None:
        """Answers all that is still in flight with UNAVAILABLE."""
        for ask in self._inference.give_up():
            self._failed(ask, OverloadedError("the server shut down before the answer was there"))

    # ---- inference ----

    def _infer(self, ask: Ask) -> None:
        if ask.packed:
            self._inference.aside(ask, None, self._unpack)
        else:
            self._start(ask, None, ask.message)

    def _start(self, ask: Ask, model: ServedModel | None, message: bytes) -> None:
        if len(message) >= _READ_ASIDE_FROM_BYTES:
            model = self._models.find(*_named(read_target(message)))
            ask.times = model.times
            self._inference.aside(ask, model, self._parse, message)
            return
        name, version, request = self._calls.parse(message)
        _label(ask, name, request.id)
        model = self._models.find(*_named((name, version)))
        ask.times = model.times
        wanted = self._inference.check(ask, model, request)
        self._inference.serve(ask, model, request, wanted, model.items.read(request), _left_s(ask))

    async def _unpack(self, ask: Ask, model: ServedModel | None) -> None:
        size = len(ask.message)
        message = await self._inference.run(size, decompress, ask.message, ask.packed, self._max_message_bytes)
        ask.hold(len(message))
        self._start(ask, model, message)

    async def _parse(self, ask: Ask, model: ServedModel, message: bytes) -> None:
        size = len(message)
        check = partial(check_tensor, model)
        name, _, request = await self._inference.run(size, parse_infer_request, message, check)
        _label(ask, name, request.id)
        wanted = self._inference.check(ask, model, request)
        items = await self._inference.run(size, model.items.read, request)
        self._inference.serve(ask, model, request, wanted, items, _left_s(ask))

    def _landed(
        self, ask: Ask, model: ServedModel, wanted: Wanted, request_id: str | None, outcomes: Sequence[Outcome]
    ) -> None:
        names = tuple(wanted[0])
        if len(outcomes) > 1 or request_id is not None:
            self._reply(ask, write_infer_response(model.answers.response(outcomes, names, request_id)))
            return
        parts = [write_field(6, part) for part in model.answers.packed(outcomes[0], names)]
        head = self._heads.get((model.name, model.version, names))
        if head is None:
            head = write_outputs(model.answers.response(outcomes, names, None))
            # A model that was replaced by another one meanwhile may have had other outputs.
            if len(self._heads) < _MAX_HEADS and any(model is one for one in self._models):
                self._heads[model.name, model.version, names] = head
        self._reply(ask, b"".join([head, *parts]))

    def _reply(self, ask: Ask, message: bytes) -> None:
        if self._inference.end(ask):
            ask.respond(write_field(2, message) if ask.streamed else message)
            if ask.times is not None:
                ask.times.add(_SUCCESS, ask.since_s)

    def _failed(self, ask: Ask, error: Exception) -> None:
        if not isinstance(error, EvenkeelError):
            _log.error("unexpected error while answering %s", ask.path.decode("latin-1"), exc_info=error)
            error = EvenkeelError("internal error; the server's log has the details")
        if not self._inference.end(ask):
            return
        if ask.times is not None:
            ask.times.add(error.http_status, ask.since_s)
        if ask.streamed:
            # The stream goes on: others of its messages may be right.
            ask.respond(write_field(1, str(error).encode("utf-8", "replace")) + write_field(2, ask.label))
        else:
            ask.fail(error)

    # ---- everything but inference ----

    def _say(self, schema: MessageTable, what: Callable[[], dict[str, Any]]) -> Callable[[Ask], object]:
        return lambda ask: self._reply(ask, write(what(), schema))

    def _say_of_model(
        self, schema: MessageTable, what: Callable[[ServedModel], dict[str, Any]]
    ) -> Callable[[Ask], object]:
        def answer(ask: Ask) -> None:
            asked = read(self._unpacked(ask), MODEL_REQUEST)
            model = self._models.find(*_named((asked.get("name", ""), asked.get("version", ""))))
            self._reply(ask, write(what(model), schema))

        return answer

    def _index(self, ask: Ask) -> None:
        asked = read(self._unpacked(ask), INDEX_REQUEST)
        found = [asdict(one) for one in self._managed().index() if one.state == "READY" or not asked.get("ready")]
        self._reply(ask, write({"models": found}, INDEX))

    def _change(self, change: Callable[[Management, str], Coroutine[Any, Any, None]], ask: Ask) -> None:
        """Begins a change of what is served, which goes on also if the client goes away."""
        management = self._managed()
        if not ask.may_manage:
            raise ForbiddenError(
                "this server is managed over its control socket (`evenkeel reload`), or with a key that has the right "
                "to manage"
            )
        asked = read(self._unpacked(ask), REPOSITORY_REQUEST)
        if set(asked.get("parameters", ())) - {"unload_dependents"}:
            raise RequestError(
                "parameters: this server loads what its configuration says, and takes no configuration or files by "
                "request"
            )

        async def run() -> None:
            try:
                await change(management, asked.get("model_name", ""))
                self._reply(ask, b"")
            except Exception as error:
                self._failed(ask, error)  # with what a worker said: it is for those who run the server

        task = asyncio.get_running_loop().create_task(run())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    def _managed(self) -> Management:
        if self._management is None:
            raise UnsupportedError("the models of this server cannot be changed while it runs")
        return self._management

    def _statistics(self, ask: Ask) -> None:
        asked = read(self._unpacked(ask), MODEL_REQUEST)
        wanted: Iterable[ServedModel] = self._models
        if asked.get("name"):
            wanted = (self._models.find(*_named((asked["name"], asked.get("version", "")))),)
        self._reply(ask, write({"model_stats": [model_statistics(one) for one in wanted]}, STATISTICS))

    def _unpacked(self, ask: Ask) -> bytes:
        """Gives a small message, decompressed here and now."""
        return decompress(ask.message, ask.packed, _READ_ASIDE_FROM_BYTES) if ask.packed else ask.message

    def _model_ready(self, model: ServedModel) -> dict[str, Any]:
        return {"ready": model.gateway.ready and not self._models.draining}

    def _health(self) -> dict[str, Any]:
        return {"status": 1 if self._models.ready else 2}


def _parent(ask: Ask) -> str:
    return ask.call.traceparent


def _server_metadata() -> dict[str, Any]:
    return {"name": "evenkeel", "version": __version__, "extensions": _EXTENSIONS}


def _named(target: tuple[str, str]) -> tuple[str, str | None]:
    """Gives name and version as the models are looked up: no version is any."""
    name, version = target
    if not name:
        raise UnknownModelError("the message names no model")
    return name, version or None


def _label(ask: Ask, name: str, request_id: str | None) -> None:
    if ask.streamed:
        ask.label = write_field(1, name.encode()) + (write_field(3, request_id.encode()) if request_id else b"")


def _left_s(ask: Ask) -> float | None:
    """Gives the seconds until the client's deadline; None if it set none."""
    if ask.until_s is None:
        return None
    left_s = ask.until_s - asyncio.get_running_loop().time()
    if left_s <= 0:
        raise DeadlineError("the client's deadline passed before the items were taken")
    return left_s
