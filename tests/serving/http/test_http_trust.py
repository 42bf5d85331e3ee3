"""Keys and TLS in front of the HTTP server: whom it lets in, what strangers learn, and what a change of keys costs."""

import asyncio
import contextlib
import hashlib
import http.client
import socket
import ssl
import threading

import orjson
import pytest

from certificates import Authority
from evenkeel.oip import write_request
from evenkeel.serving.front.access import Access, Guard
from evenkeel.serving.http import server as server_module
from evenkeel.serving.http.connection import HttpServer
from evenkeel.serving.http.paths import path_of, right_for
from evenkeel.trust.keys import KeyRing
from evenkeel.trust.tls import ClientTls, ServerTls, client_contexts
from http_helpers import (
    INFER,
    FakeGateway,
    connect,
    images,
    make_app,
    read_responses,
    request_bytes,
    serving,
    tensor_of,
)

KEY, OTHER = "alices-secret-key-0001", "another-secret-key-002"
BODY, LENGTH = write_request([tensor_of(images())], binary=True)
HEADERS = {"Inference-Header-Content-Length": str(LENGTH)}
WITH_KEY = {"Authorization": f"Bearer {KEY}"}


def key_file(folder, *lines: str):
    file = folder / "keys"
    file.touch(0o600)
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def access(tmp_path):
    return Access(KeyRing(key_file(tmp_path, f"alice sha256:{hashlib.sha256(KEY.encode()).hexdigest()}")))


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = Authority(tmp_path_factory.mktemp("certificates"))
    made.sign("server")
    made.sign("camera")
    return made


@contextlib.contextmanager
def behind(access):
    """The application behind `access`; gives what tells the answer to some bytes, and the gateway."""
    gateway = FakeGateway()
    app = make_app(gateway)

    async def answers(*sent: bytes, methods=("POST",)):
        protocol, transport = connect(HttpServer(app, app.limits, app.headers, access=access))
        for part in sent:
            protocol.data_received(part)
        while not (found := read_responses(transport.sent, list(methods))):
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        return found, transport

    try:
        yield lambda *sent, **given: asyncio.run(answers(*sent, **given)), gateway
    finally:
        app.close()


def test_a_key_lets_in_and_its_holder_is_known(access):
    with behind(access) as (ask, gateway):
        (answer,), _ = ask(request_bytes(INFER, BODY, headers=HEADERS | WITH_KEY))
        assert answer.status == 200
        assert len(gateway.submitted) == 1
        assert access.admitted == {"alice": 1}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": f"Bearer {OTHER}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"bearer {hashlib.sha256(KEY.encode()).hexdigest()}"},
        {"Authorization": "Basic YWxpY2U6YWxpY2VzLXNlY3JldC1rZXktMDAwMQ=="},
        {"Authorization": f"Bearer {KEY}", "authorization": f"Bearer {KEY}"},
        {"Authorization": b"Bearer \xff\xfe\x80".decode("latin-1")},
    ],
)
def test_strangers_get_401_and_no_work_is_done(access, headers):
    with behind(access) as (ask, gateway):
        (answer,), transport = ask(request_bytes(INFER, BODY, headers=HEADERS | headers))
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith('Bearer realm="evenkeel"')
        assert answer.headers["connection"] == "close"
        assert not gateway.submitted
        assert KEY not in transport.sent.decode("latin-1")


def test_strangers_cannot_tell_what_is_served(access):
    with behind(access) as (ask, _):
        paths = (INFER, "/v2/models/toy", "/v2/models/other", "/v2/models/toy/versions/9/infer", "/v2", "/v2/none")
        said = set()
        for path in paths:
            for method in ("POST", "GET"):
                (answer,), _ = ask(request_bytes(path, b"{}", method=method), methods=(method,))
                said.add((answer.status, answer.headers["www-authenticate"], answer.body))
        assert len(said) == 1
        assert b"toy" not in said.pop()[2]


def test_a_stranger_is_refused_before_its_body_is_taken_or_asked_for(access):
    with behind(access) as (ask, _):
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 40}\r\nExpect: 100-continue\r\n\r\n".encode()
        (answer,), transport = ask(head, b"x" * 100_000)
        assert answer.status == 401
        assert b"100 Continue" not in transport.sent
        assert transport.eof


def test_what_is_sent_behind_a_refused_request_is_not_answered(access):
    with behind(access) as (ask, gateway):
        good = request_bytes(INFER, BODY, headers=HEADERS | WITH_KEY)
        found, transport = ask(request_bytes(INFER, BODY) + good, good)
        assert [answer.status for answer in found] == [401]
        assert transport.sent.count(b"HTTP/1.1 ") == 1
        assert not gateway.submitted


def test_health_is_open_and_metrics_are_not(access):
    with behind(access) as (ask, _):
        for path, status in (
            ("/v2/health/live", 200),
            ("/v2/health/ready?x", 200),
            ("/metrics", 401),
            ("/", 401),
            ("/v2/models/toy/ready", 401),
        ):
            (answer,), _ = ask(request_bytes(path, method="GET"), methods=("GET",))
            assert answer.status == status, path
        (answer,), _ = ask(request_bytes("/metrics", method="GET", headers=WITH_KEY), methods=("GET",))
        assert answer.status == 200


@pytest.mark.parametrize(
    ("target", "right"),
    [
        ("/v2/health/live", None),
        ("/v2/health/ready/", None),
        ("/v2/health/live/../../models/toy", "infer"),
        ("/v2/health", "infer"),
        ("http://host/v2/health/live?x=1", None),
        ("/v2/models/toy/infer", "infer"),
        ("/v2/repository/index", "infer"),
        ("/v2/repository/models/toy/load", "manage"),
        ("/v2/%72epository/models/toy/unload", "manage"),
        ("http://host/v2/repository/models/toy/load", "manage"),
        ("/v2/repository/index/../models/toy/load", "manage"),
        ("/metrics", "watch"),
        ("/", "watch"),
        ("/%76%32/repository/models/toy/load", "manage"),
    ],
)
def test_each_path_needs_a_right_however_it_is_spelt(target, right):
    assert right_for(target.encode()) == right
    assert path_of(target.encode()).startswith("/")


def test_a_key_without_the_right_gets_403(tmp_path):
    access = Access(KeyRing(key_file(tmp_path, f"scraper {KEY} watch")))
    with behind(access) as (ask, gateway):
        (answer,), _ = ask(request_bytes(INFER, BODY, headers=HEADERS | WITH_KEY))
        assert answer.status == 403
        assert answer.error == "scraper may not do this: it needs a key with the right to infer"
        assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
        assert not gateway.submitted


# ---- TLS, on real sockets ----


def tls_of(authority, **changes) -> ServerTls:
    return ServerTls(authority.folder / "server.pem", authority.folder / "server.key", **changes)


def client_of(authority, of: str = "") -> ssl.SSLContext:
    own = (authority.folder / f"{of}.pem", authority.folder / f"{of}.key") if of else ()
    return client_contexts(ClientTls(authority.file, *own)).get()


def post(connection, body=BODY, headers=HEADERS):
    connection.request("POST", INFER, body, headers)
    response = connection.getresponse()
    return response.status, orjson.loads(response.read())


def test_requests_and_long_answers_cross_tls_and_keep_their_connection(authority):
    body, length = write_request([tensor_of(images(20_000))], binary=True)
    with serving(guard=Guard(tls=tls_of(authority))) as server:
        connection = http.client.HTTPSConnection("localhost", server.port, timeout=20, context=client_of(authority))
        for _ in range(3):
            assert post(connection)[0] == 200
        status, answer = post(connection, body, {"Inference-Header-Content-Length": str(length)})
        assert status == 200
        assert len(answer["outputs"][0]["data"]) >= 20_000
        assert post(connection)[0] == 200
        connection.close()


def test_a_client_without_tls_is_answered_in_its_own_words(authority):
    with serving(guard=Guard(tls=tls_of(authority))) as server:
        connection = http.client.HTTPConnection("localhost", server.port, timeout=10)
        status, answer = post(connection)
        connection.close()
        assert status == 400
        assert answer == {"error": "this port speaks TLS: use https://"}
        assert not server.gateway.submitted


def test_a_client_with_tls_at_a_server_without_fails_at_once(authority):
    with serving() as server:
        connection = http.client.HTTPSConnection("localhost", server.port, timeout=10, context=client_of(authority))
        with pytest.raises(ssl.SSLError):
            connection.connect()
        connection.close()


def test_a_client_certificate_is_who_asks(authority):
    guard = Guard(Access(None, "required"), tls_of(authority, client_ca=authority.file))
    with serving(guard=guard) as server:
        connection = http.client.HTTPSConnection(
            "localhost", server.port, timeout=10, context=client_of(authority, "camera")
        )
        assert post(connection)[0] == 200
        connection.close()
        assert guard.access.admitted == {"camera": 1}
        connection = http.client.HTTPSConnection("localhost", server.port, timeout=10, context=client_of(authority))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            post(connection)
        connection.close()
        assert len(server.gateway.submitted) == 1


def test_a_refusal_reaches_a_client_that_goes_on_sending_over_tls(authority, access):
    with serving(guard=Guard(access, tls_of(authority))) as server:
        with client_of(authority).wrap_socket(
            socket.create_connection(("localhost", server.port), timeout=10), server_hostname="localhost"
        ) as connection:
            connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n".encode())
            connection.sendall(b"x" * 200_000)
            received = b""
            while part := connection.recv(65536):
                received += part
        assert received.startswith(b"HTTP/1.1 401 ")


def test_a_drain_over_tls_answers_what_is_in_flight_and_who_was_at_the_door(authority):
    with serving(FakeGateway(hold=True), guard=Guard(tls=tls_of(authority)), drain_s=20.0) as server:
        connection = http.client.HTTPSConnection("localhost", server.port, timeout=10, context=client_of(authority))
        connection.request("POST", INFER, BODY, HEADERS)
        while not server.gateway.submitted:
            threading.Event().wait(0.001)
        late = socket.create_connection(("localhost", server.port), timeout=10)
        while not server.call(lambda: server.gateway.draining):
            server.call(server.stop.set)
        tls = client_of(authority).wrap_socket(late, server_hostname="localhost")
        tls.sendall(request_bytes(INFER, BODY, headers=HEADERS))
        while len(server.gateway.submitted) < 2:
            threading.Event().wait(0.001)
        server.call(server.gateway.release)
        assert connection.getresponse().status == 200
        assert tls.recv(65536).startswith(b"HTTP/1.1 200 ")
        tls.close()
        connection.close()


def test_keys_and_certificates_change_under_load_without_a_lost_request(tmp_path, authority):
    own = Authority(tmp_path)
    pair = own.sign("first", file="renewed")
    keys = key_file(tmp_path, f"alice {KEY}", f"bob {OTHER}")
    guard = Guard(Access(KeyRing(keys)), ServerTls(pair.certificate, pair.key))
    done, wrong, counts = threading.Event(), [], [0, 0]

    def client(number: int, key: str, kept: bool) -> None:
        context = client_contexts(ClientTls(own.file)).get()
        connection = None
        while not done.is_set():
            connection = connection or http.client.HTTPSConnection("localhost", port, timeout=10, context=context)
            try:
                status, _ = post(connection, headers=HEADERS | {"Authorization": f"Bearer {key}"})
            except OSError as error:
                wrong.append(repr(error))
                return
            if status != 200:
                wrong.append(status)
            counts[number] += 1
            if not kept:
                connection.close()
                connection = None
        if connection:
            connection.close()

    with serving(guard=guard) as server:
        port = server.port
        clients = [threading.Thread(target=client, args=each) for each in ((0, KEY, True), (1, OTHER, False))]
        for each in clients:
            each.start()
        for round_ in range(6):
            before = list(counts)
            if round_ % 2:
                own.sign(f"name-{round_}", file="renewed")
            keys.write_text(f"alice {KEY}\n# round {round_}\nbob {OTHER}\n")
            assert server.call(guard.reload)
            while not wrong and any(now < then + 3 for now, then in zip(counts, before, strict=True)):
                threading.Event().wait(0.001)
        done.set()
        for each in clients:
            each.join(10)
    assert not wrong
    assert guard.handshakes["failed"] == 0


def test_a_server_with_a_wrong_certificate_does_not_start(tmp_path, authority):
    other = authority.sign("stranger")
    app = make_app()
    wrong = ServerTls(authority.folder / "server.pem", other.key)
    try:
        with pytest.raises(server_module.ConfigurationError, match="is not that of certificate"):
            asyncio.run(server_module.run_server(app, "127.0.0.1", 0, guard=Guard(tls=wrong)))
    finally:
        app.close()
