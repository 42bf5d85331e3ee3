"""A scripted gateway, the application called without a server, and the application on a real server in a thread."""

import asyncio
import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson
import uvloop
from PIL import Image

from evenkeel.coding.code import Answer
from evenkeel.errors import EvenkeelError
from evenkeel.models.cards import ModelCard
from evenkeel.oip import Tensor, write_request
from evenkeel.serving.front.served import ServedModel, ServedModels
from evenkeel.serving.gateway.gateway import Options, Outcome
from evenkeel.serving.grpc.app import GrpcApp
from evenkeel.serving.grpc.connection import GrpcLimits
from evenkeel.serving.grpc.front import GrpcFront
from evenkeel.serving.http.app import App
from evenkeel.serving.http.connection import HttpConnection, HttpServer
from evenkeel.serving.http.server import run_server

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
    deadline_s: float = 30.0
    max_items: int = 1 << 20
    no_room: EvenkeelError | None = None  # for more than one item
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

    @property
    def in_flight(self) -> int:
        return len(self.open)

    def check_room(self, count: int) -> None:
        assert count > 1, "one item costs no check"
        if self.no_room is not None:
            raise self.no_room

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


class OneModelApp(App):
    """Serves one model, and closes it with itself."""

    def close(self) -> None:
        super().close()
        for model in self._models:
            model.close()


def make_app(gateway: FakeGateway | None = None, card: ModelCard | None = None, **options: Any) -> App:
    of_model = {name: options.pop(name) for name in ("name", "version", "digest", "promised") if name in options}
    named = {"name": "toy", "version": "1", **of_model}
    models = ServedModels([ServedModel(card=card or make_card(), gateway=gateway or FakeGateway(), **named)])
    if gateway is not None and gateway.draining:
        models.start_draining()
    return OneModelApp(models, **{"metrics": lambda: b"evenkeel_up 1\n", **options})


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


class FakeTransport(asyncio.Transport):
    """What a connection writes, and what it asks of its transport; `more` is called after each write."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closing = self.aborted = self.eof = self.paused = False
        self.pauses = 0
        self.more: Callable[[], object] = lambda: None

    def write(self, data: bytes) -> None:
        assert not self.eof
        self.sent += data
        self.more()

    def writelines(self, parts: Any) -> None:
        self.write(b"".join(parts))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof = True

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True
        self.pauses += 1

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False


def connect(server: HttpServer) -> tuple[HttpConnection, FakeTransport]:
    protocol, transport = server.connect(), FakeTransport()
    protocol.connection_made(transport)
    return protocol, transport


def serve(app: App) -> HttpServer:
    return HttpServer(app, app.limits, app.headers)


def read_responses(sent: bytes, methods: list[str]) -> list[Response]:
    """All whole responses in `sent`, to requests with these methods."""
    found = []
    while b"\r\n\r\n" in sent and len(found) < len(methods):
        head, _, rest = sent.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        size = int(headers["content-length"]) if methods[len(found)] != "HEAD" else 0
        if len(rest) < size:
            break
        assert len(headers) == len(lines), "a header is given twice"
        found.append(Response(int(first.split()[1]), headers, rest[:size]))
        sent = rest[size:]
    return found


def request_bytes(
    path: str, body: bytes | list[bytes] = b"", *, method: str = "POST", headers: dict[str, str] | None = None
) -> bytes:
    """A request; a body in parts is sent in chunks."""
    given = {"Host": "x", **(headers or {})}
    target = quote(path, safe="/?=:", errors="surrogateescape")
    if isinstance(body, list):
        given["Transfer-Encoding"] = "chunked"
        wire = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in body if part) + b"0\r\n\r\n"
    else:
        wire = body
        if not any(name.lower() == "content-length" for name in given):
            given["Content-Length"] = str(len(body))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + wire


async def call(
    app: App, path: str, body: bytes | list[bytes] = b"", *, method: str = "POST", headers: dict[str, str] | None = None
) -> Response:
    """The response to one request on a connection of its own."""
    protocol, transport = connect(serve(app))
    answered = asyncio.Event()
    transport.more = answered.set
    protocol.data_received(request_bytes(path, body, method=method, headers=headers))
    while not (found := read_responses(transport.sent, [method])):
        answered.clear()
        await answered.wait()
    assert transport.sent.startswith(b"HTTP/1.1 ")
    assert transport.closing or transport.eof or "connection" not in found[0].headers
    protocol.connection_lost(None)
    return found[0]


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
    grpc: GrpcFront | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc.port}"

    def call(self, function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)


@contextlib.contextmanager
def serving(gateway: FakeGateway | None = None, card: ModelCard | None = None, **options: Any) -> Iterator[Running]:
    """The application on a free port of loopback, in a thread of its own; with `grpc`, the gRPC service on another."""
    gateway = gateway or FakeGateway()
    started = threading.Event()
    found: list[Any] = []
    app_options = {
        key: options.pop(key) for key in ("max_body_bytes", "body_timeout_s", "promised", "traced") if key in options
    }

    grpc: GrpcLimits | None = options.pop("grpc", None)

    async def serve() -> None:
        stop = asyncio.Event()
        app = make_app(gateway, card, **app_options)
        front = None
        if grpc is not None:
            front = GrpcFront(GrpcApp(app._models, max_message_bytes=grpc.message_bytes), ["127.0.0.1"], 0, grpc)

        def on_started(port: int) -> None:
            found.append(Running(port, gateway, app, asyncio.get_running_loop(), stop, front))
            started.set()

        more = {"grace_s": 0.0, "beside": front, **options}
        await run_server(app, "127.0.0.1", 0, stop=stop, on_started=on_started, **more)

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
