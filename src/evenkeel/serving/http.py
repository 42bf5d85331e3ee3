"""The HTTP front end: Open Inference Protocol over a raw ASGI application.

    GET  /v2                                     the server and what it supports
    GET  /v2/health/live   /v2/health/ready
    GET  /v2/models/{m}[/versions/{v}]           inputs and outputs of the model
    GET  /v2/models/{m}[/versions/{v}]/ready
    POST /v2/models/{m}[/versions/{v}]/infer
    GET  /metrics                                Prometheus text

Every error is `{"error": "..."}` with the status that its exception carries. There is no framework between the server
and this file: one request is answered in some tens of microseconds.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import orjson

import evenkeel
from evenkeel.cards import ModelCard
from evenkeel.errors import (
    DeadlineError,
    EvenkeelError,
    OverloadedError,
    RequestError,
    TooLargeError,
    UnknownModelError,
)
from evenkeel.oip import InferRequest, RepeatedRequests, parse_request
from evenkeel.serving.answers import OUTPUTS, AnswerWriter
from evenkeel.serving.bodies import (
    ClientGoneError,
    Message,
    Receive,
    Send,
    compress,
    decompress,
    pick_encoding,
    read_body,
)
from evenkeel.serving.flight import Flight, Submits
from evenkeel.serving.images import ImageDecoder
from evenkeel.serving.items import ItemReader, read_key, read_options
from evenkeel.serving.sweeper import Sweeper

__all__ = ["App"]

_log = logging.getLogger(__name__)

# cancel_on_disconnect: a client that closes its connection frees its slots, so another gateway may rely on it.
_EXTENSIONS = ["binary_tensor_data", "parameters", "cancel_on_disconnect"]
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
_TEXT = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
_CLOSE = (b"connection", b"close")
_WATCH_CLIENT_AFTER_S = 0.02  # a slow request whose client went away frees its slots about this soon
_COMPRESS_FROM_BYTES = 256  # below, compressing saves no packet
_PARSE_ASIDE_FROM_BYTES = 1 << 20  # parsing this much JSON would hold up all other requests

_Headers = list[tuple[bytes, bytes]]
_Response = tuple[int, _Headers, bytes]


class App:
    """An ASGI application that serves one model through a gateway.

    Args:
        name: the model's name in URLs.
        version: the one version that is served.
        card: of the model.
        gateway: answers items; must live on the event loop that runs the application.
        metrics: gives the body of /metrics.
        max_body_bytes: limit of a request's body, compressed and decompressed.
        decode_threads: image files that are decoded at once.
        body_timeout_s: a request whose body is not complete by then (or somewhat later) is answered with 408.

    Attributes:
        in_flight: requests that are being answered.
    """

    def __init__(
        self,
        *,
        name: str,
        version: str,
        card: ModelCard,
        gateway: Submits,
        metrics: Callable[[], bytes],
        max_body_bytes: int = 32 << 20,
        decode_threads: int = 2,
        body_timeout_s: float = 30.0,
    ) -> None:
        self.in_flight = 0
        self._name = name
        self._version = version
        self._card = card
        self._gateway = gateway
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._body_patience = Sweeper(body_timeout_s)
        self._client_patience = Sweeper(_WATCH_CLIENT_AFTER_S)
        self._executor = ThreadPoolExecutor(decode_threads, thread_name_prefix="evenkeel-decode")
        self._items = ItemReader(card, ImageDecoder(card, self._executor))
        self._requests = RepeatedRequests()
        self._answers = AnswerWriter(name, version, card.classes)
        roots = (f"/v2/models/{name}", f"/v2/models/{name}/versions/{version}")
        self._infer_paths = frozenset(f"{root}/infer" for root in roots)
        self._gets: dict[str, Callable[[], _Response]] = {
            "/v2": self._server_metadata,
            "/v2/health/live": lambda: _json(200, {"live": True}),
            "/v2/health/ready": self._server_ready,
            "/metrics": lambda: (200, [_TEXT], self._metrics()),
            **dict.fromkeys(roots, self._model_metadata),
            **{f"{root}/ready": self._model_ready for root in roots},
        }

    def close(self) -> None:
        """Let go of the decoding threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one ASGI scope."""
        if scope["type"] != "http":
            await _serve_other(scope["type"], receive, send)
            return
        self.in_flight += 1
        try:
            try:
                status, headers, body = await self._respond(scope, receive)
            except ClientGoneError:
                return
            except asyncio.CancelledError:
                # Only a server whose patience with a shutdown has ended does this, and then nothing else comes after.
                status, headers, body = _error(503, "the server shut down before the answer was there")
            except EvenkeelError as error:
                status, headers, body = _from_error(error)
            except Exception:
                _log.exception("unexpected error while answering %s %r", scope["method"], scope["path"])
                status, headers, body = _error(500, "internal error; the server's log has the details")
            headers.append((b"content-length", b"%d" % len(body)))
            if self._gateway.draining and _CLOSE not in headers:
                headers.append(_CLOSE)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        finally:
            self.in_flight -= 1

    async def _respond(self, scope: Message, receive: Receive) -> _Response:
        if scope["path"] in self._infer_paths and scope["method"] == "POST":
            return await self._infer(scope["headers"], receive)
        return self._answer_other(scope["method"], scope["path"])

    async def _infer(self, headers: _Headers, receive: Receive) -> _Response:
        header_length: int | None = None
        declared_bytes: int | None = None
        encoding = accept = ""
        expects_continue = False
        for name, value in headers:
            if name == b"content-length":
                declared_bytes = _whole_number(name, value)
            elif name == b"inference-header-content-length":
                header_length = _whole_number(name, value)
            elif name == b"content-encoding":
                encoding = value.decode("latin-1").strip().lower()
            elif name == b"accept-encoding":
                accept = value.decode("latin-1")
            elif name == b"expect":
                expects_continue = True
        if expects_continue and declared_bytes is not None and declared_bytes > self._max_body_bytes:
            # Answered before the first receive(), which would tell the client to go on and send it.
            raise TooLargeError(f"the body has {declared_bytes} bytes; at most {self._max_body_bytes} are taken")
        body = await read_body(receive, self._max_body_bytes, self._body_patience)
        if encoding and encoding != "identity":
            body = await self._aside(decompress, body, encoding, self._max_body_bytes)
        if (len(body) if header_length is None else header_length) < _PARSE_ASIDE_FROM_BYTES:
            request = self._requests.parse(body, header_length)
        else:
            request = await self._aside(parse_request, body, header_length)
        text, json_bytes = await self._answer(request, receive)
        answered: _Headers = [_JSON]
        if json_bytes is not None:
            answered = [_BINARY, (b"inference-header-content-length", b"%d" % json_bytes)]
        if accept and len(text) >= _COMPRESS_FROM_BYTES and (chosen := pick_encoding(accept)) is not None:
            text = await self._aside(compress, text, chosen) if len(text) > 65536 else compress(text, chosen)
            answered += [(b"content-encoding", chosen.encode()), (b"vary", b"accept-encoding")]
        return 200, answered, text

    async def _answer(self, request: InferRequest, receive: Receive) -> tuple[bytes, int | None]:
        names, binary = self._answers.wanted(request)
        options = read_options(request.parameters)
        key = read_key(request.parameters)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        items = await self._items.read(request)
        if options.timeout_s is not None:
            options = replace(options, timeout_s=_time_left(options.timeout_s, loop.time() - began_s))
        outcomes = await Flight(self._gateway, self._client_patience).fly(items, options, key, receive)
        return self._answers.write(outcomes, names, binary, request.id)

    async def _aside(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(work, *args))

    def _answer_other(self, method: str, path: str) -> _Response:
        get = self._gets.get(path)
        if get is not None:
            return get() if method in ("GET", "HEAD") else _wrong_method(method, path, "GET, HEAD")
        if path in self._infer_paths:
            return _wrong_method(method, path, "POST")
        if len(path) > 1 and path.endswith("/"):
            return self._answer_other(method, path.rstrip("/") or "/")
        parts = path.split("/")
        if parts[:3] == ["", "v2", "models"] and len(parts) > 3:
            if parts[3] != self._name:
                raise UnknownModelError(f"unknown model {parts[3]!r}; this server serves {self._name!r}")
            if len(parts) > 5 and parts[4] == "versions" and parts[5] != self._version:
                raise UnknownModelError(
                    f"model {self._name!r} has no version {parts[5]!r}; it has version {self._version!r}"
                )
        return _error(404, f"nothing is served at {path!r}; see GET /v2 and GET /v2/models/{self._name}")

    def _server_metadata(self) -> _Response:
        return _json(200, {"name": "evenkeel", "version": evenkeel.__version__, "extensions": _EXTENSIONS})

    def _model_metadata(self) -> _Response:
        card = self._card
        columns = {"scores": [-1, len(card.classes)]}
        return _json(
            200,
            {
                "name": self._name,
                "versions": [self._version],
                "platform": "evenkeel",
                "inputs": [{"name": card.input_name, "datatype": card.datatype, "shape": [-1, *card.input_shape]}],
                "outputs": [
                    {"name": name, "datatype": datatype, "shape": columns.get(name, [-1])}
                    for name, datatype in OUTPUTS.items()
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


async def _serve_other(kind: str, receive: Receive, send: Send) -> None:
    """Answer the ASGI scopes that are not HTTP."""
    if kind == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1003})
        return
    while kind == "lifespan":
        phase = (await receive())["type"]
        await send({"type": f"{phase}.complete"})
        if phase == "lifespan.shutdown":
            return


def _time_left(timeout_s: float, spent_s: float) -> float:
    # Decoding images takes some of the time that the client gave.
    if spent_s >= timeout_s:
        raise DeadlineError(f"the timeout of {timeout_s:g} s passed while images were decoded")
    return timeout_s - spent_s


def _whole_number(name: bytes, value: bytes) -> int:
    # int() alone would take signs, blanks and underscores; 18 digits are more than any body has.
    if not value.isdigit() or len(value) > 18:
        raise RequestError(f"header {name.decode()} must be a whole number, found {value.decode('latin-1')!r}")
    return int(value)


def _json(status: int, message: dict[str, Any]) -> _Response:
    return status, [_JSON], orjson.dumps(message)


def _error(status: int, message: str) -> _Response:
    # Paths and names may come from the client with characters that JSON text cannot hold.
    return _json(status, {"error": message.encode("utf-8", "replace").decode()})


def _from_error(error: EvenkeelError) -> _Response:
    status, headers, body = _error(error.http_status, str(error))
    if isinstance(error, OverloadedError):
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    elif isinstance(error, TooLargeError) or status == 408:
        headers.append(_CLOSE)  # the rest of the body may still be on its way
    return status, headers, body


def _wrong_method(method: str, path: str, allowed: str) -> _Response:
    status, headers, body = _error(405, f"{method} is not allowed on {path}; use {allowed}")
    return status, [*headers, (b"allow", allowed.encode())], body
