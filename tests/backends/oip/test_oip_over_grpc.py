"""Replicas behind gRPC: servers of grpcio's that say what they like, and our own front end."""

import asyncio
import contextlib

import grpc
import numpy as np
import pytest

from backend_helpers import in_loop, until
from evenkeel.backends.oip.backend import OipBackend
from evenkeel.errors import (
    BackendBusyError,
    BackendError,
    BackendLostError,
    ConfigurationError,
    ProtocolError,
    TaskRefusedError,
)
from evenkeel.http2.client import GrpcClient
from evenkeel.models.digest import ModelDigests
from evenkeel.oip import InferResponse, Tensor
from evenkeel.oip.grpc import parse_infer_request, write_infer_response
from evenkeel.oip.protobuf import write
from evenkeel.oip.service import MODEL_METADATA, READY, SERVER_METADATA, SERVICE
from evenkeel.serving.grpc.connection import GrpcLimits
from http_helpers import FakeGateway, make_card, serving

CARD = make_card()
ROWS = np.stack([np.full((4, 5, 3), value, np.uint8) for value in (3, 200)])
SCORES = [[0, 3, 6], [0, 200, 400]]


class GrpcioServer:
    """Answers as a script says."""

    def __init__(self) -> None:
        self.ready = True
        self.server_metadata: dict = {"name": "other"}
        self.model_metadata: dict = {"name": "remote"}
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[tuple] = []
        self.given_up = 0
        self.infer = self.scores
        self.port = 0
        self.server: grpc.aio.Server | None = None

    async def start(self) -> None:
        async def ready(message, context):
            return write({"ready": self.ready}, READY)

        async def server(message, context):
            return write(self.server_metadata, SERVER_METADATA)

        async def model(message, context):
            return write(self.model_metadata, MODEL_METADATA)

        async def infer(message, context):
            self.asked.append((parse_infer_request(message), context))
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.given_up += 1
                raise
            return await self.infer(self.asked[-1][0][2], context)

        methods = {"ModelInfer": infer, "ModelReady": ready, "ServerMetadata": server, "ModelMetadata": model}
        handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
        self.server = grpc.aio.server(handlers=(grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def scores(self, request, context) -> bytes:
        means = np.asarray(request.inputs[0].data).mean((1, 2, 3), dtype=np.float32)
        values = np.stack([0 * means, means, 2 * means], 1)
        return write_infer_response(InferResponse("remote", [Tensor("scores", "FP32", values.shape, values)], "1"))


@contextlib.asynccontextmanager
async def connected(server: GrpcioServer | None = None, **options):
    server = server or GrpcioServer()
    await server.start()
    try:
        url = f"grpc://127.0.0.1:{server.port}"
        backend = OipBackend("remote-0", url, "remote", CARD, **{"poll_s": 0.01, **options})
        try:
            await backend.start()
            yield server, backend
        finally:
            await backend.close()
    finally:
        await server.server.stop(0)


def ask(backend, rows=ROWS):
    future = asyncio.get_running_loop().create_future()
    ticket = backend.submit("toy", rows, future.set_result)
    assert not future.done()
    return future, ticket


@in_loop
async def test_tasks_are_done_by_a_server_of_others():
    async with connected(version="1", timeout_s=5) as (server, backend):
        for _ in range(3):
            reply = await ask(backend)[0]
            assert reply.outputs.tolist() == SCORES
        name, version, request = server.asked[-1][0]
        assert (name, version) == ("remote", "1")
        assert [output.name for output in request.outputs] == ["scores"]
        assert request.parameters == {}, "who is no evenkeel is not told what it does not know"
        assert 0 < server.asked[-1][1].time_remaining() <= 5.1


@in_loop
async def test_a_connection_whose_streams_are_used_up_gives_way_to_another():
    async with connected() as (server, _):
        client = GrpcClient(f"grpc://127.0.0.1:{server.port}", timeout_s=5)
        method = f"/{SERVICE}/ServerMetadata"
        await client.ask(method, b"", 1000)
        first = client._connection
        first._http2._next = (1 << 31) - 3
        for _ in range(3):  # the first two are the last that it can
            await client.ask(method, b"", 1000)
        assert client._connection is not first
        await asyncio.wait_for(first.lost, 10)
        await client.close()


@in_loop
async def test_an_evenkeel_is_asked_for_exact_answers_and_told_the_range():
    gateway = FakeGateway()
    with serving(gateway, grpc=GrpcLimits()) as running:
        backend = OipBackend("remote-0", f"grpc://{running.grpc_address}", "toy", CARD)
        await backend.start()
        reply = await ask(backend)[0]
        assert reply.outputs.tolist() == SCORES
        await backend.close()
    assert all(submitted.options.exact for submitted in gateway.submitted)


@in_loop
async def test_a_task_that_is_cancelled_is_given_up_there():
    gateway = FakeGateway(hold=True)
    with serving(gateway, grpc=GrpcLimits()) as running:
        backend = OipBackend("remote-0", f"grpc://{running.grpc_address}", "toy", CARD)
        await backend.start()
        future, ticket = ask(backend, ROWS[:1])
        await until(lambda: gateway.submitted)
        backend.cancel(ticket)
        assert (await future).cancelled
        await until(lambda: gateway.cancelled == [0])
        await backend.close()


@in_loop
async def test_more_tasks_than_the_server_takes_streams_wait():
    gateway = FakeGateway(hold=True)
    with serving(gateway, grpc=GrpcLimits()) as running:
        backend = OipBackend("remote-0", f"grpc://{running.grpc_address}", "toy", CARD, connections=200)
        await backend.start()
        asked = [ask(backend, ROWS[:1])[0] for _ in range(200)]
        await until(lambda: len(gateway.submitted) == GrpcLimits().http2.streams)
        running.call(gateway.release)
        for future in asked:
            assert (await future).outputs.tolist() == SCORES[:1]
        await backend.close()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, TaskRefusedError),
        (grpc.StatusCode.UNAVAILABLE, BackendBusyError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, BackendBusyError),
        (grpc.StatusCode.NOT_FOUND, BackendError),
        (grpc.StatusCode.INTERNAL, BackendError),
    ],
)
@in_loop
async def test_what_the_server_cannot_do_becomes_its_error(code, error):
    async with connected() as (server, backend):

        async def refuse(request, context):
            await context.abort(code, "not today: \u00fc", (("grpc-retry-pushback-ms", "2500"),))

        server.infer = refuse
        found = (await ask(backend)[0]).error
        assert type(found) is error
        assert f"remote-0: the server answered {code.name}: not today: \u00fc" in str(found)
        if error is BackendBusyError:
            assert found.retry_after_s == 2.5
        assert backend.ready


WRONG = {
    "no message of the protocol": (b"\xff", "malformed"),
    "another output": (
        write_infer_response(InferResponse("remote", [Tensor("x", "BYTES", (1,), [b""])])),
        "expected output",
    ),
    "another shape": (
        write_infer_response(InferResponse("remote", [Tensor("scores", "FP32", (1, 3), np.ones((1, 3), np.float32))])),
        "has shape",
    ),
    "not a number": (
        write_infer_response(
            InferResponse("remote", [Tensor("scores", "FP32", (2, 3), np.full((2, 3), np.nan, np.float32))])
        ),
        "not finite",
    ),
    "a large one": (bytes(9 << 20), "cannot be read"),
}


@pytest.mark.parametrize("what", WRONG)
@in_loop
async def test_what_is_no_answer_is_the_servers_fault(what):
    async with connected() as (server, backend):

        async def wrong(request, context):
            return WRONG[what][0]

        server.infer = wrong
        found = (await ask(backend)[0]).error
        assert isinstance(found, ProtocolError)
        assert WRONG[what][1] in str(found)
        server.infer = server.scores
        assert (await ask(backend)[0]).outputs.tolist() == SCORES


@in_loop
async def test_a_server_that_goes_and_comes_back_is_found_again():
    server = GrpcioServer()
    async with connected(server) as (_, backend):
        assert (await ask(backend)[0]).outputs is not None
        server.gate.clear()
        future, _ = ask(backend)
        await until(lambda: len(server.asked) == 2)
        await server.server.stop(0)
        assert isinstance((await future).error, BackendError)
        await until(lambda: not backend.ready)
        lost = (await ask(backend)[0]).error
        assert lost is None or isinstance(lost, BackendLostError)
        server.gate.set()
        await server.start()
        await until(lambda: backend.ready)
        assert (await ask(backend)[0]).outputs.tolist() == SCORES


@in_loop
async def test_a_model_that_is_not_ready_is_not_asked():
    server = GrpcioServer()
    async with connected(server) as (_, backend):
        server.ready = False
        await until(lambda: not backend.ready)
        assert "not ready" in backend.why_not
        server.ready = True
        await until(lambda: backend.ready)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 4, 5, 3]}]}, "takes 'FP32'"),
        ({"inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 9, 5, 3]}]}, "has shape"),
        ({"digest": "onnx:other"}, "digest other"),
    ],
)
@in_loop
async def test_a_model_that_does_not_fit_is_not_asked(metadata, says):
    server = GrpcioServer()
    server.model_metadata = {"name": "remote", **metadata}
    await server.start()
    digests = ModelDigests({"toy": "onnx:this"})
    backend = OipBackend(
        "remote-0", f"grpc://127.0.0.1:{server.port}", "remote", CARD, versions=digests, start_timeout_s=0.2
    )
    try:
        with pytest.raises(BackendError, match=says):
            await backend.start()
    finally:  # a server of grpcio's that is left running keeps the loop from ending
        await backend.close()
        await server.server.stop(0)


@pytest.mark.parametrize("url", ["grpc://", "grpc://host/path", "grpcx://host", "grpc://host:99999", "grpc://u:p@host"])
def test_what_is_no_url(url):
    with pytest.raises(ConfigurationError, match=r"remote-0: .*(grpc|reached)"):
        OipBackend("remote-0", url, "remote", CARD)


@in_loop
async def test_a_server_that_speaks_no_http2_is_said_to():
    async def talk(reader, writer):
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    backend = OipBackend("remote-0", f"grpc://127.0.0.1:{port}", "remote", CARD, start_timeout_s=0.2, poll_s=0.01)
    with pytest.raises(BackendError, match="breaks the rules of HTTP/2"):
        await backend.start()
    await backend.close()
    server.close()
