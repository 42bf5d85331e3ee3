"""Real sockets: what is no HTTP, clients that go away, Unix sockets, and a shutdown that loses nothing."""

import asyncio
import gzip
import http.client
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings, strategies as st

from evenkeel.errors import ConfigurationError
from evenkeel.oip import write_request
from evenkeel.serving.http import server as server_module
from evenkeel.serving.http.server import _spare_descriptors, run_server
from http_helpers import INFER, FakeGateway, images, make_app, serving, tensor_of

BODY, LENGTH = write_request([tensor_of(images())], binary=True)
HEADERS = {"Inference-Header-Content-Length": str(LENGTH)}


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def talk(port: int, sent: bytes, *, end: bool = True) -> bytes:
    """All that the server answers until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        if end:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


def post(port: int, body: bytes = BODY, headers: dict[str, str] | None = None) -> tuple[int, dict, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", INFER, body, HEADERS if headers is None else headers)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), orjson.loads(response.read())
    finally:
        connection.close()


def wait_until(holds) -> None:
    """Wait for another thread to do its part."""
    done = threading.Event()
    for _ in range(1000):
        if holds():
            return
        done.wait(0.01)
    raise AssertionError("it did not happen within 10 s")


def test_what_is_no_http_is_answered_in_json(server):
    head, _, body = talk(server.port, b"nonsense\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert orjson.loads(body) == {"error": "Invalid HTTP request received."}
    assert post(server.port)[0] == 200


def test_a_content_length_that_is_too_short_is_a_clear_error(server):
    request = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY) - 9}\r\n"
    request += f"Inference-Header-Content-Length: {LENGTH}\r\nConnection: close\r\n\r\n"
    head, _, body = talk(server.port, request.encode() + BODY, end=False).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert "binary_data_size is 60, but only 51 bytes" in orjson.loads(body)["error"]


def test_a_body_that_stops_half_way_is_408():
    with serving(body_timeout_s=0.05) as running:
        request = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nonly this"
        head, _, body = talk(running.port, request.encode(), end=False).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert "the whole body did not come in time" in orjson.loads(body)["error"]


def test_a_chunked_body_is_taken_and_limited(server):
    request = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n"
    request += f"Inference-Header-Content-Length: {LENGTH}\r\n\r\n"
    first, second = BODY[:50], BODY[50:]
    body = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(first), first, len(second), second)
    assert talk(server.port, request.encode() + body, end=False).startswith(b"HTTP/1.1 200 ")
    with serving(max_body_bytes=100) as running:
        assert talk(running.port, request.encode() + body, end=False).startswith(b"HTTP/1.1 413 ")


def test_a_connection_is_kept_and_pipelining_works(server):
    request = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n"
    request += f"Inference-Header-Content-Length: {LENGTH}\r\n"
    again, last = (request + "\r\n").encode() + BODY, (request + "Connection: close\r\n\r\n").encode() + BODY
    assert talk(server.port, again * 3 + last, end=False).count(b"HTTP/1.1 200 ") == 4


def test_a_client_that_goes_away_frees_its_slot():
    gateway = FakeGateway(hold=True)
    with serving(gateway) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        connection.request("POST", INFER, BODY, HEADERS)
        wait_until(lambda: gateway.open)
        connection.close()
        wait_until(lambda: gateway.cancelled == [0])
        wait_until(lambda: running.app.in_flight == 0)
        running.call(gateway.release)
        assert post(running.port)[0] == 200


def test_a_drain_answers_what_is_in_flight_and_then_ends():
    gateway = FakeGateway(hold=True)
    answers = []
    with serving(gateway) as running:
        asking = threading.Thread(target=lambda: answers.append(post(running.port)))
        asking.start()
        wait_until(lambda: gateway.open)
        running.loop.call_soon_threadsafe(running.stop.set)
        wait_until(lambda: gateway.draining)
        assert not answers
        running.call(gateway.release)
        asking.join(10)
    status, headers, body = answers[0]
    assert status == 200
    assert headers["connection"] == "close"
    assert body["outputs"][1]["data"] == ["bright"]
    with pytest.raises(ConnectionRefusedError):
        post(running.port)


def test_a_drain_ends_when_its_patience_does():
    gateway = FakeGateway(hold=True)
    with serving(gateway, drain_s=0.05) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        connection.request("POST", INFER, BODY, HEADERS)
        wait_until(lambda: gateway.open)
        running.loop.call_soon_threadsafe(running.stop.set)
        response = connection.getresponse()
        assert response.status == 503
        assert orjson.loads(response.read())["error"] == "the server shut down before the answer was there"
        connection.close()
    assert gateway.cancelled == [0]


def test_a_kept_connection_is_served_through_the_grace_and_then_closed():
    gateway = FakeGateway()
    with serving(gateway, grace_s=0.5) as running:
        used = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        idle = socket.create_connection(("127.0.0.1", running.port), timeout=10)
        idle.sendall(b"\r\n")
        used.request("POST", INFER, BODY, HEADERS)
        assert used.getresponse().read()
        running.loop.call_soon_threadsafe(running.stop.set)
        wait_until(lambda: gateway.draining)
        used.request("POST", INFER, BODY, HEADERS)
        response = used.getresponse()
        assert (response.status, response.headers["connection"]) == (200, "close")
        assert response.read()
        assert idle.recv(1) == b""
        used.close()
        idle.close()


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_long_answer_is_whole(server, encoding):
    body, length = write_request([tensor_of(images(4000))], binary=True)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    headers = {"Inference-Header-Content-Length": str(length), "Accept-Encoding": encoding}
    connection.request("POST", INFER, body, headers)
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if encoding == "gzip":
        assert response.headers["content-encoding"] == "gzip"
        answer = gzip.decompress(answer)
    assert len(answer) > 1 << 16
    assert orjson.loads(answer)["outputs"][1]["data"] == ["bright"] * 4000


def test_a_client_sees_why_the_body_that_it_goes_on_sending_is_refused():
    with serving(max_body_bytes=1000) as running:
        status, headers, message = post(running.port, b"x" * 20_000_000)
        assert (status, headers["connection"]) == (413, "close")
        assert "more than 1000 bytes" in message["error"]


SCRIPT = """
import asyncio, sys
sys.path.insert(0, {helpers!r})
from http_helpers import FakeGateway, make_app
from evenkeel.serving.http import server as server_module
from evenkeel.serving.http.server import _spare_descriptors, run_server
gateway = FakeGateway(hold={hold})
async def main():
    app = make_app(gateway)
    await run_server(app, "127.0.0.1", 0, grace_s={grace}, on_started=lambda port: print(port, flush=True))
asyncio.run(main())
print("ended", flush=True)
"""


@pytest.fixture
def start_process():
    started = []

    def start(*, hold: bool, grace: float) -> tuple[subprocess.Popen, int]:
        script = SCRIPT.format(helpers=str(Path(__file__).parents[2] / "helpers"), hold=hold, grace=grace)
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_sigterm_drains_and_still_accepts_during_the_grace(start_process):
    process, port = start_process(hold=False, grace=1.0)
    assert post(port)[0] == 200
    process.send_signal(signal.SIGTERM)

    def is_draining() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/v2/health/ready")
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.status == 503

    wait_until(is_draining)
    status, headers, _ = post(port)
    assert (status, headers["connection"]) == (200, "close")
    assert process.wait(10) == 0
    assert process.stdout.read() == "ended\n"


def test_every_client_that_connected_before_the_end_is_answered(start_process):
    process, port = start_process(hold=False, grace=0.0)
    connections = []
    for number in range(600):  # a test process may have a thousand descriptors
        if number == 300:
            process.send_signal(signal.SIGTERM)
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            break
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        connections.append(connection)
    assert len(connections) >= 300
    for connection in connections:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()
    assert process.wait(20) == 0


def test_clients_that_connect_at_the_last_moment_are_answered(monkeypatch):
    connections = []
    plain = server_module._empty_queues

    async def late(sockets, abort):
        for _ in range(20):  # nothing is accepted while this runs
            connection = socket.create_connection(sockets[0].getsockname(), timeout=10)
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            connections.append(connection)
        await plain(sockets, abort)

    monkeypatch.setattr(server_module, "_empty_queues", late)
    with serving() as running:
        running.loop.call_soon_threadsafe(running.stop.set)
        wait_until(lambda: len(connections) == 20)
        for connection in connections:
            assert connection.recv(12) == b"HTTP/1.1 200"
            connection.close()


def test_who_is_shut_out_cannot_connect_and_who_waits_still_can_be_accepted():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        before = socket.create_connection(listening.getsockname(), timeout=10)
        server_module._shut_out(listening)
        with pytest.raises(TimeoutError):
            socket.create_connection(listening.getsockname(), timeout=0.1)
        accepted, _ = listening.accept()
        accepted.sendall(b"x")
        assert before.recv(1) == b"x"
        for connection in (before, accepted):
            connection.close()


@pytest.mark.parametrize(
    ("limits", "connections", "raised"),
    [
        ((1 << 20, 1 << 20), 1000, None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 1000, None),
        ((256, 256), 256 - 20 - 64, None),
        ((256, 1 << 20), 1000, 20 + 1000 + 128),
        ((256, resource.RLIM_INFINITY), 1000, 20 + 1000 + 128),
        ((256, 600), 600 - 20 - 128, 600),
        ((16, 16), 1, None),
    ],
)
def test_clients_leave_descriptors_for_everything_else(monkeypatch, caplog, limits, connections, raised):
    set_to = []
    monkeypatch.setattr(os, "listdir", lambda path: ["0"] * 20)
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: set_to.append(both))
    assert _spare_descriptors(1000) == connections
    assert set_to == ([] if raised is None else [(raised, limits[1])])
    assert ("limit of open files" in caplog.text) == (connections < 1000)


def test_a_second_signal_ends_at_once(start_process):
    process, port = start_process(hold=True, grace=60.0)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", INFER, BODY, HEADERS)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    connection.close()


def test_a_unix_socket_is_served_and_removed(tmp_path):
    path = tmp_path / "gateway.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()  # what a killed server leaves behind

    async def run():
        stop = asyncio.Event()
        started = asyncio.Event()
        ports = []
        serve = asyncio.create_task(
            run_server(
                make_app(),
                None,
                0,
                uds=path,
                grace_s=0,
                stop=stop,
                on_started=lambda port: (ports.append(port), started.set()),
            )
        )
        await started.wait()
        assert ports == [0]
        with pytest.raises(ConfigurationError, match=r"cannot listen on .*gateway\.sock: Address already in use"):
            await run_server(make_app(), None, 0, uds=path)
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        stop.set()
        await serve
        return answer

    assert asyncio.run(run()).endswith(b'{"live":true}')
    assert not os.path.exists(path)


def test_an_address_that_is_taken_is_a_configuration_error(server):
    with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{server.port}: Address already in use"):
        asyncio.run(run_server(make_app(), "127.0.0.1", server.port))
    with pytest.raises(ConfigurationError, match="nothing to listen on"):
        asyncio.run(run_server(make_app(), None, 0))


HEADER_VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
NOISE = st.dictionaries(
    st.sampled_from(["Inference-Header-Content-Length", "Content-Encoding", "Accept-Encoding", "Content-Type", "X"]),
    st.sampled_from(["0", "1", "17", str(LENGTH), "gzip", "deflate", "-1", "gzip;q=0, deflate"]) | HEADER_VALUES,
)
MUTATED = st.builds(
    lambda start, length, patch: BODY[:start] + patch + BODY[start + length :],
    st.integers(0, len(BODY)),
    st.integers(0, 40),
    st.binary(max_size=8),
)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=200) | MUTATED, NOISE)
def test_any_body_and_headers_get_an_answer(server, body, headers):
    status, _, message = post(server.port, body, {**HEADERS, **headers, "Accept-Encoding": "identity"})
    assert status == 200 or (400 <= status < 500 or status == 501)
    assert status == 200 or isinstance(message["error"], str)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300))
def test_any_bytes_on_the_wire_leave_the_server_serving(server, sent):
    answer = talk(server.port, sent)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert post(server.port)[0] == 200
