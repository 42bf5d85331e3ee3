"""A scripted gateway, the application called without a server, and the application on a real server in a thread."""

import asyncio
import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import uvloop
from PIL import Image

from evenkeel.cards import ModelCard
from evenkeel.coding.code import Answer
from evenkeel.errors import EvenkeelError
from evenkeel.oip import Tensor, write_request
from evenkeel.serving.gateway import Options, Outcome
from evenkeel.serving.http import App
from evenkeel.serving.server import run_server

CLASSES = ("dark", "dim", "bright")


def make_card(**fields: Any) -> ModelCard:
    given = {"name": "toy", "kind": "classifier", "file": "toy.onnx", "sha256": "0" * 64, "classes": CLASSES}
    return ModelCard(**{**given, "height": 4, "width": 5, **fields})


@dataclass
class Submitted:
    item: np.ndarray
    on_outcome: Callable[[Outcome], object]
    options: Options
    key: int | None


@dataclass
class FakeGateway:
    """Answers an item with [0, mean, 2 * mean] of its pixels; `errors` holds what item number i fails with instead.

    `hold` keeps all items open until `release`; `full_at` sheds from that many submitted items on.
    """

    ready: bool = True
    draining: bool = False
    hold: bool = False
    refuse: Callable[[int], EvenkeelError | None] = lambda number: None
    errors: dict[int, EvenkeelError] = field(default_factory=dict)
    submitted: list[Submitted] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    open: set[int] = field(default_factory=set)

    def submit(
        self,
        array: np.ndarray,
        on_outcome: Callable[[Outcome], object],
        options: Options = Options(),  # noqa: B008
        key: int | None = None,
    ) -> int:
        number = len(self.submitted)
        error = self.refuse(number)
        if error is not None:
            raise error
        self.submitted.append(Submitted(array, on_outcome, options, key))
        self.open.add(number)
        if not self.hold:
            asyncio.get_running_loop().call_soon(self.finish, number)
        return number

    def finish(self, number: int) -> None:
        if number not in self.open:
            return
        self.open.discard(number)
        item = self.submitted[number]
        error = self.errors.get(number)
        if error is not None:
            item.on_outcome(Outcome(None, error, 0.001))
            return
        mean = float(item.item.mean())
        scores = np.array([0.0, mean, 2 * mean], np.float32)
        item.on_outcome(Outcome(Answer(scores, "exact", 0.75), None, 0.0125))

    def release(self) -> None:
        self.hold = False
        for number in list(self.open):
            self.finish(number)

    def cancel(self, ticket: int) -> None:
        self.open.discard(ticket)
        self.cancelled.append(ticket)

    def start_draining(self) -> None:
        self.draining = True


def make_app(gateway: FakeGateway | None = None, card: ModelCard | None = None, **options: Any) -> App:
    given = {"name": "toy", "version": "1", "metrics": lambda: b"evenkeel_up 1\n", **options}
    return App(card=card or make_card(), gateway=gateway or FakeGateway(), **given)


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> str:
        assert self.status >= 400
        assert self.headers["content-type"] == "application/json"
        message = self.json["error"]
        assert isinstance(message, str)
        return message

    def output(self, name: str) -> Any:
        return next(output["data"] for output in self.json["outputs"] if output["name"] == name)


class Channel:
    """The two ends of one ASGI request; `gone` makes the client go away once its body is read."""

    def __init__(self, parts: list[bytes], gone: asyncio.Event | None = None) -> None:
        self._parts = list(parts)
        self._gone = gone
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        await (self._gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def response(self) -> Response:
        start, body = self.sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        assert headers["content-length"] == str(len(body["body"]))
        return Response(start["status"], headers, body["body"])


def scope_of(method: str, path: str, headers: dict[str, str]) -> dict[str, Any]:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": raw}


async def call(
    app: App, path: str, body: bytes | list[bytes] = b"", *, method: str = "POST", headers: dict[str, str] | None = None
) -> Response:
    channel = Channel(body if isinstance(body, list) else [body])
    await app(scope_of(method, path, headers or {}), channel.receive, channel.send)
    return channel.response


INFER = "/v2/models/toy/infer"


def get(path: str, gateway: FakeGateway | None = None, method: str = "GET") -> Response:
    app = make_app(gateway)
    try:
        return asyncio.run(call(app, path, method=method))
    finally:
        app.close()


def infer(
    body: bytes | list[bytes],
    headers: dict[str, str] | None = None,
    gateway: FakeGateway | None = None,
    card: ModelCard | None = None,
    **options: Any,
) -> Response:
    app = make_app(gateway, card, **options)
    try:
        return asyncio.run(call(app, INFER, body, headers=headers))
    finally:
        app.close()


def ask(tensor: Tensor, gateway: FakeGateway | None = None, card: ModelCard | None = None, **fields: Any) -> Response:
    """Send `tensor` as binary, and get JSON back."""
    body, header_length = write_request([tensor], binary=True, **fields)
    return infer(body, {"inference-header-content-length": str(header_length)}, gateway, card)


def images(count: int = 1, value: int = 7) -> np.ndarray:
    return np.full((count, 4, 5, 3), value, np.uint8)


def tensor_of(data: np.ndarray, datatype: str = "UINT8") -> Tensor:
    return Tensor("images", datatype, data.shape, data)


def file_of(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


@dataclass
class Running:
    """A server in a thread; `call` runs a function on its loop."""

    port: int
    gateway: FakeGateway
    app: App
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def call(self, function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)


@contextlib.contextmanager
def serving(gateway: FakeGateway | None = None, card: ModelCard | None = None, **options: Any) -> Iterator[Running]:
    """The application on a free port of loopback, in a thread of its own."""
    gateway = gateway or FakeGateway()
    started = threading.Event()
    found: list[Any] = []
    app_options = {key: options.pop(key) for key in ("max_body_bytes", "body_timeout_s") if key in options}

    async def serve() -> None:
        stop = asyncio.Event()
        app = make_app(gateway, card, **app_options)

        def on_started(port: int) -> None:
            found.append(Running(port, gateway, app, asyncio.get_running_loop(), stop))
            started.set()

        await run_server(app, gateway, "127.0.0.1", 0, stop=stop, on_started=on_started, grace_s=0.0, **options)

    thread = threading.Thread(target=lambda: uvloop.run(serve()))
    thread.start()
    assert started.wait(10)
    running: Running = found[0]
    try:
        yield running
    finally:
        with contextlib.suppress(RuntimeError):  # a test may have stopped it already
            running.loop.call_soon_threadsafe(running.stop.set)
        thread.join(10)
        assert not thread.is_alive()
