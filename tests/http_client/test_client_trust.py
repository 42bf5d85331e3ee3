"""Whom the HTTP client believes, what it shows, and that no message shows what it must not."""

import asyncio
import contextlib
import datetime
import ssl
from pathlib import Path

import numpy as np
import pytest

from certificates import DAY, Authority
from evenkeel.backends.oip.backend import OipBackend
from evenkeel.client import ClientTls, InferenceClient
from evenkeel.errors import (
    BackendLostError,
    ConfigurationError,
    ForbiddenError,
    UnauthenticatedError,
)
from evenkeel.http_client.client import HttpClient, NotConnectedError
from evenkeel.serving.front.access import Access, Guard
from evenkeel.trust import reloaded
from evenkeel.trust.credentials import Credentials
from evenkeel.trust.keys import KeyRing
from evenkeel.trust.tls import ServerTls
from http_helpers import images, make_card, serving

KEY, OTHER = "alices-secret-key-0001", "another-secret-key-002"
REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = Authority(tmp_path_factory.mktemp("certificates"))
    made.sign("server")
    made.sign("gateway", of="client")
    return made


def written(file: Path, text: str) -> Path:
    file.touch(0o600)
    file.write_text(text)
    return file


def guarded(authority, tmp_path, line: str = f"alice {KEY}", **tls) -> Guard:
    files = ServerTls(authority.folder / "server.pem", authority.folder / "server.key", **tls)
    return Guard(Access(KeyRing(written(tmp_path / "keys", line))), files)


@contextlib.asynccontextmanager
async def hearing(pair=None):
    """A server that answers every request, and what it heard."""
    heard = []
    context = None
    if pair is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)

    async def talk(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                heard.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(REPLY)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=context)
    try:
        yield f"http{'s' if pair else ''}://localhost:{server.sockets[0].getsockname()[1]}", heard
    finally:
        server.close()
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"begins": -2 * DAY, "ends": -datetime.timedelta(seconds=5)}, "certificate has expired"),
        ({"begins": DAY, "ends": 2 * DAY}, "certificate is not yet valid"),
        ({"hosts": ("elsewhere",)}, "Hostname mismatch"),
        ({"alone": True}, "self-signed certificate"),
    ],
)
def test_a_wrong_certificate_is_refused_before_a_key_is_shown(authority, changes, words):
    async def run():
        async with hearing(authority.sign("wrong", **changes)) as (url, heard):
            async with HttpClient(url, credentials=Credentials(bearer=KEY), tls=ClientTls(authority.file)) as client:
                with pytest.raises(NotConnectedError, match=words) as caught:
                    await client.request("GET", "/")
                assert KEY not in str(caught.value)
            assert not heard

    asyncio.run(run())


def test_a_server_may_be_known_by_another_name(authority):
    async def run():
        tls = ClientTls(authority.file, name="pool.internal")
        async with (
            hearing(authority.sign("pool", hosts=("pool.internal",))) as (url, _),
            HttpClient(url, tls=tls) as client,
        ):
            assert (await client.request("GET", "/")).status == 200

    asyncio.run(run())


def test_a_server_without_tls_is_named_as_the_reason(authority):
    async def run(url):
        async with HttpClient(url, tls=ClientTls(authority.file)) as client:
            await client.request("GET", "/")

    with serving() as server, pytest.raises(NotConnectedError, match="the other side does not speak TLS"):
        asyncio.run(run(f"https://localhost:{server.port}"))


def test_a_key_and_headers_go_with_every_request_and_a_new_key_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(reloaded, "LOOK_EVERY_S", 0.0)
    file = written(tmp_path / "key", KEY)

    async def run():
        async with hearing() as (url, heard):
            async with HttpClient(url, credentials=Credentials({"X-Team": "blue"}, bearer_file=file)) as client:
                await client.request("GET", "/")
                file.write_text(OTHER)
                await client.request("POST", "/", b"body")
            for head, key in zip(heard, (KEY, OTHER), strict=True):
                assert f"authorization: Bearer {key}\r\n".encode() in head
                assert b"X-Team: blue\r\n" in head

    asyncio.run(run())


def test_contradictions_are_refused_and_readable_keys_are_warned_of(authority, caplog):
    with pytest.raises(ConfigurationError, match="begins with https"):
        HttpClient("http://localhost", tls=ClientTls(authority.file))
    with pytest.raises(ConfigurationError, match="exclude each other") as caught:
        HttpClient(f"http://name:{OTHER}@localhost", credentials=Credentials(bearer=KEY))
    assert KEY not in str(caught.value)
    assert OTHER not in str(caught.value)
    HttpClient("http://localhost", credentials=Credentials(bearer=KEY))
    assert not caplog.records
    HttpClient("http://10.0.0.7:8000", credentials=Credentials(bearer=KEY))
    assert "credentials can be read on their way" in caplog.text
    assert KEY not in caplog.text


def test_the_inference_client_shows_its_key_and_believes_its_authority(authority, tmp_path):
    with serving(guard=guarded(authority, tmp_path, client_ca=authority.file)) as server:
        url = f"https://localhost:{server.port}"
        mine = ClientTls(authority.file, authority.folder / "gateway.pem", authority.folder / "gateway.key")
        with InferenceClient(url, "toy", bearer=KEY, tls=mine) as client:
            assert client.classify(images()[0]).label == "bright"
        with InferenceClient(url, "toy", bearer_file=written(tmp_path / "own", KEY), tls=mine) as client:
            assert client.classify(images()[0]).label == "bright"
        for tls, words in (
            (ClientTls(authority.file), "wants a certificate, and this one has none"),
            (None, "the certificate of the other side is refused"),
        ):
            with (
                InferenceClient(url, "toy", bearer=KEY, tls=tls) as client,
                pytest.raises(BackendLostError, match=words),
            ):
                client.classify(images()[0])
        with InferenceClient(url, "toy", tls=mine) as client, pytest.raises(UnauthenticatedError, match="wants a key"):
            client.classify(images()[0])
        with InferenceClient(url, "toy", headers={"Authorization": f"Bearer {OTHER}"}, tls=mine) as client:
            with pytest.raises(UnauthenticatedError, match="not known here") as caught:
                client.classify(images()[0])
            assert OTHER not in str(caught.value)


def test_a_key_that_may_only_watch_is_forbidden_to_classify(authority, tmp_path):
    with (
        serving(guard=guarded(authority, tmp_path, f"scraper {KEY} watch")) as server,
        InferenceClient(f"https://localhost:{server.port}", "toy", bearer=KEY, tls=ClientTls(authority.file)) as client,
        pytest.raises(ForbiddenError, match="scraper may not do this"),
    ):
        client.classify(images()[0])


def test_a_remote_replica_is_reached_with_a_key_and_certificates(authority, tmp_path, caplog):
    rows = np.stack([images()[0]])

    async def answered(port: int, **options):
        backend = OipBackend("r", f"https://localhost:{port}", "toy", make_card(), **options)
        starting = asyncio.ensure_future(backend.start())
        try:
            while backend.why_not == "it was never reached":
                await asyncio.sleep(0.001)
            if not backend.ready:
                return backend.why_not
            await starting
            replied = asyncio.get_running_loop().create_future()
            backend.submit("toy", rows, replied.set_result)
            return (await replied).outputs
        finally:
            starting.cancel()
            await backend.close()

    with serving(guard=guarded(authority, tmp_path, client_ca=authority.file)) as server:
        mine = ClientTls(authority.file, authority.folder / "gateway.pem", authority.folder / "gateway.key")
        assert asyncio.run(answered(server.port, credentials=Credentials(bearer=KEY), tls=mine)).shape == (1, 3)
        for options, words in (
            ({"credentials": Credentials(bearer=OTHER), "tls": mine}, "answered 401: this key is not known here"),
            ({"tls": mine}, "answered 401: this server wants a key"),
            ({"credentials": Credentials(bearer=KEY), "tls": ClientTls(authority.file)}, "wants a certificate"),
        ):
            assert words in asyncio.run(answered(server.port, **options))
    assert KEY not in caplog.text
    assert OTHER not in caplog.text
