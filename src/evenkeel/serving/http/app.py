"""Answers the Open Inference Protocol over our own HTTP/1.1 (`reader`, `connection`).

    GET  /v2                                     the server and what it supports
    GET  /v2/health/live   /v2/health/ready
    GET  /v2/models/{m}[/versions/{v}]           inputs and outputs of the model
    GET  /v2/models/{m}[/versions/{v}]/ready
    POST /v2/models/{m}[/versions/{v}]/infer
    GET  /metrics                                Prometheus text

Every error is `{"error": "..."}` with the status that its exception carries. An ordinary request is read, submitted and
answered in plain callbacks; only image files, compressed bodies and long JSON take a task, and their work a thread.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import orjson

from evenkeel.arrays import Array
from evenkeel.errors import (
    BackendError,
    BackendLostError,
    DeadlineError,
    EvenkeelError,
    OverloadedError,
    PoisonItemError,
    ProtocolError,
    RequestError,
    TaskRefusedError,
    TooLargeError,
)
from evenkeel.oip import InferRequest, RepeatedRequests, TensorHead, parse_request, shown
from evenkeel.serving.front.flight import Flight
from evenkeel.serving.front.items import read_key, read_options
from evenkeel.serving.front.served import ServedModel, ServedModels
from evenkeel.serving.gateway.gateway import Options, Outcome
from evenkeel.serving.http.bodies import compress, decompress, pick_encoding
from evenkeel.serving.http.connection import Exchange, HttpLimits
from evenkeel.serving.http.paths import path_of
from evenkeel.serving.http.reader import ReadLimits
from evenkeel.version import __version__

__all__ = ["App"]

_log = logging.getLogger(__name__)

# cancel_on_disconnect: a client that closes its connection frees its slots, so another gateway may rely on it.
_EXTENSIONS = ["binary_tensor_data", "parameters", "cancel_on_disconnect"]
_JSON = b"content-type: application/json\r\n"
_BINARY = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n"
_TEXT = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"
_JSON_BYTES = b"inference-header-content-length"
_COMPRESS_FROM_BYTES = 256  # below, compressing saves no packet
_COMPRESS_ASIDE_FROM_BYTES = 1 << 16
_ASIDE_THREADS = 2
_LARGE_BYTES = 4 << 20
_PARSE_ASIDE_FROM_BYTES = 256 << 10  # parsing this much JSON would hold up all other requests
_READ_ASIDE_FROM_BYTES = 4 << 20  # checking and converting that many pixels would
_MAX_SHOWN = 500  # characters of an error

# The words for clients about a model that could not answer.
_REASONS: dict[type[BackendError], str] = {
    BackendLostError: "its worker was lost",
    ProtocolError: "its worker gave no proper reply",
}

_Response = tuple[int, bytes, bytes]
_Wanted = tuple[Sequence[str], Sequence[bool]]  # names of outputs, and for each whether as binary


class _WorkUnderWay(Protocol):
    """Stands for the work on a request: a flight or a task."""

    def cancel(self) -> object:
        """Gives the work up."""


class App:
    """Serves models through their gateways: the handler of an `HttpServer`.

    Args:
        models: that are served; they may come and go.
        metrics: gives the body of /metrics.
        max_body_bytes: limit of a request's body, compressed and decompressed.
        body_timeout_s: a request whose body is not complete by then (or somewhat later) is answered with 408.
        max_connections: more are refused.
        max_bodies_bytes: what all bodies together may take up, decompressed ones too; further ones get 503.

    Attributes:
        limits: of each client.
        headers: names of the request headers that are read.
    """

    headers = (_JSON_BYTES, b"content-type", b"content-encoding", b"accept-encoding")

    def __init__(
        self,
        models: ServedModels,
        *,
        metrics: Callable[[], bytes],
        max_body_bytes: int = 32 << 20,
        body_timeout_s: float = 30.0,
        max_connections: int = 10_000,
        max_bodies_bytes: int = 256 << 20,
    ) -> None:
        self.limits = HttpLimits(
            ReadLimits(body_bytes=max_body_bytes),
            body_timeout_s=body_timeout_s,
            connections=max_connections,
            bodies_bytes=max_bodies_bytes,
        )
        self._models = models
        self._metrics = metrics
        self._executor = ThreadPoolExecutor(_ASIDE_THREADS, thread_name_prefix="evenkeel-aside")
        # Large bodies take seconds, one behind the other; those of ordinary size need not wait for them.
        self._large_executor = ThreadPoolExecutor(1, thread_name_prefix="evenkeel-large")
        self._requests = RepeatedRequests()
        self._open: dict[Exchange, _WorkUnderWay | None] = {}
        self._infer_paths: dict[str, ServedModel] = {}
        self._infer_targets: dict[bytes, ServedModel] = {}
        self._gets: dict[str, Callable[[], _Response]] = {}
        models.follow(self._index)

    def _index(self) -> None:
        """Notes what is served where, so that an ordinary request costs one look-up."""
        self._gets = {
            "/v2": self._server_metadata,
            "/v2/health/live": lambda: _json(200, {"live": True}),
            "/v2/health/ready": self._server_ready,
            "/metrics": lambda: (200, _TEXT, self._metrics()),
        }
        self._infer_paths = {}
        for model in self._models:
            for root in (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{model.version}"):
                self._infer_paths[f"{root}/infer"] = model
                self._gets[root] = partial(_model_metadata, model)
                self._gets[f"{root}/ready"] = partial(self._model_ready, model)
        self._infer_targets = {path.encode(): model for path, model in self._infer_paths.items()}

    @property
    def in_flight(self) -> int:
        """Counts the requests that are being answered."""
        return len(self._open)

    def start_draining(self) -> None:
        """Reports not ready from now on, and closes each connection with its next response."""
        self._models.start_draining()

    def close(self) -> None:
        """Lets go of the threads."""
        for executor in (self._executor, self._large_executor):
            executor.shutdown(wait=False, cancel_futures=True)

    def handle(self, exchange: Exchange) -> None:
        """Answers a request, now or later."""
        self._open[exchange] = None
        try:
            request = exchange.request
            model = self._infer_targets.get(request.target)
            if model is not None and request.method == b"POST":
                self._infer(exchange, model)
                return
            method, path = request.method.decode(), path_of(request.target)
            model = self._infer_paths.get(path)
            if model is not None and method == "POST":
                self._infer(exchange, model)
            else:
                self._reply(exchange, *self._answer_other(method, path))
        except Exception as error:
            self._fail(exchange, error)

    def gone(self, exchange: Exchange) -> None:
        """Gives up a request whose client went away."""
        work = self._open.pop(exchange, None)
        if work is not None:
            work.cancel()

    def give_up(self) -> None:
        """Answers all that is still in flight with 503."""
        for exchange in list(self._open):
            work = self._open[exchange]
            if work is not None:
                work.cancel()
            self._reply(exchange, *_error(503, "the server shut down before the answer was there"))

    def _reply(self, exchange: Exchange, status: int, headers: bytes, body: bytes) -> None:
        if exchange not in self._open:
            return
        del self._open[exchange]
        if self._models.draining:
            exchange.last = True
        exchange.respond(status, headers, body)

    def _fail(self, exchange: Exchange, error: Exception) -> None:
        if isinstance(error, BackendError):
            # What a model or a server said of itself is for those who run it.
            _log.warning("a request failed: %s", " ".join(str(error).split())[:_MAX_SHOWN])
            error = _for_the_client(error)
        if isinstance(error, EvenkeelError):
            self._reply(exchange, *_from_error(error))
            return
        _log.error(
            "unexpected error while answering %s %s", exchange.request.method, exchange.request.target, exc_info=error
        )
        self._reply(exchange, *_error(500, "internal error; the server's log has the details"))

    def _infer(self, exchange: Exchange, model: ServedModel) -> None:
        headers, body = exchange.request.headers, exchange.request.body
        json_bytes: int | None = None
        if _JSON_BYTES in headers:
            json_bytes = _whole_number(_JSON_BYTES, headers[_JSON_BYTES])
        elif headers.get(b"content-type", b"")[:6].lower() == b"image/":
            json_bytes = 0  # the whole body is the file
        encoding = ""
        if b"content-encoding" in headers:
            encoding = headers[b"content-encoding"].decode("latin-1").strip().lower()
        if encoding not in ("", "identity"):
            self._aside(exchange, model, self._unpack, encoding, json_bytes)
        elif not exchange.request.parts and _is_quick(body, json_bytes):
            request = self._requests.parse(body, json_bytes)
            wanted = _check(exchange, model, request)
            self._serve(exchange, model, request, wanted, model.items.read(request))
        else:
            self._aside(exchange, model, self._join_and_parse, json_bytes)

    def _serve(
        self,
        exchange: Exchange,
        model: ServedModel,
        request: InferRequest,
        wanted: _Wanted,
        items: Array | list[bytes],
    ) -> None:
        parameters = request.parameters
        options, key = read_options(parameters), read_key(parameters)
        if isinstance(items, list):
            self._aside(exchange, model, self._decode, items, options, key, wanted, request.id)
        else:
            self._fly(exchange, model, items, options, key, wanted, request.id)

    def _fly(
        self,
        exchange: Exchange,
        model: ServedModel,
        items: Array,
        options: Options,
        key: int | None,
        wanted: _Wanted,
        request_id: str | None,
    ) -> None:
        landed = partial(self._landed, exchange, model, wanted, request_id)
        flight = Flight(model.gateway, landed, partial(self._fail, exchange))
        self._open[exchange] = flight
        try:
            flight.start(items, options, key)
        except OverloadedError:
            model.shares.refused(exchange.client, len(items))
            raise
        model.shares.took(exchange.client, len(items))

    def _landed(
        self,
        exchange: Exchange,
        model: ServedModel,
        wanted: _Wanted,
        request_id: str | None,
        outcomes: Sequence[Outcome],
    ) -> None:
        try:
            body, json_bytes = model.answers.write(outcomes, *wanted, request_id)
            headers = _JSON if json_bytes is None else _BINARY % json_bytes
            accepted = exchange.request.headers.get(b"accept-encoding")
            if accepted is not None and len(body) >= _COMPRESS_FROM_BYTES:
                chosen = pick_encoding(accepted.decode("latin-1"))
                if chosen is not None:
                    headers += b"content-encoding: %b\r\nvary: accept-encoding\r\n" % chosen.encode()
                    if len(body) > _COMPRESS_ASIDE_FROM_BYTES:
                        self._aside(exchange, model, self._pack, headers, body, chosen)
                        return
                    body = compress(body, chosen)
            self._reply(exchange, 200, headers, body)
        except Exception as error:
            self._fail(exchange, error)

    # ---- what takes long: in tasks, with the work in threads ----

    def _aside(
        self, exchange: Exchange, model: ServedModel, steps: Callable[..., Coroutine[Any, Any, None]], *args: Any
    ) -> None:
        async def guarded() -> None:
            try:
                await steps(exchange, model, *args)
            except Exception as error:
                self._fail(exchange, error)

        task = self._open[exchange] = asyncio.get_running_loop().create_task(guarded())
        model.hold()
        task.add_done_callback(model.release)

    async def _run(self, size: int, work: Callable[..., Any], *args: Any) -> Any:
        """Runs `work` in a thread for bodies of that size, and gives its result."""
        executor = self._executor if size < _LARGE_BYTES else self._large_executor
        return await asyncio.get_running_loop().run_in_executor(executor, partial(work, *args))

    async def _whole_body(self, exchange: Exchange) -> bytes:
        request = exchange.request
        return await self._run(request.body_bytes, request.whole_body) if request.parts else request.body

    async def _join_and_parse(self, exchange: Exchange, model: ServedModel, json_bytes: int | None) -> None:
        await self._parse(exchange, model, await self._whole_body(exchange), json_bytes)

    async def _unpack(self, exchange: Exchange, model: ServedModel, encoding: str, json_bytes: int | None) -> None:
        packed, max_bytes = await self._whole_body(exchange), self.limits.sizes.body_bytes
        body = await self._run(len(packed), decompress, packed, encoding, max_bytes)
        exchange.hold(len(body))
        await self._parse(exchange, model, body, json_bytes)

    async def _parse(self, exchange: Exchange, model: ServedModel, body: bytes, json_bytes: int | None) -> None:
        if _is_quick(body, json_bytes):
            request = self._requests.parse(body, json_bytes)
            wanted = _check(exchange, model, request)
            items = model.items.read(request)
        else:
            request = await self._run(len(body), parse_request, body, json_bytes, partial(_check_tensor, model))
            wanted = _check(exchange, model, request)
            items = await self._run(len(body), model.items.read, request)
        self._serve(exchange, model, request, wanted, items)

    async def _decode(
        self,
        exchange: Exchange,
        model: ServedModel,
        files: list[bytes],
        options: Options,
        key: int | None,
        wanted: _Wanted,
        request_id: str | None,
    ) -> None:
        limit_s = model.gateway.deadline_s
        if options.timeout_s is not None:
            limit_s = min(limit_s, options.timeout_s)
        until_s = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(until_s):
                items = await model.decoder.decode_all(files, until_s)
        except TimeoutError:
            raise _late(limit_s) from None
        left_s = until_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise _late(limit_s)
        self._fly(exchange, model, items, replace(options, timeout_s=left_s), key, wanted, request_id)

    async def _pack(self, exchange: Exchange, model: ServedModel, headers: bytes, body: bytes, encoding: str) -> None:
        self._reply(exchange, 200, headers, await self._run(len(body), compress, body, encoding))

    # ---- everything but inference ----

    def _answer_other(self, method: str, path: str) -> _Response:
        get = self._gets.get(path)
        if get is not None:
            return get() if method in ("GET", "HEAD") else _wrong_method(method, path, "GET, HEAD")
        if path in self._infer_paths:
            return _wrong_method(method, path, "POST")
        parts = path.split("/")
        if parts[:3] == ["", "v2", "models"] and len(parts) > 3:
            self._models.find(parts[3], parts[5] if len(parts) > 5 and parts[4] == "versions" else None)
        roots = ", ".join(f"/v2/models/{model.name}" for model in self._models)
        return _error(404, f"nothing is served at {shown(path)}; see GET /v2 and GET {roots or '/v2/health/ready'}")

    def _server_metadata(self) -> _Response:
        return _json(200, {"name": "evenkeel", "version": __version__, "extensions": _EXTENSIONS})

    def _server_ready(self) -> _Response:
        return self._ready({}, self._models.ready)

    def _model_ready(self, model: ServedModel) -> _Response:
        return self._ready({"name": model.name}, model.gateway.ready)

    def _ready(self, what: dict[str, Any], ready: bool) -> _Response:
        if self._models.draining:
            return _json(503, {**what, "ready": False, "error": "the server is shutting down"})
        if not ready:
            error = "no replica is ready" if list(self._models) else "no model is loaded"
            return _json(503, {**what, "ready": False, "error": error})
        return _json(200, {**what, "ready": True})


def _model_metadata(model: ServedModel) -> _Response:
    card = model.card
    columns = {"scores": [-1, len(card.classes)]}
    return _json(
        200,
        {
            "name": model.name,
            "versions": [model.version],
            "platform": "evenkeel",
            **({"digest": model.digest} if model.digest else {}),
            "inputs": [
                {
                    "name": card.input_name,
                    "datatype": card.datatype,
                    "shape": [-1, *card.input_shape],
                    "parameters": {"minimum": 0, "maximum": 255},
                }
            ],
            "outputs": [
                {"name": name, "datatype": datatype, "shape": columns.get(name, [-1])}
                for name, datatype in model.outputs.items()
            ],
        },
    )


def _check(exchange: Exchange, model: ServedModel, request: InferRequest) -> _Wanted:
    """Finds the wanted outputs and makes sure that there is room for the items, before anything is converted."""
    wanted = model.answers.wanted(request)
    if request.raw is not None:
        request.raw_is_file = exchange.request.headers.get(b"content-type", b"")[:6].lower() == b"image/"
    count = model.items.check(request)
    model.shares.admit(exchange.client, count)
    if count > 1:
        try:
            model.gateway.check_room(count)
        except OverloadedError:
            model.shares.refused(exchange.client, count)
            raise
    return wanted


def _check_tensor(model: ServedModel, tensor: TensorHead) -> None:
    """Refuses a tensor before its values are read: one of a wrong kind, or of more items than are ever taken."""
    count, limit = model.items.check_head(tensor), model.gateway.max_items
    if count > limit:
        raise TooLargeError(f"a request may hold at most {limit} items, found {count}")


def _late(limit_s: float) -> DeadlineError:
    return DeadlineError(f"the timeout of {limit_s:g} s passed while images were decoded")


def _is_quick(body: bytes, json_bytes: int | None) -> bool:
    """True if reading a body holds up nobody for long."""
    json_bytes = len(body) if json_bytes is None else json_bytes
    return json_bytes < _PARSE_ASIDE_FROM_BYTES and len(body) < _READ_ASIDE_FROM_BYTES


def _whole_number(name: bytes, value: bytes) -> int:
    # int() alone would take signs, blanks and underscores; 18 digits are more than any body has.
    if not value.isdigit() or len(value) > 18:
        raise RequestError(f"header {name.decode()} must be a whole number, found {shown(value.decode('latin-1'))}")
    return int(value)


def _json(status: int, message: dict[str, Any]) -> _Response:
    return status, _JSON, orjson.dumps(message)


def _error(status: int, message: str) -> _Response:
    # Paths and names may come from the client with characters that JSON text cannot hold.
    return _json(status, {"error": message[:_MAX_SHOWN].encode("utf-8", "replace").decode()})


def _for_the_client(error: BackendError) -> BackendError:
    """Puts an error into words that are ours, and not a model's or a server's."""
    if isinstance(error, PoisonItemError):
        return error
    if isinstance(error, TaskRefusedError):
        return TaskRefusedError(
            "the model refuses this item as it is: look at its shape and values; the server's log has the reason"
        )
    reason = _REASONS.get(type(error), "it failed")
    return BackendError(f"the model could not answer ({reason}); the server's log has the details")


def _from_error(error: EvenkeelError) -> _Response:
    status, headers, body = _error(error.http_status, str(error))
    if isinstance(error, OverloadedError):
        headers += b"retry-after: %d\r\n" % max(1, math.ceil(error.retry_after_s))
    return status, headers, body


def _wrong_method(method: str, path: str, allowed: str) -> _Response:
    status, headers, body = _error(405, f"{method} is not allowed on {path[:200]}; use {allowed}")
    return status, headers + f"allow: {allowed}\r\n".encode(), body
