"""Links to workers over TLS: both sides show certificates, and neither speaks to who shows none or a wrong one."""

import asyncio
import contextlib
import datetime
import ssl

import numpy as np
import pytest

from backend_helpers import RawPeer, ask, doubling, in_loop, serving
from certificates import DAY, Authority
from evenkeel.backends.worker import server
from evenkeel.backends.worker.config import WorkerConfig, config_from, to_arguments
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.backends.worker.session import ClientOptions
from evenkeel.errors import BackendLostError, ConfigurationError, ProtocolError
from evenkeel.trust.tls import ClientTls, ServerTls

KEY, OTHER = b"sixteen bytes or more", b"quite another key of that length"
ROW = np.arange(3, dtype=np.float32)[None]
LONG = np.arange(300_000, dtype=np.float32)[None]


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = Authority(tmp_path_factory.mktemp("certificates"))
    made.sign("worker", of="server")
    made.sign("gateway", of="client")
    return made


def of_worker(authority, name="worker") -> ServerTls:
    return ServerTls(authority.folder / f"{name}.pem", authority.folder / f"{name}.key", authority.file)


def of_gateway(authority, **changes) -> ClientTls:
    files = {"certificate": authority.folder / "gateway.pem", "key": authority.folder / "gateway.key"}
    return ClientTls(**{"ca": authority.file, **files, **changes})


@contextlib.asynccontextmanager
async def reached(address, tls, key=b""):
    options = ClientOptions(start_timeout_s=20.0, first_pause_s=0.01, key=key, tls=tls)
    backend = WorkerBackend("w", address, ("double",), options)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


async def refused(address, tls, key=b"") -> str:
    """Why a worker is not reached, the first time; it is tried again and again."""
    options = ClientOptions(start_timeout_s=20.0, key=key, tls=tls)
    backend = WorkerBackend("w", address, ("double",), options)
    starting = asyncio.ensure_future(backend.start())
    try:
        while backend.last_error is None:
            await asyncio.sleep(0.001)
        assert not backend.ready
        assert isinstance(backend.last_error, BackendLostError)
        return str(backend.last_error)
    finally:
        await backend.close()
        await asyncio.gather(starting, return_exceptions=True)


@contextlib.asynccontextmanager
async def false_worker(pair, *, wants_certificate=False):
    """Something that speaks TLS with a certificate that our own worker would not start with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    heard = []

    async def listen(reader, writer):
        heard.append(await reader.read())
        writer.close()

    listening = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=context)
    try:
        yield f"tcp://127.0.0.1:{listening.sockets[0].getsockname()[1]}", heard
    finally:
        listening.close()


@in_loop
@pytest.mark.parametrize("key", [b"", KEY])
async def test_both_sides_with_certificates_work_together_with_a_key_or_without(authority, key):
    async with (
        serving("tcp://127.0.0.1:0", [doubling()], tls=of_worker(authority), key=key) as address,
        reached(address, of_gateway(authority), key) as backend,
    ):
        for rows in (ROW, LONG, ROW):
            assert np.array_equal((await ask(backend, rows)).outputs, 2 * rows)


@in_loop
async def test_a_key_is_still_needed_inside(authority):
    async with serving("tcp://127.0.0.1:0", [doubling()], tls=of_worker(authority), key=KEY) as address:
        with pytest.raises(ProtocolError, match="the keys differ"):
            async with reached(address, of_gateway(authority), OTHER):
                pass


@in_loop
async def test_a_gateway_without_a_certificate_or_with_a_strangers_hears_nothing(authority, tmp_path):
    other = Authority(tmp_path, "other").sign("stranger", of="client")
    async with serving("tcp://127.0.0.1:0", [doubling()], tls=of_worker(authority)) as address:
        for tls, words in (
            (ClientTls(authority.file), "the other side wants a certificate, and this one has none"),
            (of_gateway(authority, certificate=other.certificate, key=other.key), "does not know the authority"),
            (of_gateway(authority, certificate=authority.folder / "worker.pem", key=authority.folder / "worker.key"),
             "closed the connection"),
        ):  # fmt: skip
            assert words in await refused(address, tls)
        async with reached(address, of_gateway(authority)) as backend:
            assert np.array_equal((await ask(backend, ROW)).outputs, 2 * ROW)


@in_loop
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"begins": -2 * DAY, "ends": -datetime.timedelta(seconds=5)}, "certificate has expired"),
        ({"begins": DAY, "ends": 2 * DAY}, "certificate is not yet valid"),
        ({"hosts": ("10.9.8.7", "elsewhere")}, "IP address mismatch"),
        ({"alone": True}, "self-signed certificate"),
        ({"of": "client"}, "unsuitable certificate purpose"),
    ],
)
async def test_a_false_worker_is_named_and_hears_nothing(authority, changes, words):
    pair = authority.sign("false", **changes)
    async with false_worker(pair) as (address, heard):
        reason = await refused(address, of_gateway(authority), KEY)
        assert "cannot be trusted: " in reason
        assert words in reason
        assert not any(heard)


@in_loop
async def test_a_worker_may_be_known_by_another_name_than_its_address(authority):
    authority.sign("pool", hosts=("pool.internal",), of="server")
    async with serving("tcp://127.0.0.1:0", [doubling()], tls=of_worker(authority, "pool")) as address:
        assert "IP address mismatch" in await refused(address, of_gateway(authority))
        async with reached(address, of_gateway(authority, name="pool.internal")) as backend:
            assert np.array_equal((await ask(backend, ROW)).outputs, 2 * ROW)


@in_loop
async def test_one_side_without_tls_is_named_as_the_reason(authority, monkeypatch):
    monkeypatch.setattr(server, "_PROVE_S", 0.1)
    async with serving("tcp://127.0.0.1:0", [doubling()], tls=of_worker(authority)) as address:
        assert "it said nothing before: does it want TLS" in await refused(address, None)
        host, port = address.removeprefix("tcp://").split(":")
        peer = RawPeer(*await asyncio.open_connection(host, int(port)))
        peer.send(b"EK" + bytes(70))  # no TLS: it is hung up on without a word
        assert await peer.receive() is None
        peer.writer.close()
    async with serving("tcp://127.0.0.1:0", [doubling()], key=KEY) as address:
        reason = await refused(address, of_gateway(authority))
        assert "cannot be trusted: the other side does not speak TLS" in reason


@in_loop
async def test_half_a_handshake_takes_no_place_and_is_ended_in_time(authority, monkeypatch):
    monkeypatch.setattr(server, "_PROVE_S", 0.1)
    async with serving("tcp://127.0.0.1:0", [doubling()], tls=of_worker(authority), max_clients=1) as address:
        host, port = address.removeprefix("tcp://").split(":")
        slow = [await asyncio.open_connection(host, int(port)) for _ in range(5)]
        for _, writer in slow:
            writer.write(b"\x16\x03\x01\x02\x00\x01")
        async with reached(address, of_gateway(authority)) as backend:
            assert np.array_equal((await ask(backend, ROW)).outputs, 2 * ROW)
            for reader, writer in slow:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()


def test_the_command_line_says_it_all_and_half_of_it_is_refused(authority):
    tls = of_worker(authority)
    config = WorkerConfig(
        ("m",),
        "tcp://10.0.0.7:7000",
        tls_certificate=str(tls.certificate),
        tls_key=str(tls.key),
        tls_ca=str(tls.client_ca),
    )
    assert config.tls == tls
    assert config_from(to_arguments(config), "worker") == config
    for half in ({"tls_certificate": "a"}, {"tls_ca": "a"}, {"tls_key": "a"}):
        with pytest.raises(ConfigurationError, match="both sides show a certificate"):
            WorkerConfig(("m",), "tcp://10.0.0.7:7000", **half)


@in_loop
async def test_a_worker_does_not_take_clients_without_certificates_over_tls(authority):
    with pytest.raises(ConfigurationError, match="the authority of its clients' certificates is missing"):
        await server.serve([doubling()], "tcp://127.0.0.1:0", tls=ServerTls(authority.folder / "worker.pem"))
