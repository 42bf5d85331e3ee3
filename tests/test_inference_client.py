"""The client against the real HTTP server, and against one that misbehaves."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from evenkeel.client import AsyncInferenceClient, InferenceClient
from evenkeel.coding.code import Answer
from evenkeel.errors import (
    BackendError,
    BackendLostError,
    ConfigurationError,
    DeadlineError,
    EvenkeelError,
    OverloadedError,
    ProtocolError,
    RequestError,
    TooLargeError,
    UnknownModelError,
)
from evenkeel.promises.promise import Promise
from evenkeel.serving.gateway.gateway import Outcome
from http_helpers import FakeGateway, Running, file_of, images, serving


@contextmanager
def client_of(running: Running, model: str = "toy") -> Iterator[InferenceClient]:
    with InferenceClient(f"http://{running.address}", model) as client:
        yield client


def test_pixels_files_and_bytes_are_classified(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(file_of(images()[0]))
    with serving() as running, client_of(running) as client:
        answer = client.classify(images()[0])
        assert (answer.label, answer.source, answer.path, answer.certificate) == ("bright", "exact", "data centre", "")
        assert answer.scores.tolist() == [0, 7, 14]
        assert answer.promise is None
        assert answer.latency_ms is not None
        for image in (tmp_path / "one.png", str(tmp_path / "one.png"), file_of(images()[0])):
            assert client.classify(image).scores.tolist() == [0, 7, 14]
        assert [one.scores[1] for one in client.classify_all(np.stack([images(1, 3)[0], images(1, 9)[0]]))] == [3, 9]
        assert len(client.classify_all([images()[0]] * 3)) == 3
        assert client.ready()


def test_needs_travel_and_the_answer_says_what_is_promised() -> None:
    gateway = FakeGateway(hold=True)

    def answered(outcome: Outcome) -> None:
        gateway.submitted[-1].on_outcome(outcome)

    with serving(gateway, promised=True) as running, client_of(running) as client:
        results: list[Any] = []

        def ask() -> None:
            results.append(
                client.classify(
                    images()[0], min_accuracy=0.93, guarantee=0.9, max_cost=0.5, on_miss="degrade", timeout=9
                )
            )

        for source, certificate in (("edge", "name"), ("degraded", "")):
            thread = threading.Thread(target=ask)
            before = len(gateway.submitted)
            thread.start()
            while len(gateway.submitted) == before:
                running.call(lambda: None)
            answer = Answer(np.array([0, 1, 0], np.float32), source, 0.25)  # type: ignore[arg-type]
            running.call(lambda answer=answer, name=certificate: answered(Outcome(answer, None, 0.1, name)))
            thread.join()
    options = gateway.submitted[0].options
    promise = Promise("min_accuracy", 0.93, 0.9)
    assert (options.promise, options.max_cost, options.degrade) == (promise, 0.5, True)
    assert options.timeout_s == pytest.approx(8.1, abs=0.5)  # a tenth is left for the way back
    first, second = results
    assert (first.label, first.path, first.certificate, first.promise) == ("dim", "edge", "name", promise)
    assert (first.confidence, first.latency_ms) == (pytest.approx(0.25), pytest.approx(100))
    assert (second.path, second.certificate, second.promise) == ("degraded", "", None)


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"min_accuracy": 1.5}, "min_accuracy: must be a number between 0 and 1, found 1.5"),
        ({"min_accuracy": 0.9, "min_agreement": 0.9}, "contradict each other"),
        ({"timeout": 0}, "timeout: must be from"),
        ({"min_acuracy": 0.9}, "min_acuracy: is no need; known are min_accuracy"),
        ({"on_miss": "panic"}, "'on_miss' must be degrade or reject"),  # the server's words
        ({"guarantee": 0.9}, "'guarantee' needs a promise"),
        ({"max_cost": -1}, "'max_cost' must be a number"),
    ],
)
def test_needs_that_make_no_sense_are_refused(needs: dict[str, Any], words: str) -> None:
    with serving() as running, client_of(running) as client, pytest.raises(RequestError, match=words):
        client.classify(images()[0], **needs)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "no images"),
        ("frog.png", "give one alone to classify"),
        (["/nowhere/frog.png"], "/nowhere/frog.png cannot be read: No such file"),
        ([images()[0], b"file"], "not both in one request"),
        ([images()[0], images()[0][:2]], "of one shape"),
        ([np.zeros((4, 5, 3), "U1")], "no arrays of numbers"),
        ([np.zeros((4, 5), np.uint8)], r"found \[4, 5\]"),
        ([np.zeros((9, 9, 3), np.uint8)], r"expected \[n, 4, 5, 3\]"),  # the server's words
        ([b"GIF but none"], "image"),
    ],
)  # fmt: skip
def test_images_that_are_none_are_refused(given: Any, words: str) -> None:
    with serving() as running, client_of(running) as client, pytest.raises(RequestError, match=words):
        client.classify_all(given)


def test_errors_of_the_server_come_as_those_of_the_tree_with_its_words() -> None:
    with serving() as running:
        with client_of(running, "tou") as client, pytest.raises(UnknownModelError, match="this server serves 'toy'"):
            client.classify(images()[0])
        with client_of(running) as client:
            errors: list[EvenkeelError] = [
                DeadlineError("too late"), TooLargeError("too many"), RequestError("not so"), BackendError("broken"),
            ]  # fmt: skip
            for error in errors:
                running.gateway.refuse = lambda number, error=error: error
                with pytest.raises(type(error), match=str(error) if type(error) is not BackendError else "502"):
                    client.classify(images()[0])


def test_a_full_server_is_asked_again_when_it_says_as_long_as_the_timeout_lasts() -> None:
    gateway = FakeGateway()
    refusals = iter([OverloadedError("full", 0.0), None])
    gateway.refuse = lambda number: next(refusals)
    with serving(gateway) as running, client_of(running) as client:
        assert client.classify(images()[0], timeout=20).label == "bright"
        gateway.refuse = lambda number: OverloadedError("full; try again later", 7.0)
        with pytest.raises(OverloadedError, match="full; try again later") as refused:
            client.classify(images()[0], timeout=2)
        assert refused.value.retry_after_s == 7


def test_no_answer_in_time_is_a_deadline_error() -> None:
    late = pytest.raises(DeadlineError, match=r"no answer of 'toy' within 0\.2 s")
    with serving(FakeGateway(hold=True)) as running, client_of(running) as client, late:
        client.classify(images()[0], timeout=0.2)


def test_asyncio_has_many_requests_under_way() -> None:
    async def run(address: str) -> list[float]:
        async with AsyncInferenceClient(f"http://{address}", "toy") as client:
            return [
                one.scores[1] for one in await asyncio.gather(*(client.classify(images(1, i)[0]) for i in range(40)))
            ]

    with serving() as running:
        assert asyncio.run(run(running.address)) == list(range(40))


def test_a_server_that_is_not_there_and_a_url_that_is_none() -> None:
    with (
        InferenceClient("http://127.0.0.1:9", "toy") as client,
        pytest.raises(BackendLostError, match="cannot connect"),
    ):
        client.classify(images()[0])
    with pytest.raises(BackendLostError, match="was closed"):
        client.classify(images()[0])
    with pytest.raises(ConfigurationError, match="url must begin with"):
        InferenceClient("127.0.0.1:8000", "toy")


@contextmanager
def scripted(infer: bytes, metadata: object) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(orjson.dumps(metadata))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.answer(infer)

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        log_message: Callable[..., None] = lambda *_: None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


METADATA = {"inputs": [{"name": "images"}], "outputs": [{"name": "scores", "shape": [-1, 3]}]}


def outputs(**changes: Any) -> bytes:
    columns = {
        "scores": ("FP32", [1, 3], [0.0, 1.0, 2.0]), "label": ("BYTES", [1], ["dim"]),
        "source": ("BYTES", [1], ["exact"]), "confidence": ("FP32", [1], [0.5]), **changes,
    }  # fmt: skip
    listed = [
        {"name": name, "datatype": one[0], "shape": one[1], "data": one[2]} for name, one in columns.items() if one
    ]
    return orjson.dumps({"model_name": "toy", "outputs": listed})


@pytest.mark.parametrize(
    ("infer", "metadata", "words"),
    [
        (b"", {}, "no output 'scores'"),
        (b"", {**METADATA, "outputs": [{"name": "boxes", "shape": [-1, 4]}]}, "no output 'scores'"),
        (b"", {**METADATA, "inputs": []}, "takes 0 inputs"),
        (b"{", METADATA, "malformed"),
        (b"x" * (2 << 20), METADATA, "more than"),
        (outputs(label=None), METADATA, "lacks label"),
        (outputs(label=("FP32", [1], [1.0])), METADATA, "'label' is FP32"),
        (outputs(scores=("FP32", [3], [0.0, 1.0, 2.0])), METADATA, r"'scores' is FP32 \[3\] for 1 images"),
        (outputs(source=("BYTES", [2], ["a", "b"])), METADATA, r"'source' is BYTES \[2\] for 1 images"),
    ],
)
def test_what_is_no_answer_is_refused(infer: bytes, metadata: object, words: str) -> None:
    with (
        scripted(infer, metadata) as url,
        InferenceClient(url, "toy") as client,
        pytest.raises(ProtocolError, match=words),
    ):
        client.classify(images()[0])


def test_a_plain_answer_is_read() -> None:
    with scripted(outputs(), METADATA) as url, InferenceClient(url, "toy") as client:
        answer = client.classify(images()[0])
        assert (answer.label, answer.path, answer.latency_ms) == ("dim", "data centre", None)
