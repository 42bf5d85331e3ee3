"""The laws of `evenkeel.backends.backend`, over every backend.

To add one: an async context manager that gives a `Case`, in `CASES`.
"""

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import SimpleNamespace

import grpc
import numpy as np
import orjson
import pytest
import uvloop

from evenkeel.backends.backend import Backend, Reply
from evenkeel.backends.oip.backend import OipBackend
from evenkeel.backends.worker.model import Model
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.backends.worker.server import serve
from evenkeel.delays.laws import Delay
from evenkeel.errors import BackendError, BackendLostError
from evenkeel.oip import HEADER_LENGTH, InferResponse, Tensor, parse_request, write_response
from evenkeel.oip.grpc import parse_infer_request, write_infer_response
from evenkeel.oip.service import SERVICE

ROWS = np.arange(12, dtype=np.float32).reshape(2, 6)
LARGE = np.ones((1, 50_000), np.float32)  # over every limit below which a message is handled differently
STUCK = 77  # key of a task that a case with a delay never finishes


@dataclass
class Case:
    """A started backend whose model `double` doubles its rows.

    Attributes:
        block: keep the backend from beginning any task that is submitted from now on.
    """

    backend: Backend
    block: Callable[[], object]


class _StuckDelay(Delay):
    def draw(self, key: int, worker: int, now_s: float) -> float:
        return 3600.0 if key == STUCK else 0.0

    @property
    def mean_s(self) -> float:
        return 0.0


@contextlib.asynccontextmanager
async def _worker(listen: str) -> AsyncIterator[Case]:
    listening = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    models = [Model("double", lambda rows: rows * 2)]
    delay = _StuckDelay()
    task = asyncio.ensure_future(
        serve(models, listen, delay=delay, drain_s=0.0, stop=stop, on_listening=listening.set_result)
    )
    backend = WorkerBackend("worker", await listening, ("double",))
    await backend.start()
    try:
        yield Case(backend, lambda: backend.submit("double", ROWS, lambda reply: None, STUCK))
    finally:
        await backend.close()
        stop.set()
        await task


class _DoublingServer:
    """Speaks as much of the Open Inference Protocol as doubling takes; begins nothing while `blocked`."""

    def __init__(self, binary: bool) -> None:
        self.binary = binary
        self.blocked = False
        self.over = asyncio.Event()
        self.talks: set[asyncio.Task] = set()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.talks.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
                fields = dict(line.split(": ", 1) for line in lines[1:-2])
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                reply, length = orjson.dumps({"extensions": ["binary_tensor_data"] * self.binary}), None
                if lines[0].startswith("post"):
                    if self.blocked:
                        await self.over.wait()
                    given = fields.get(HEADER_LENGTH.lower())
                    (rows,) = parse_request(body, None if given is None else int(given)).inputs
                    doubled = Tensor("scores", "FP32", rows.shape, np.float32(rows.data) * 2)
                    reply, length = write_response(InferResponse("double", [doubled]), [self.binary])
                head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(reply)}\r\n"
                head += "" if length is None else f"{HEADER_LENGTH}: {length}\r\n"
                writer.write(f"{head}\r\n".encode() + reply)
        writer.close()


@contextlib.asynccontextmanager
async def _oip(connections: int, binary: bool) -> AsyncIterator[Case]:
    script = _DoublingServer(binary)
    server = await asyncio.start_server(script.talk, "127.0.0.1", 0, limit=1 << 20)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    names = {"name": "double", "input_name": "rows", "output_name": "scores"}
    card = SimpleNamespace(**names, datatype="FP32", input_shape=(6,), output_shape=None)
    backend = OipBackend("remote", url, "double", card, connections=connections)
    await backend.start()

    def block() -> None:
        script.blocked = True
        for _ in range(connections):
            backend.submit("double", ROWS, lambda reply: None)

    try:
        yield Case(backend, block)
    finally:
        await backend.close()
        server.close()
        script.over.set()
        await asyncio.gather(*script.talks)


@contextlib.asynccontextmanager
async def _grpc() -> AsyncIterator[Case]:
    """A server of grpcio's, so that it is not our own HTTP/2 at both ends."""
    over, blocked = asyncio.Event(), []

    async def infer(message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        if blocked:
            await over.wait()
        (rows,) = parse_infer_request(message)[2].inputs
        doubled = Tensor("scores", "FP32", rows.shape, np.float32(rows.data) * 2)
        return write_infer_response(InferResponse("double", [doubled]))

    async def ready(message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return b"\x08\x01"

    async def nothing(message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return b""

    methods = {"ModelInfer": infer, "ModelReady": ready, "ServerMetadata": nothing, "ModelMetadata": nothing}
    handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
    server = grpc.aio.server(handlers=(grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    card = SimpleNamespace(
        name="double", input_name="rows", output_name="scores", datatype="FP32", input_shape=(6,), output_shape=None
    )
    backend = OipBackend("remote", f"grpc://127.0.0.1:{port}", "double", card, connections=4)
    await backend.start()

    def block() -> None:
        blocked.append(True)
        for _ in range(4):
            backend.submit("double", ROWS, lambda reply: None)

    try:
        yield Case(backend, block)
    finally:
        await backend.close()
        over.set()
        await server.stop(0)


CASES = {
    "oip-grpc": lambda folder: _grpc(),
    "oip-json": lambda folder: _oip(1, False),
    "oip-binary": lambda folder: _oip(4, True),
    "worker-unix": lambda folder: _worker(f"unix:{folder / 'worker.sock'}"),
    "worker-tcp": lambda folder: _worker("tcp://:0"),
}


class Replies:
    """Collects the replies to one ticket, and notes what no reply may do."""

    submitting = False

    def __init__(self) -> None:
        self.all: list[Reply] = []
        self.lawful = True
        self._thread = threading.get_ident()
        self._first = asyncio.get_running_loop().create_future()

    def __call__(self, reply: Reply) -> None:
        # Noted, not raised: a backend may well survive a callback that raises.
        self.lawful = self.lawful and not Replies.submitting and threading.get_ident() == self._thread
        self.all.append(reply)
        if not self._first.done():
            self._first.set_result(reply)

    async def one(self) -> Reply:
        reply = await self._first
        assert self.lawful, "replied from inside submit, or on another thread"
        return reply


def submit(backend: Backend, inputs: np.ndarray = ROWS, model: str = "double", key: int = 0) -> tuple[int, Replies]:
    replies = Replies()
    Replies.submitting = True
    try:
        return backend.submit(model, inputs, replies, key), replies
    finally:
        Replies.submitting = False


def law(test: Callable) -> Callable:
    """Run the async `test(case)` over every case, each with a loop of its own."""

    @pytest.mark.parametrize("name", CASES)
    def run(name: str, tmp_path) -> None:
        async def body() -> None:
            async with CASES[name](tmp_path) as case:
                await test(case)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.wait_for(body(), 30))

    functools.update_wrapper(run, test, assigned=("__doc__", "__name__", "__module__", "__qualname__"), updated=())
    del run.__wrapped__  # or pytest would ask for its arguments
    return run


async def settle(backend: Backend) -> None:
    """Let everything that is under way arrive: a task that is done in order after all others."""
    assert (await submit(backend)[1].one()).error is None


@law
async def test_every_submit_gets_its_own_reply_once(case):
    tickets = [submit(case.backend, ROWS + number, key=number) for number in range(30)]
    large = submit(case.backend, LARGE)
    assert len({ticket for ticket, _ in [*tickets, large]}) == 31
    for number, (_, replies) in enumerate(tickets):
        reply = await replies.one()
        assert (reply.error, reply.cancelled) == (None, False)
        np.testing.assert_array_equal(reply.outputs, (ROWS + number) * 2)
    np.testing.assert_array_equal((await large[1].one()).outputs, LARGE * 2)
    await settle(case.backend)
    assert all(len(replies.all) == 1 for _, replies in [*tickets, large])


@law
async def test_an_unknown_model_is_an_error_reply(case):
    _, replies = submit(case.backend, model="nobody")
    reply = await replies.one()
    assert isinstance(reply.error, BackendError)
    assert reply.outputs is None
    assert not reply.cancelled
    await settle(case.backend)
    assert len(replies.all) == 1


@law
async def test_a_cancelled_task_that_had_not_begun_replies_so(case):
    case.block()
    tickets = [submit(case.backend) for _ in range(3)]
    for ticket, _ in reversed(tickets):
        case.backend.cancel(ticket)
        case.backend.cancel(ticket)
    for _, replies in tickets:
        reply = await replies.one()
        assert reply.cancelled
        assert isinstance(reply.error, BackendError)
    assert all(len(replies.all) == 1 for _, replies in tickets)


@law
async def test_cancelling_what_is_finished_or_unknown_changes_nothing(case):
    ticket, replies = submit(case.backend)
    await replies.one()
    case.backend.cancel(ticket)
    case.backend.cancel(ticket + 1000)
    await settle(case.backend)
    assert len(replies.all) == 1


@law
async def test_a_cancel_that_races_with_the_work_still_gives_one_reply(case):
    tickets = [submit(case.backend) for _ in range(20)]
    for ticket, _ in tickets[::2]:
        case.backend.cancel(ticket)
    answers = [await replies.one() for _, replies in tickets]
    assert all(answer.error is None for answer in answers[1::2])
    assert all(answer.cancelled or answer.error is None for answer in answers[::2])
    await settle(case.backend)
    assert all(len(replies.all) == 1 for _, replies in tickets)


@law
async def test_closing_answers_what_is_open_and_what_comes_later(case):
    assert case.backend.ready
    changes = []
    case.backend.on_change = lambda: changes.append(case.backend.ready)
    case.block()
    tickets = [submit(case.backend) for _ in range(5)]
    await case.backend.close()
    tickets.append(submit(case.backend))
    for _, replies in tickets:
        assert isinstance((await replies.one()).error, BackendLostError)
    assert not case.backend.ready
    assert changes[-1:] == [False]
    assert all(len(replies.all) == 1 for _, replies in tickets)


@law
async def test_suspicion_harms_no_backend_that_works(case):
    case.backend.suspect()
    await settle(case.backend)
    assert case.backend.ready
