"""Replicas behind an Open Inference Protocol server: a scripted JSON-only one, and evenkeel's own."""

import asyncio
import contextlib
import functools
import re
from dataclasses import replace

import numpy as np
import orjson
import pytest
from aiohttp import web

from evenkeel.backends.oip.backend import OipBackend
from evenkeel.backends.oip.contract import Contract
from evenkeel.coding.code import Answer
from evenkeel.errors import (
    BackendBusyError,
    BackendError,
    BackendLostError,
    ConfigurationError,
    ProtocolError,
    TaskRefusedError,
)
from evenkeel.models.cards import ModelCard
from evenkeel.models.digest import ModelDigests
from evenkeel.oip import InferResponse, Tensor, parse_request, write_response
from evenkeel.serving.front.served import ServedModel, ServedModels
from evenkeel.serving.gateway.gateway import Outcome
from evenkeel.serving.http.app import App
from evenkeel.serving.http.server import run_server

CARD = ModelCard("toy", "classifier", "toy.onnx", "0" * 64, ("dark", "dim", "bright"), 4, 5)
ROWS = np.stack([np.full((4, 5, 3), value, np.uint8) for value in (3, 1, 2)])
SCORES = [[0, 3, 6], [0, 1, 2], [0, 2, 4]]


class JsonServer:
    """A server that speaks JSON only, as MLServer does. Its attributes are its script."""

    def __init__(self) -> None:
        self.ready = True
        self.keeps = True  # connections
        self.metadata: dict = {"name": "remote", "platform": "", "inputs": [], "outputs": []}
        self.reply = self.scores
        self.gate = asyncio.Event()
        self.gate.set()
        self.working = 0
        self.max_working = 0
        self.asked = 0
        self.transports: set = set()
        self.runner: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> None:
        app = web.Application()
        app.on_response_prepare.append(self.on_prepare)
        app.router.add_get("/v2", self.on_server)
        app.router.add_get("/v2/models/remote", self.on_model)
        app.router.add_get("/v2/models/remote/ready", self.on_ready)
        app.router.add_post("/v2/models/remote/infer", self.on_infer)
        self.runner = web.AppRunner(app, shutdown_timeout=0)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        assert self.runner is not None
        await self.runner.sites.copy().pop().stop()
        for transport in self.transports:
            transport.abort()
        self.gate.set()
        await self.runner.cleanup()

    async def stop(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        if not self.keeps:
            response.headers["connection"] = "close"
            response.force_close()

    async def json(self, message: object, status: int = 200, **headers: str) -> web.Response:
        return web.Response(body=orjson.dumps(message), status=status, content_type="application/json", headers=headers)

    async def on_server(self, request: web.Request) -> web.Response:
        return await self.json({"name": "json", "version": "1", "extensions": []})

    async def on_model(self, request: web.Request) -> web.Response:
        return await self.json(self.metadata)

    async def on_ready(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.ready else 400)

    async def on_infer(self, request: web.Request) -> web.Response:
        self.asked += 1
        self.transports.add(request.transport)
        self.working += 1
        self.max_working = max(self.max_working, self.working)
        try:
            assert "Inference-Header-Content-Length" not in request.headers
            message = orjson.loads(await request.read())
            await self.gate.wait()
            return await self.reply(message)
        finally:
            self.working -= 1

    async def scores(self, message: dict) -> web.Response:
        (tensor,) = message["inputs"]
        assert (tensor["name"], tensor["datatype"]) == ("images", "UINT8")
        rows = np.array(tensor["data"], np.uint8).reshape(tensor["shape"])
        data = [[0, float(row.mean()), float(2 * row.mean())] for row in rows]
        output = {"name": "scores", "datatype": "FP32", "shape": [len(data), 3], "data": data}
        return await self.json({"model_name": "remote", "outputs": [output], "parameters": {"headers": {}}})


@contextlib.asynccontextmanager
async def connected(server: JsonServer | None = None, card: ModelCard = CARD, **options):
    server = server or JsonServer()
    await server.start()
    options = {"poll_s": 0.01, **options}
    backend = OipBackend("remote-0", f"http://127.0.0.1:{server.port}/", "remote", card, **options)
    try:
        await backend.start()
        yield server, backend
    finally:
        await backend.close()
        await server.stop()


def ask(backend: OipBackend, rows: np.ndarray = ROWS, model: str = "toy"):
    """A future of the reply, and the ticket."""
    future = asyncio.get_running_loop().create_future()
    ticket = backend.submit(model, rows, future.set_result)
    assert not future.done()
    return future, ticket


async def until(holds) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


def test_a_reply_of_another_version_is_refused_and_so_is_a_server_that_names_one():
    async def run():
        digests = ModelDigests()
        async with connected(versions=digests) as (server, backend):

            async def versioned(version, message):
                answer = orjson.loads((await server.scores(message)).body)
                return await server.json({**answer, "model_version": version})

            server.reply = functools.partial(versioned, "1")
            assert (await ask(backend)[0]).error is None
            server.reply = functools.partial(versioned, "2")
            error = (await ask(backend)[0]).error
            assert isinstance(error, ProtocolError)
            assert "another 'toy' than this gateway: version '2', not version '1'" in str(error)
            # Another server of the same gateway, which has been updated already.
            updated = JsonServer()
            updated.metadata = {**updated.metadata, "versions": ["2"]}
            with pytest.raises(BackendError, match="version '2', not version '1'"):
                async with connected(updated, versions=digests, start_timeout_s=0.2):
                    pass

    asyncio.run(run())


@pytest.mark.parametrize(
    ("status", "after", "seconds"),
    [
        (503, "7", 7.0),
        (429, "0", 0.0),
        (503, None, None),
        (429, "soon", None),
        (503, "9" * 40, None),
        (503, "Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_a_server_without_room_says_when_to_ask_again(status, after, seconds):
    async def run():
        async with connected() as (server, backend):
            headers = {} if after is None else {"Retry-After": after}

            async def reply(message):
                return await server.json({"error": "full"}, status, **headers)

            server.reply = reply
            error = (await ask(backend)[0]).error
            assert isinstance(error, BackendBusyError)
            assert error.retry_after_s == seconds
            assert backend.ready

    asyncio.run(run())


def test_no_message_holds_the_password_of_a_url():
    async def run():
        url = "http://admin:hunter2@127.0.0.1:9"
        backend = OipBackend("remote-0", url, "remote", CARD, start_timeout_s=0.05, poll_s=0.01)
        with pytest.raises(BackendError, match=r"http://127\.0\.0\.1:9/v2") as refusal:
            await backend.start()
        await backend.close()
        assert "hunter2" not in str(refusal.value)

    asyncio.run(run())


def test_a_pinned_version_is_asked_for_and_checked():
    async def run():
        server = JsonServer()
        server.metadata = {**server.metadata, "versions": ["7"]}
        with pytest.raises(BackendError, match="version '7', not version '8'"):
            async with connected(server, versions=ModelDigests({"toy": "version:8"}), start_timeout_s=0.2):
                pass

    asyncio.run(run())


def test_a_json_only_server_does_tasks():
    async def run():
        async with connected() as (_, backend):
            assert backend.ready
            replies = await asyncio.gather(*[ask(backend)[0] for _ in range(20)])
            for reply in replies:
                assert reply.error is None
                assert reply.outputs.dtype == np.float32
                assert reply.outputs.tolist() == SCORES

    asyncio.run(run())


class EchoGateway:
    """The least that evenkeel's own front end needs; `hold` keeps every item open."""

    ready, draining, hold, factor = True, False, False, 2.0

    def __init__(self) -> None:
        self.tickets = 0
        self.cancelled: list[int] = []
        self.options: list = []

    def submit(self, array, on_outcome, options=None, key=None) -> int:
        self.options.append(options)
        scores = np.array([0, array.mean(), self.factor * array.mean()], np.float32)
        if not self.hold:
            asyncio.get_running_loop().call_soon(on_outcome, Outcome(Answer(scores, "exact", 1.0), None, 0.0))
        self.tickets += 1
        return self.tickets - 1

    def check_room(self, count: int) -> None:
        """There is always room."""

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)

    def start_draining(self) -> None:
        self.draining = True


@contextlib.asynccontextmanager
async def connected_to_our_own(card: ModelCard = CARD, digest: str = "", **options):
    gateway, stop, port = EchoGateway(), asyncio.Event(), asyncio.get_running_loop().create_future()
    app = App(ServedModels([ServedModel("remote", "1", card, gateway, digest=digest)]), metrics=bytes)
    serve = asyncio.create_task(
        run_server(app, "127.0.0.1", 0, stop=stop, grace_s=0, drain_s=0.0, on_started=port.set_result)
    )
    options = {"poll_s": 0.01, **options}
    backend = OipBackend("own", f"http://127.0.0.1:{await port}", "remote", card, version="1", **options)
    try:
        await backend.start()
        yield gateway, backend, stop
    finally:
        await backend.close()
        stop.set()
        await serve


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_our_own_server_does_tasks_in_binary(layout, datatype):
    async def run():
        card = replace(CARD, layout=layout, datatype=datatype)
        rows = ROWS.astype("u1" if datatype == "UINT8" else "f4")
        rows = rows if layout == "NHWC" else rows.transpose(0, 3, 1, 2)
        async with connected_to_our_own(card) as (_, backend, _):
            assert (await ask(backend, rows)[0]).outputs.tolist() == SCORES

    asyncio.run(run())


def test_another_gateway_is_asked_for_exact_answers_and_nothing_else_is_passed_off_as_a_replicas():
    async def run():
        async with connected_to_our_own() as (gateway, backend, _):
            assert (await ask(backend)[0]).error is None
            assert [options.exact for options in gateway.options] == [True] * 3

    asyncio.run(run())


def test_another_gateway_with_another_model_is_refused():
    async def run():
        digests = ModelDigests({"toy": "onnx:aa"})
        async with connected_to_our_own(digest="onnx:aa", versions=digests) as (_, backend, _):
            assert backend.ready
        with pytest.raises(BackendError, match="another 'toy' than this gateway: digest bb, not digest aa"):
            async with connected_to_our_own(digest="onnx:bb", versions=digests, start_timeout_s=0.2):
                pass

    asyncio.run(run())


def test_cancelling_closes_the_request_where_the_server_then_gives_up():
    async def run():
        async with connected_to_our_own() as (gateway, backend, _):
            gateway.hold = True
            future, ticket = ask(backend)
            await until(lambda: gateway.tickets == 3)
            backend.cancel(ticket)
            reply = await future
            assert reply.cancelled
            await until(lambda: sorted(gateway.cancelled) == [0, 1, 2])

    asyncio.run(run())


def test_a_server_that_shuts_down_is_not_ready():
    async def run():
        async with connected_to_our_own() as (_, backend, stop):
            changes = []
            backend.on_change = lambda: changes.append(backend.ready)
            stop.set()
            await until(lambda: changes == [False])

    asyncio.run(run())


def test_cancelling_leaves_a_server_that_works_on_its_slot():
    async def run():
        async with connected(connections=1) as (server, backend):
            server.gate.clear()
            first, ticket = ask(backend)
            await until(lambda: server.working == 1)
            second, waiting = ask(backend)
            backend.cancel(ticket)
            backend.cancel(waiting)
            backend.cancel(999)
            reply = await second
            assert reply.cancelled
            assert isinstance(reply.error, BackendError)
            assert not first.done()
            server.gate.set()
            assert (await first).outputs.tolist() == SCORES
            backend.cancel(ticket)
            assert server.asked == 1

    asyncio.run(run())


def test_no_more_requests_are_open_than_connections():
    async def run():
        async with connected(connections=3) as (server, backend):
            assert not backend.serial
            server.gate.clear()
            futures = [ask(backend)[0] for _ in range(10)]
            await until(lambda: server.working == 3)
            server.gate.set()
            replies = await asyncio.gather(*futures)
            assert all(reply.error is None for reply in replies)
            assert server.max_working == 3

    asyncio.run(run())


def test_closing_replies_to_everything_that_is_open():
    async def run():
        async with connected(connections=2) as (server, backend):
            server.gate.clear()
            futures = [ask(backend)[0] for _ in range(5)]
            await until(lambda: server.working == 2)
            await backend.close()
            server.gate.set()
            for reply in await asyncio.gather(*futures):
                assert isinstance(reply.error, BackendLostError)
            assert not backend.ready
            late, _ = ask(backend)
            assert isinstance((await late).error, BackendLostError)

    asyncio.run(run())


@pytest.mark.parametrize("connections", [1, 4])
def test_a_task_closed_as_it_is_sent_is_replied_to(connections):
    async def run():
        async with connected(connections=connections) as (_, backend):
            futures = [ask(backend)[0] for _ in range(4)]  # over a kept connection, over new ones, or not sent yet
            await backend.close()
            for reply in await asyncio.gather(*futures):
                assert isinstance(reply.error, BackendLostError)

    asyncio.run(run())


def test_a_server_that_takes_too_long_is_an_error_and_frees_the_slot():
    async def run():
        async with connected(timeout_s=0.05, connections=1) as (server, backend):
            server.gate.clear()
            assert "no reply within 0.05 s" in str((await ask(backend)[0]).error)
            server.gate.set()
            assert (await ask(backend)[0]).error is None

    asyncio.run(run())


def test_readiness_follows_the_server():
    async def run():
        async with connected() as (server, backend):
            changes = []
            backend.on_change = lambda: changes.append(backend.ready)
            server.ready = False
            await until(lambda: changes == [False])
            server.ready = True
            await until(lambda: changes == [False, True])

    asyncio.run(run())


def test_a_server_that_dies_is_lost_and_found_again():
    async def run():
        async with connected(poll_s=60) as (server, backend):
            changes = []
            backend.on_change = lambda: changes.append(backend.ready)
            server.gate.clear()
            future, _ = ask(backend)
            await until(lambda: server.working == 1)
            await server.die()
            assert isinstance((await future).error, BackendLostError)
            assert changes == [False]
            await server.start()
            backend.suspect()
            await until(lambda: backend.ready)
            assert (await ask(backend)[0]).outputs.tolist() == SCORES

    asyncio.run(run())


@pytest.mark.parametrize("kept", [False, True])
def test_a_task_that_ends_its_connection_is_sent_once_or_where_that_was_a_kept_one_twice(kept):
    async def run():
        script = JsonServer()
        script.keeps = kept
        async with connected(script, poll_s=60) as (server, backend):

            async def hang_up(message):
                for transport in server.transports:
                    transport.abort()
                return web.Response()

            assert (await ask(backend)[0]).error is None
            server.asked = 0
            server.reply = hang_up
            assert isinstance((await ask(backend)[0]).error, BackendLostError)
            assert server.asked == 1 + kept

    asyncio.run(run())


class SnappyServer:
    """A server that closes each connection after a few replies, without a word; `how` it does so."""

    def __init__(self, how):
        self.how = how
        self.few = 4 if how == "within a reply" else 2  # starting takes three, none of which is sent twice then
        self.replies = 0
        self.seen = 0  # requests that came over a connection after its end

    async def talk(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            for _ in range(self.few):
                await self.answer(reader, writer)
            if self.how == "on the next request":
                await reader.readuntil(b"\r\n\r\n")
                self.seen += 1
            if self.how == "within a reply":
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nconte")
                await writer.drain()
        writer.close()

    async def answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"content-length: " in head:
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        output = {"name": "scores", "datatype": "FP32", "shape": [3, 3], "data": SCORES}
        reply = {"model_name": "remote", "outputs": [output]} if head.startswith(b"post") else {"inputs": []}
        text = orjson.dumps(reply)
        self.replies += 1
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
        await writer.drain()


@contextlib.asynccontextmanager
async def snappy(how, **options):
    script = SnappyServer(how)
    server = await asyncio.start_server(script.talk, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    backend = OipBackend("remote-0", url, "remote", CARD, poll_s=60, **options)
    try:
        await backend.start()
        yield script, backend
    finally:
        await backend.close()
        server.close()


@pytest.mark.parametrize("how", ["at once", "on the next request"])
@pytest.mark.parametrize("connections", [1, 4])
def test_a_server_that_closes_kept_connections_unannounced_loses_no_task(how, connections):
    async def run():
        async with snappy(how, connections=connections) as (script, backend):
            replies = await asyncio.gather(*(ask(backend)[0] for _ in range(60)))
            assert [reply.error for reply in replies] == [None] * 60
            assert all(reply.outputs.tolist() == SCORES for reply in replies)
            assert script.seen > 0 or how == "at once"
            assert backend.ready

    asyncio.run(run())


def test_a_connection_that_ends_within_a_reply_is_lost_and_nothing_is_sent_twice():
    async def run():
        async with snappy("within a reply", connections=1) as (_, backend):
            replies = [await ask(backend)[0] for _ in range(4)]
            lost = [reply for reply in replies if reply.error]
            assert lost
            assert all(isinstance(reply.error, BackendLostError) and reply.began for reply in lost)

    asyncio.run(run())


def test_a_task_that_no_connection_could_be_made_for_had_not_begun():
    async def run():
        async with connected(poll_s=60) as (server, backend):
            await server.die()
            reply = await ask(backend)[0]
            assert isinstance(reply.error, BackendLostError)
            assert not reply.began

    asyncio.run(run())


def test_a_server_that_never_comes_is_an_error_that_says_why():
    async def run():
        backend = OipBackend("remote-0", "http://127.0.0.1:1", "remote", CARD, start_timeout_s=0.1, poll_s=0.01)
        future, _ = ask(backend)
        assert isinstance((await future).error, BackendLostError)
        with pytest.raises(BackendError, match=r"was not ready within 0.1 s: .*Connect"):
            await backend.start()
        assert not backend.ready
        await backend.close()

    asyncio.run(run())


IMAGES = {"name": "images", "datatype": "UINT8", "shape": [-1, 4, 5, 3]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"inputs": [{**IMAGES, "datatype": "FP32"}]}, "takes 'FP32', but the model card says UINT8"),
        ({"inputs": [{**IMAGES, "shape": [-1, 3, 4, 5]}]}, r"has shape \[-1, 3, 4, 5\], but the model card says"),
        ({"inputs": [{"name": "a"}, {"name": "b"}]}, "none is called 'images' as the model card says"),
        ({"outputs": [{"name": "a"}, {"name": "b"}]}, "none is called 'scores' as the model card says"),
    ],
)
def test_a_model_that_is_not_the_cards_is_refused(metadata, message):
    async def run():
        server = JsonServer()
        server.metadata.update(metadata)
        with pytest.raises(BackendError, match=message):
            async with connected(server, start_timeout_s=0.2):
                pass

    asyncio.run(run())


def test_a_single_input_and_output_may_have_other_names():
    async def run():
        server = JsonServer()
        server.metadata.update(inputs=[{**IMAGES, "name": "x"}], outputs=[{"name": "y"}])
        names = []

        async def reply(message):
            names.append((message["inputs"][0]["name"], message["outputs"][0]["name"]))
            output = {"name": "y", "datatype": "FP64", "shape": [3, 3], "data": [0.5] * 9}
            return await server.json({"model_name": "remote", "outputs": [output]})

        server.reply = reply
        async with connected(server) as (_, backend):
            assert (await ask(backend)[0]).outputs.tolist() == [[0.5] * 3] * 3
        assert names == [("x", "y")]

    asyncio.run(run())


def output(**fields):
    given = {"name": "scores", "datatype": "FP32", "shape": [3, 3], "data": [1] * 9, **fields}
    return {"model_name": "remote", "outputs": [given]}


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        ({"message": output(shape=[1, 9])}, ProtocolError, r"has shape \[1, 9\], expected \[3, 3\]"),
        ({"message": output(datatype="INT32")}, ProtocolError, "has datatype INT32, expected FP32"),
        ({"message": output(name="other")}, ProtocolError, "expected output 'scores', found 'other'"),
        ({"message": output(data=[None] * 9)}, ProtocolError, "response is malformed: .*found null"),
        ({"message": output(data=[1] * 8)}, ProtocolError, "response is malformed"),
        ({"message": {"outputs": 3}}, ProtocolError, "response is malformed"),
        ({"message": output(shape=[0, 2**63], data=[])}, ProtocolError, "no tensor can have the shape"),
        ({"message": output(datatype="FP64", data=[1e300] * 9)}, ProtocolError, "not finite"),
        ({"message": {"outputs": [{}] * 65}}, ProtocolError, "holds 65 entries"),
        ({"message": {"pad": "x" * (2 << 20)}}, ProtocolError, "a reply has more than 1049152 bytes"),
        (
            dict(message=output(), **{"Content-Encoding": "gzip"}),
            ProtocolError,
            "encoded as 'gzip', which was not requested",
        ),
        ({"message": {"error": {"error": "x"}}, "status": 500}, BackendError, "answered 500: "),
        (dict(message=output(), **{"Inference-Header-Content-Length": "x"}), ProtocolError, "Content-Length is 'x'"),
        ({"message": {"error": "no such thing"}, "status": 404}, BackendError, "answered 404: no such thing"),
        (
            dict(message={"error": "full"}, status=503, **{"Retry-After": "7"}),
            BackendBusyError,
            r"answered 503: full \(retry after 7 s\)",
        ),
        ({"message": {"detail": [{"msg": "bad"}]}, "status": 422}, TaskRefusedError, "answered 422: .*bad"),
        ({"message": "", "status": 301, "Location": "/elsewhere"}, BackendError, "answered 301"),
    ],
)
def test_a_reply_that_is_not_what_was_agreed_is_an_error(reply, kind, message):
    async def run():
        async with connected() as (server, backend):
            server.reply = lambda request: server.json(**reply)
            found = await ask(backend)[0]
            assert type(found.error) is kind
            assert backend.ready
            return str(found.error)

    text = asyncio.run(run())
    assert text.startswith("remote-0: ")
    assert re.search(message, text)


def test_a_long_reply_is_read_aside():
    card = replace(CARD, classes=tuple(str(number) for number in range(20_000)))
    data = [[float(number) + 0.123456789 for number in range(20_000)]] * 3

    async def run():
        async with connected(card=card) as (server, backend):
            server.reply = lambda request: server.json(output(shape=[3, 20_000], data=data))
            return await ask(backend)[0]

    reply = asyncio.run(run())
    assert reply.error is None
    assert np.array_equal(reply.outputs, np.float32(data))


def test_a_long_error_is_shown_in_part_and_not_taken_apart():
    async def run():
        async with connected() as (server, backend):
            server.reply = lambda request: server.json({"error": "x", "rest": [{}] * 40_000}, 500)
            return str((await ask(backend)[0]).error)

    text = asyncio.run(run())
    assert "answered 500" in text
    assert len(text) < 400


def test_infinity_from_a_binary_server_is_a_protocol_error():
    async def run():
        async with connected_to_our_own() as (gateway, backend, _):
            gateway.factor = np.inf
            assert "not finite" in str((await ask(backend)[0]).error)

    asyncio.run(run())


def test_another_model_is_refused():
    async def run():
        async with connected() as (_, backend):
            assert "runs 'toy', not 'cat'" in str((await ask(backend, model="cat")[0]).error)

    asyncio.run(run())


def test_a_url_without_a_scheme_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="must begin with http"):
        OipBackend("remote-0", "localhost:8000", "remote", CARD)


def test_a_server_that_says_its_range_hears_that_dark_pixels_are_dark():
    async def run():
        server = JsonServer()
        server.metadata["inputs"] = [{"name": "images", "parameters": {"minimum": 0, "maximum": 255}}]
        heard = []

        async def scores(message):
            heard.append(message["inputs"][0].get("parameters"))
            return await server.scores(message)

        server.reply = scores
        async with connected(server) as (_, backend):
            assert (await ask(backend)[0]).error is None
        assert heard == [{"maximum": 255}]

    asyncio.run(run())


def binary_reply(values, shape=(1, 3), name="scores"):
    tensor = Tensor(name, "FP32", shape, np.array(values, np.float32).reshape(shape))
    return write_response(InferResponse("remote", [tensor], "1"), [True])


@pytest.fixture
def contract():
    return Contract(CARD, "images", "scores", True, True)


def test_a_request_of_a_known_shape_is_what_it_was_the_first_time(contract):
    for rows in (ROWS, ROWS[:1], ROWS + 1, ROWS[:1], np.asfortranarray(ROWS)):
        again, fresh = contract.write(rows), Contract(CARD, "images", "scores", True, True).write(rows)
        assert again == fresh
        assert parse_request(*again).inputs[0].data.tolist() == rows.tolist()
    assert len(contract._written) == 2


def test_a_reply_of_a_known_head_is_checked_as_the_first_one_was(contract):
    for values in ([1, 2, 3], [4, 5, 6], [7, 8, 9]):
        assert contract.read(*binary_reply(values), 1).tolist() == [values]
    assert len(contract._agreed) == 1
    body, length = binary_reply([1, np.nan, 3])
    with pytest.raises(ProtocolError, match="'scores' holds values that are not finite"):
        contract.read(body, length, 1)
    body, length = binary_reply([1, 2, 3])
    for wrong in ((body[:-1], length, 1), (body + b"x", length, 1), (body, length - 1, 1), (body, length + 4, 1)):
        with pytest.raises(ProtocolError):
            contract.read(*wrong)
    with pytest.raises(ProtocolError, match="has shape"):
        contract.read(body, length, 2)
    with pytest.raises(ProtocolError):
        contract.read(body[:length], length, 1)


def test_heads_that_are_never_the_same_take_up_no_memory(contract):
    for number in range(300):
        message = {"id": f"{number}", "outputs": [{**SCORES_ENTRY, "shape": [1, 3]}]}
        text = orjson.dumps(message)
        assert contract.read(text + bytes(12), len(text), 1).tolist() == [[0, 0, 0]]
        assert len(contract._agreed) <= 64
    text = orjson.dumps({**message, "parameters": {"pad": "x" * 5000}})
    before = dict(contract._agreed)
    contract.read(text + bytes(12), len(text), 1)
    assert contract._agreed == before
    for rows in range(1, 100):
        contract.write(np.zeros((rows, 4, 5, 3), np.uint8))
    assert len(contract._written) == 64


SCORES_ENTRY = {"name": "scores", "datatype": "FP32", "parameters": {"binary_data_size": 12}}


def test_values_in_json_before_others_in_binary_are_read_each_time(contract):
    for values in ([1, 2, 3], [4, 5, 6]):
        label = {"name": "label", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}
        text = orjson.dumps({"outputs": [{**SCORES_ENTRY, "shape": [1, 3]}, label]})
        data = np.array(values, np.float32).tobytes() + b"\1\0\0\0x"
        assert contract.read(text + data, len(text), 1).tolist() == [values]
    assert not contract._agreed
