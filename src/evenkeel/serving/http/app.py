"""Answers the Open Inference Protocol over our own HTTP/1.1 (`reader`, `connection`).

    GET  /v2                                     the server and what it supports
    GET  /v2/health/live   /v2/health/ready
    GET  /v2/models/{m}[/versions/{v}]           inputs and outputs of the model
    GET  /v2/models/{m}[/versions/{v}]/ready
    GET  /v2/models/{m}[/versions/{v}]/config    in Triton's form, and so are its statistics
    GET  /v2/models/{m}[/versions/{v}]/stats   /v2/models/stats
    POST /v2/models/{m}[/versions/{v}]/infer
    GET  /metrics                                Prometheus text
    /v2/repository/...   /v2/fleet...            see `management`
    GET  /   /live                               a page that shows what happens, and the feed that it follows

Every error is `{"error": "..."}` with the status that its exception carries. An ordinary request is read, submitted and
answered in plain callbacks; only image files, compressed bodies and long JSON take a task, and their work a thread.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import orjson

from evenkeel.errors import EvenkeelError, OverloadedError, RequestError, UnsupportedError
from evenkeel.oip import InferRequest, RepeatedRequests, parse_request, shown
from evenkeel.serving.front.inference import Inference, Wanted, check_tensor
from evenkeel.serving.front.management import Management
from evenkeel.serving.front.request_times import CLIENT_GONE
from evenkeel.serving.front.served import ServedModel, ServedModels
from evenkeel.serving.front.statistics import model_configuration, model_statistics
from evenkeel.serving.gateway.gateway import Outcome
from evenkeel.serving.http.bodies import compress, decompress, pick_encoding
from evenkeel.serving.http.connection import Exchange, HttpLimits
from evenkeel.serving.http.management import MANAGED, answer, check_allowed
from evenkeel.serving.http.paths import path_of
from evenkeel.serving.http.reader import ReadLimits
from evenkeel.serving.live.feed import FEED_HEADERS, LiveFeed
from evenkeel.serving.live.page import live_page
from evenkeel.version import __version__

__all__ = ["App"]

_log = logging.getLogger(__name__)

# cancel_on_disconnect: a client that closes its connection frees its slots, so another gateway may rely on it.
_EXTENSIONS = [
    "binary_tensor_data",
    "parameters",
    "cancel_on_disconnect",
    "model_repository",
    "statistics",
    "model_configuration",
]
_JSON = b"content-type: application/json\r\n"
_BINARY = b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n"
_TEXT = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"
_JSON_BYTES = b"inference-header-content-length"
_COMPRESS_FROM_BYTES = 256  # below, compressing saves no packet
_COMPRESS_ASIDE_FROM_BYTES = 1 << 16
_PARSE_ASIDE_FROM_BYTES = 256 << 10  # parsing this much JSON would hold up all other requests
_READ_ASIDE_FROM_BYTES = 4 << 20  # checking and converting that many pixels would
_MAX_SHOWN = 500  # characters of an error

_Response = tuple[int, bytes, bytes]


class App:
    """Serves models through their gateways: the handler of an `HttpServer`.

    Args:
        models: that are served; they may come and go.
        metrics: gives the body of /metrics.
        management: changes what is served; None: that stays as it is.
        max_body_bytes: limit of a request's body, compressed and decompressed.
        body_timeout_s: a request whose body is not complete by then (or somewhat later) is answered with 408.
        max_connections: more are refused.
        max_bodies_bytes: what all bodies together may take up, decompressed ones too; further ones get 503.
        responses: counts all answers by their status.
        live: there is a live page.
        traced: requests may say which trace they are part of.

    Attributes:
        limits: of each client.
        headers: names of the request headers that are read.
    """

    headers: tuple[bytes, ...] = (
        _JSON_BYTES,
        b"content-type",
        b"content-encoding",
        b"accept-encoding",
        b"sec-fetch-site",
    )

    def __init__(
        self,
        models: ServedModels,
        *,
        metrics: Callable[[], bytes],
        management: Management | None = None,
        max_body_bytes: int = 32 << 20,
        body_timeout_s: float = 30.0,
        max_connections: int = 10_000,
        max_bodies_bytes: int = 256 << 20,
        responses: Counter[int] | None = None,
        live: bool = True,
        traced: bool = False,
    ) -> None:
        if traced:
            self.headers = (*self.headers, b"traceparent")
        self.limits = HttpLimits(
            ReadLimits(body_bytes=max_body_bytes),
            body_timeout_s=body_timeout_s,
            connections=max_connections,
            bodies_bytes=max_bodies_bytes,
        )
        self.responses: Counter[int] = Counter() if responses is None else responses
        self._models = models
        self._feed = LiveFeed(lambda: models) if live else None
        self._metrics = metrics
        self._management = management
        self._changes: set[asyncio.Task[None]] = set()
        self._inference: Inference[Exchange] = Inference(self._landed, self._failed, _parent if traced else None)
        self._requests = RepeatedRequests()
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
            "/v2/models/stats": lambda: _statistics(self._models),
            "/metrics": lambda: (200, _TEXT, self._metrics()),
        }
        if self._feed is not None:
            self._gets["/"] = lambda: (200, *live_page())
            self._gets["/live"] = lambda: (200, FEED_HEADERS, b"")  # to HEAD; `_watch` answers GET
        self._infer_paths = {}
        for model in self._models:
            for root in (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{model.version}"):
                self._infer_paths[f"{root}/infer"] = model
                self._gets[root] = partial(_metadata, model)
                self._gets[f"{root}/ready"] = partial(self._model_ready, model)
                self._gets[f"{root}/stats"] = partial(_statistics, (model,))
                self._gets[f"{root}/config"] = partial(_configuration, model)
        self._infer_targets = {path.encode(): model for path, model in self._infer_paths.items()}

    @property
    def in_flight(self) -> int:
        """Counts the requests that are being answered."""
        return self._inference.in_flight

    def start_draining(self) -> None:
        """Reports not ready from now on, and closes each connection with its next response."""
        self._models.start_draining()

    def close(self) -> None:
        """Lets go of the threads."""
        self._inference.close()

    def handle(self, exchange: Exchange) -> None:
        """Answers a request, now or later."""
        self._inference.begin(exchange)
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
            elif path.startswith(MANAGED):
                self._manage(exchange, method, path)
            elif path == "/live" and method == "GET" and self._feed is not None:
                self._watch(exchange, self._feed)
            else:
                self._reply(exchange, *self._answer_other(method, path))
        except Exception as error:
            self._inference.fail(exchange, error)

    def gone(self, exchange: Exchange) -> None:
        """Gives up a request whose client went away."""
        if exchange.times is not None:
            exchange.times.add(CLIENT_GONE, exchange.request.since_s)
        elif self._feed is not None:
            self._feed.leave(exchange)
        self._inference.gone(exchange)

    def give_up(self) -> None:
        """Answers all that is still in flight with 503."""
        for exchange in self._inference.give_up():
            self._reply(exchange, *_error(503, "the server shut down before the answer was there"))

    def _reply(self, exchange: Exchange, status: int, headers: bytes, body: bytes) -> None:
        if not self._inference.end(exchange):
            return
        if self._models.draining:
            exchange.last = True
        exchange.respond(status, headers, body)
        if exchange.times is not None:
            exchange.times.add(status, exchange.request.since_s)

    def _failed(self, exchange: Exchange, error: Exception) -> None:
        if isinstance(error, EvenkeelError):
            self._reply(exchange, *_from_error(error))
            return
        _log.error(
            "unexpected error while answering %s %s", exchange.request.method, exchange.request.target, exc_info=error
        )
        self._reply(exchange, *_error(500, "internal error; the server's log has the details"))

    def _manage(self, exchange: Exchange, method: str, path: str) -> None:
        """Begins a change of what is served, which goes on also if the client goes away."""
        management = self._management
        if management is None:
            raise UnsupportedError("the models of this server cannot be changed while it runs")
        check_allowed(path, exchange.may_manage, exchange.request.body_bytes)

        async def change() -> None:
            try:
                found = await answer(management, method, path, exchange.request.whole_body())
                self._reply(exchange, *(_json(200, found) if found is not None else _nothing_at(path)))
            except Exception as error:
                self._failed(exchange, error)  # with what a worker said: it is for those who run the server

        task = asyncio.get_running_loop().create_task(change())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    def _infer(self, exchange: Exchange, model: ServedModel) -> None:
        exchange.times = model.times
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
            self._inference.aside(exchange, model, self._unpack, encoding, json_bytes)
        elif not exchange.request.parts and _is_quick(body, json_bytes):
            request = self._requests.parse(body, json_bytes)
            wanted = self._check(exchange, model, request)
            self._inference.serve(exchange, model, request, wanted, model.items.read(request))
        else:
            self._inference.aside(exchange, model, self._join_and_parse, json_bytes)

    def _check(self, exchange: Exchange, model: ServedModel, request: InferRequest) -> Wanted:
        if request.raw is not None:
            request.raw_is_file = exchange.request.headers.get(b"content-type", b"")[:6].lower() == b"image/"
        return self._inference.check(exchange, model, request)

    def _landed(
        self,
        exchange: Exchange,
        model: ServedModel,
        wanted: Wanted,
        request_id: str | None,
        outcomes: Sequence[Outcome],
    ) -> None:
        body, json_bytes = model.answers.write(outcomes, *wanted, request_id)
        headers = _JSON if json_bytes is None else _BINARY % json_bytes
        accepted = exchange.request.headers.get(b"accept-encoding")
        if accepted is not None and len(body) >= _COMPRESS_FROM_BYTES:
            chosen = pick_encoding(accepted.decode("latin-1"))
            if chosen is not None:
                headers += b"content-encoding: %b\r\nvary: accept-encoding\r\n" % chosen.encode()
                if len(body) > _COMPRESS_ASIDE_FROM_BYTES:
                    self._inference.aside(exchange, model, self._pack, headers, body, chosen)
                    return
                body = compress(body, chosen)
        self._reply(exchange, 200, headers, body)

    # ---- what takes long: in tasks, with the work in threads ----

    async def _whole_body(self, exchange: Exchange) -> bytes:
        request = exchange.request
        return await self._inference.run(request.body_bytes, request.whole_body) if request.parts else request.body

    async def _join_and_parse(self, exchange: Exchange, model: ServedModel, json_bytes: int | None) -> None:
        await self._parse(exchange, model, await self._whole_body(exchange), json_bytes)

    async def _unpack(self, exchange: Exchange, model: ServedModel, encoding: str, json_bytes: int | None) -> None:
        packed, max_bytes = await self._whole_body(exchange), self.limits.sizes.body_bytes
        body = await self._inference.run(len(packed), decompress, packed, encoding, max_bytes)
        exchange.hold(len(body))
        await self._parse(exchange, model, body, json_bytes)

    async def _parse(self, exchange: Exchange, model: ServedModel, body: bytes, json_bytes: int | None) -> None:
        if _is_quick(body, json_bytes):
            request = self._requests.parse(body, json_bytes)
            wanted = self._check(exchange, model, request)
            items = model.items.read(request)
        else:
            request = await self._inference.run(
                len(body), parse_request, body, json_bytes, partial(check_tensor, model)
            )
            wanted = self._check(exchange, model, request)
            items = await self._inference.run(len(body), model.items.read, request)
        self._inference.serve(exchange, model, request, wanted, items)

    async def _pack(self, exchange: Exchange, model: ServedModel, headers: bytes, body: bytes, encoding: str) -> None:
        self._reply(exchange, 200, headers, await self._inference.run(len(body), compress, body, encoding))

    # ---- everything but inference ----

    def _watch(self, exchange: Exchange, feed: LiveFeed) -> None:
        """Has the feed send to a viewer until that goes, or the server ends."""
        if exchange.request.headers.get(b"sec-fetch-site") == b"cross-site":
            # It could not read the feed, but take the places of those who watch.
            self._reply(exchange, *_error(403, "the feed is for this server's own page"))
            return
        feed.join(exchange)
        self._inference.end(exchange)

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


def _parent(exchange: Exchange) -> str:
    return exchange.request.headers.get(b"traceparent", b"").decode("latin-1")


def _metadata(model: ServedModel) -> _Response:
    return _json(200, model.metadata())


def _statistics(models: Iterable[ServedModel]) -> _Response:
    return _json(200, {"model_stats": [model_statistics(model) for model in models]})


def _configuration(model: ServedModel) -> _Response:
    return _json(200, model_configuration(model))


def _is_quick(body: bytes, json_bytes: int | None) -> bool:
    """True if reading a body holds up nobody for long."""
    json_bytes = len(body) if json_bytes is None else json_bytes
    return json_bytes < _PARSE_ASIDE_FROM_BYTES and len(body) < _READ_ASIDE_FROM_BYTES


def _whole_number(name: bytes, value: bytes) -> int:
    # int() alone would take signs, blanks and underscores; 18 digits are more than any body has.
    if not value.isdigit() or len(value) > 18:
        raise RequestError(f"header {name.decode()} must be a whole number, found {shown(value.decode('latin-1'))}")
    return int(value)


def _nothing_at(path: str) -> _Response:
    return _error(404, f"nothing is served at {shown(path)} by this method; see docs/how-to/fleet.md")


def _json(status: int, message: Any) -> _Response:
    return status, _JSON, orjson.dumps(message)


def _error(status: int, message: str) -> _Response:
    # Paths and names may come from the client with characters that JSON text cannot hold.
    return _json(status, {"error": message[:_MAX_SHOWN].encode("utf-8", "replace").decode()})


def _from_error(error: EvenkeelError) -> _Response:
    status, headers, body = _error(error.http_status, str(error))
    if isinstance(error, OverloadedError):
        headers += b"retry-after: %d\r\n" % max(1, math.ceil(error.retry_after_s))
    return status, headers, body


def _wrong_method(method: str, path: str, allowed: str) -> _Response:
    status, headers, body = _error(405, f"{method} is not allowed on {path[:200]}; use {allowed}")
    return status, headers + f"allow: {allowed}\r\n".encode(), body
