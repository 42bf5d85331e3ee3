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
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from urllib.parse import unquote

import httptools
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
    UnknownModelError,
)
from evenkeel.models.cards import ModelCard
from evenkeel.oip import InferRequest, RepeatedRequests, TensorHead, parse_request, shown
from evenkeel.serving.front.answers import OUTPUTS, PROMISED, AnswerWriter
from evenkeel.serving.front.flight import Flight, Submits
from evenkeel.serving.front.images import ImageDecoder
from evenkeel.serving.front.items import ItemReader, read_key, read_options
from evenkeel.serving.front.shares import FairShares
from evenkeel.serving.gateway.gateway import Options, Outcome
from evenkeel.serving.http.bodies import compress, decompress, pick_encoding
from evenkeel.serving.http.connection import Exchange, HttpLimits
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
    """Serves one model through a gateway: the handler of an `HttpServer`.

    Args:
        name: the model's name in URLs.
        version: the one version that is served.
        card: of the model.
        gateway: answers items; must live on the event loop that runs the application.
        metrics: gives the body of /metrics.
        max_body_bytes: limit of a request's body, compressed and decompressed.
        decode_processes: image files that are decoded at once.
        decode_bytes: of image files and what decoding them takes, of all requests together.
        body_timeout_s: a request whose body is not complete by then (or somewhat later) is answered with 408.
        max_connections: more are refused.
        max_bodies_bytes: what all bodies together may take up, decompressed ones too; further ones get 503.
        digest: of the model's file; empty where it is not known.
        promised: answers say by which way they came, and of which certificate's promise they are part.

    Attributes:
        limits: of each client.
        headers: names of the request headers that are read.
    """

    headers = (_JSON_BYTES, b"content-type", b"content-encoding", b"accept-encoding")

    def __init__(
        self,
        *,
        name: str,
        version: str,
        card: ModelCard,
        gateway: Submits,
        metrics: Callable[[], bytes],
        max_body_bytes: int = 32 << 20,
        decode_processes: int = 2,
        decode_bytes: int = 1 << 30,
        body_timeout_s: float = 30.0,
        max_connections: int = 10_000,
        max_bodies_bytes: int = 256 << 20,
        digest: str = "",
        promised: bool = False,
    ) -> None:
        self.limits = HttpLimits(
            ReadLimits(body_bytes=max_body_bytes),
            body_timeout_s=body_timeout_s,
            connections=max_connections,
            bodies_bytes=max_bodies_bytes,
        )
        self._name = name
        self._version = version
        self._digest = digest
        self._card = card
        self._gateway = gateway
        self._metrics = metrics
        self._executor = ThreadPoolExecutor(_ASIDE_THREADS, thread_name_prefix="evenkeel-aside")
        # Large bodies take seconds, one behind the other; those of ordinary size need not wait for them.
        self._large_executor = ThreadPoolExecutor(1, thread_name_prefix="evenkeel-large")
        self._decoder = ImageDecoder(card, processes=decode_processes, max_bytes=decode_bytes)
        self._items = ItemReader(card)
        self._shares = FairShares(lambda: gateway.in_flight, time.monotonic)
        self._requests = RepeatedRequests()
        self._answers = AnswerWriter(name, version, card.classes, promised=promised)
        self._outputs = {**OUTPUTS, **PROMISED} if promised else OUTPUTS
        self._open: dict[Exchange, _WorkUnderWay | None] = {}
        roots = (f"/v2/models/{name}", f"/v2/models/{name}/versions/{version}")
        self._infer_paths = frozenset(f"{root}/infer" for root in roots)
        self._infer_targets = frozenset(path.encode() for path in self._infer_paths)
        self._gets: dict[str, Callable[[], _Response]] = {
            "/v2": self._server_metadata,
            "/v2/health/live": lambda: _json(200, {"live": True}),
            "/v2/health/ready": self._server_ready,
            "/metrics": lambda: (200, _TEXT, self._metrics()),
            **dict.fromkeys(roots, self._model_metadata),
            **{f"{root}/ready": self._model_ready for root in roots},
        }

    @property
    def in_flight(self) -> int:
        """Counts the requests that are being answered."""
        return len(self._open)

    def close(self) -> None:
        """Lets go of the threads, and ends the processes that decode."""
        self._decoder.close()
        for executor in (self._executor, self._large_executor):
            executor.shutdown(wait=False, cancel_futures=True)

    def handle(self, exchange: Exchange) -> None:
        """Answers a request, now or later."""
        self._open[exchange] = None
        try:
            request = exchange.request
            if request.target in self._infer_targets and request.method == b"POST":
                self._infer(exchange)
                return
            method, path = request.method.decode(), _path(request.target)
            path = path.rstrip("/") or "/"
            if path in self._infer_paths and method == "POST":
                self._infer(exchange)
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
        if self._gateway.draining:
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

    def _infer(self, exchange: Exchange) -> None:
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
            self._aside(exchange, self._unpack, encoding, json_bytes)
        elif not exchange.request.parts and _is_quick(body, json_bytes):
            request = self._requests.parse(body, json_bytes)
            wanted = self._check(exchange, request)
            self._serve(exchange, request, wanted, self._items.read(request))
        else:
            self._aside(exchange, self._join_and_parse, json_bytes)

    def _check(self, exchange: Exchange, request: InferRequest) -> _Wanted:
        """Finds the wanted outputs and makes sure that there is room for the items, before anything is converted."""
        wanted = self._answers.wanted(request)
        if request.raw is not None:
            request.raw_is_file = exchange.request.headers.get(b"content-type", b"")[:6].lower() == b"image/"
        count = self._items.check(request)
        self._shares.admit(exchange.client, count)
        if count > 1:
            try:
                self._gateway.check_room(count)
            except OverloadedError:
                self._shares.refused(exchange.client, count)
                raise
        return wanted

    def _check_tensor(self, tensor: TensorHead) -> None:
        """Refuses a tensor before its values are read: one of a wrong kind, or of more items than are ever taken."""
        count, limit = self._items.check_head(tensor), self._gateway.max_items
        if count > limit:
            raise TooLargeError(f"a request may hold at most {limit} items, found {count}")

    def _serve(self, exchange: Exchange, request: InferRequest, wanted: _Wanted, items: Array | list[bytes]) -> None:
        parameters = request.parameters
        options, key = read_options(parameters), read_key(parameters)
        if isinstance(items, list):
            self._aside(exchange, self._decode, items, options, key, wanted, request.id)
        else:
            self._fly(exchange, items, options, key, wanted, request.id)

    def _fly(
        self,
        exchange: Exchange,
        items: Array,
        options: Options,
        key: int | None,
        wanted: _Wanted,
        request_id: str | None,
    ) -> None:
        landed = partial(self._landed, exchange, wanted, request_id)
        flight = Flight(self._gateway, landed, partial(self._fail, exchange))
        self._open[exchange] = flight
        try:
            flight.start(items, options, key)
        except OverloadedError:
            self._shares.refused(exchange.client, len(items))
            raise
        self._shares.took(exchange.client, len(items))

    def _landed(
        self,
        exchange: Exchange,
        wanted: _Wanted,
        request_id: str | None,
        outcomes: Sequence[Outcome],
    ) -> None:
        try:
            body, json_bytes = self._answers.write(outcomes, *wanted, request_id)
            headers = _JSON if json_bytes is None else _BINARY % json_bytes
            accepted = exchange.request.headers.get(b"accept-encoding")
            if accepted is not None and len(body) >= _COMPRESS_FROM_BYTES:
                chosen = pick_encoding(accepted.decode("latin-1"))
                if chosen is not None:
                    headers += b"content-encoding: %b\r\nvary: accept-encoding\r\n" % chosen.encode()
                    if len(body) > _COMPRESS_ASIDE_FROM_BYTES:
                        self._aside(exchange, self._pack, headers, body, chosen)
                        return
                    body = compress(body, chosen)
            self._reply(exchange, 200, headers, body)
        except Exception as error:
            self._fail(exchange, error)

    # ---- what takes long: in tasks, with the work in threads ----

    def _aside(self, exchange: Exchange, steps: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        async def guarded() -> None:
            try:
                await steps(exchange, *args)
            except Exception as error:
                self._fail(exchange, error)

        self._open[exchange] = asyncio.get_running_loop().create_task(guarded())

    async def _run(self, size: int, work: Callable[..., Any], *args: Any) -> Any:
        """Runs `work` in a thread for bodies of that size, and gives its result."""
        executor = self._executor if size < _LARGE_BYTES else self._large_executor
        return await asyncio.get_running_loop().run_in_executor(executor, partial(work, *args))

    async def _whole_body(self, exchange: Exchange) -> bytes:
        request = exchange.request
        return await self._run(request.body_bytes, request.whole_body) if request.parts else request.body

    async def _join_and_parse(self, exchange: Exchange, json_bytes: int | None) -> None:
        await self._parse(exchange, await self._whole_body(exchange), json_bytes)

    async def _unpack(self, exchange: Exchange, encoding: str, json_bytes: int | None) -> None:
        packed, max_bytes = await self._whole_body(exchange), self.limits.sizes.body_bytes
        body = await self._run(len(packed), decompress, packed, encoding, max_bytes)
        exchange.hold(len(body))
        await self._parse(exchange, body, json_bytes)

    async def _parse(self, exchange: Exchange, body: bytes, json_bytes: int | None) -> None:
        if _is_quick(body, json_bytes):
            request = self._requests.parse(body, json_bytes)
            wanted = self._check(exchange, request)
            items = self._items.read(request)
        else:
            request = await self._run(len(body), parse_request, body, json_bytes, self._check_tensor)
            wanted = self._check(exchange, request)
            items = await self._run(len(body), self._items.read, request)
        self._serve(exchange, request, wanted, items)

    async def _decode(
        self,
        exchange: Exchange,
        files: list[bytes],
        options: Options,
        key: int | None,
        wanted: _Wanted,
        request_id: str | None,
    ) -> None:
        limit_s = self._gateway.deadline_s
        if options.timeout_s is not None:
            limit_s = min(limit_s, options.timeout_s)
        until_s = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(until_s):
                items = await self._decoder.decode_all(files, until_s)
        except TimeoutError:
            raise _late(limit_s) from None
        left_s = until_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise _late(limit_s)
        self._fly(exchange, items, replace(options, timeout_s=left_s), key, wanted, request_id)

    async def _pack(self, exchange: Exchange, headers: bytes, body: bytes, encoding: str) -> None:
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
            if parts[3] != self._name:
                raise UnknownModelError(f"unknown model {shown(parts[3])}; this server serves {self._name!r}")
            if len(parts) > 5 and parts[4] == "versions" and parts[5] != self._version:
                raise UnknownModelError(
                    f"model {self._name!r} has no version {shown(parts[5])}; it has version {self._version!r}"
                )
        return _error(404, f"nothing is served at {shown(path)}; see GET /v2 and GET /v2/models/{self._name}")

    def _server_metadata(self) -> _Response:
        return _json(200, {"name": "evenkeel", "version": __version__, "extensions": _EXTENSIONS})

    def _model_metadata(self) -> _Response:
        card = self._card
        columns = {"scores": [-1, len(card.classes)]}
        return _json(
            200,
            {
                "name": self._name,
                "versions": [self._version],
                "platform": "evenkeel",
                **({"digest": self._digest} if self._digest else {}),
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
                    for name, datatype in self._outputs.items()
                ],
            },
        )

    def _server_ready(self) -> _Response:
        return self._ready({})

    def _model_ready(self) -> _Response:
        return self._ready({"name": self._name})

    def _ready(self, what: dict[str, Any]) -> _Response:
        if self._gateway.draining:
            return _json(503, {**what, "ready": False, "error": "the server is shutting down"})
        if not self._gateway.ready:
            return _json(503, {**what, "ready": False, "error": "no replica is ready"})
        return _json(200, {**what, "ready": True})


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


def _path(target: bytes) -> str:
    if not target.startswith(b"/"):
        # Clients send whole URLs to proxies.
        with suppress(httptools.HttpParserInvalidURLError):
            target = httptools.parse_url(target).path or b"/"
    return unquote(target.partition(b"?")[0].decode("latin-1"))


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
