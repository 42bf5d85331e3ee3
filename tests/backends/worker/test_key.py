"""Workers and clients on TCP prove to each other that they hold the same key, before anything else is said."""

import asyncio
import contextlib
import socket

import numpy as np
import pytest

from backend_helpers import RawPeer, ask, doubling, in_loop, serving
from evenkeel.backends.worker import server
from evenkeel.backends.worker.address import parse_address
from evenkeel.backends.worker.frames import FrameKind, encode, encode_object, encode_tensor
from evenkeel.backends.worker.key import (
    KEY_VARIABLE,
    challenge,
    check_open,
    check_proof,
    follow_key,
    proof,
    read_key,
)
from evenkeel.backends.worker.remote import WorkerBackend
from evenkeel.backends.worker.session import ClientOptions
from evenkeel.errors import ConfigurationError, ProtocolError
from evenkeel.trust import reloaded

KEY, OTHER = b"sixteen bytes or more", b"quite another key of that length"
ROW = np.arange(3, dtype=np.float32)[None]
TASK = b"".join(encode_tensor(FrameKind.TASK, 1, ROW))


@contextlib.asynccontextmanager
async def reached(address, key):
    options = ClientOptions(start_timeout_s=20.0, first_pause_s=0.01, key=key)
    backend = WorkerBackend("w", address, ("double",), options)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


@contextlib.asynccontextmanager
async def stranger(address):
    host, port = address.removeprefix("tcp://").split(":")
    peer = RawPeer(*await asyncio.open_connection(host, int(port)))
    try:
        yield peer
    finally:
        peer.writer.close()


@in_loop
async def test_both_with_the_key_work_together():
    async with serving("tcp://127.0.0.1:0", [doubling()], key=KEY) as address, reached(address, KEY) as backend:
        assert np.array_equal((await ask(backend, ROW)).outputs, 2 * ROW)


@in_loop
async def test_a_client_with_another_key_or_none_is_refused():
    async with serving("tcp://127.0.0.1:0", [doubling()], key=KEY) as address:
        with pytest.raises(ProtocolError, match="saw this side's proof: the keys differ; give both the same one"):
            async with reached(address, OTHER):
                pass
        with pytest.raises(ProtocolError, match="asks for a key; give this side the same one"):
            async with reached(address, b""):
                pass


@in_loop
async def test_a_worker_without_the_key_is_refused():
    async with serving("tcp://127.0.0.1:0", [doubling()]) as address:
        with pytest.raises(ProtocolError, match="start it with the same key"):
            async with reached(address, KEY):
                pass


@in_loop
async def test_who_took_a_dead_workers_port_is_refused_before_it_sees_an_image():
    heard = []

    async def impostor(reader, writer):
        """Say a challenge, and send back as a proof what the client sent as its own."""
        writer.write(encode_object(FrameKind.CHALLENGE, {"challenge": challenge()}))
        peer = RawPeer(reader, writer)
        answer = await peer.receive()
        peer.send(encode_object(FrameKind.PROOF, answer.object()))
        heard.append(await peer.receive())
        writer.close()

    server = await asyncio.start_server(impostor, "127.0.0.1", 0)
    address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(ProtocolError, match="does not hold the other side's key"):
        async with reached(address, KEY):
            pass
    server.close()
    assert heard == [None]  # the connection closed, and no task came


@in_loop
@pytest.mark.parametrize(
    "said",
    [
        TASK,
        encode(FrameKind.PING),
        encode_object(FrameKind.SHARE, {}),
        encode_object(FrameKind.PROOF, {}),
        encode_object(FrameKind.PROOF, {"challenge": "short", "proof": proof(KEY, "client", "", "short")}),
        encode_object(FrameKind.PROOF, {"challenge": 7, "proof": ["no text"]}),
        encode(FrameKind.PROOF, payload=b"[" * 4000),
        encode_object(FrameKind.PROOF, {"challenge": challenge(), "proof": "0" * 64}),
        b"EK\x63" + bytes(69),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(72),
    ],
    ids=["task", "ping", "share", "nothing", "no_challenge", "types", "deep", "wrong", "version", "http"],
)
async def test_a_stranger_gets_no_hello_and_no_reply_whatever_he_says(said):
    async with serving("tcp://127.0.0.1:0", [doubling()], key=KEY) as address, stranger(address) as peer:
        assert (await peer.receive()).kind is FrameKind.CHALLENGE
        peer.send(said)
        assert await peer.receive() is None  # whatever was said, nothing comes back


@in_loop
async def test_a_stranger_cannot_have_memory_set_aside():
    async with serving("tcp://127.0.0.1:0", [doubling()], key=KEY) as address, stranger(address) as peer:
        await peer.receive()
        header = encode_tensor(FrameKind.TASK, 1, np.zeros((1, 100_000), np.float32))[0]
        peer.send(header)
        assert await peer.receive() is None


@in_loop
async def test_a_proof_heard_elsewhere_is_worth_nothing():
    async with (
        serving("tcp://127.0.0.1:0", [doubling()], key=KEY) as address,
        stranger(address) as first,
        stranger(address) as second,
    ):
        of_first = (await first.receive()).object()["challenge"]
        assert (await second.receive()).object()["challenge"] != of_first
        mine = challenge()
        second.send(encode_object(FrameKind.PROOF, {"challenge": mine, "proof": proof(KEY, "client", of_first, mine)}))
        assert await second.receive() is None


@in_loop
async def test_a_proof_that_was_good_once_is_worth_nothing_the_next_time():
    heard = []

    async def between(reader, writer):
        """Passes everything on, and keeps what the client says."""
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))

        async def pump(source, sink, kept):
            while data := await source.read(65536):
                kept.append(data)
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, inner_writer, heard), pump(inner_reader, writer, []))

    async with serving("tcp://127.0.0.1:0", [doubling()], key=KEY) as address:
        host, port = address.removeprefix("tcp://").split(":")
        listening = await asyncio.start_server(between, "127.0.0.1", 0)
        async with reached(f"tcp://127.0.0.1:{listening.sockets[0].getsockname()[1]}", KEY) as backend:
            assert np.array_equal((await ask(backend, ROW)).outputs, 2 * ROW)
        listening.close()
        async with stranger(address) as peer:
            await peer.receive()
            peer.send(b"".join(heard))
            assert await peer.receive() is None


@in_loop
async def test_who_proves_nothing_is_sent_away_in_time(monkeypatch):
    monkeypatch.setattr(server, "_PROVE_S", 0.05)
    async with serving("tcp://127.0.0.1:0", [doubling()], key=KEY) as address, stranger(address) as peer:
        assert (await peer.receive()).kind is FrameKind.CHALLENGE
        assert await peer.receive() is None


@in_loop
async def test_strangers_take_no_places_of_those_with_the_key(monkeypatch):
    monkeypatch.setattr(server, "_MAX_STRANGERS", 4)
    async with (
        serving("tcp://127.0.0.1:0", [doubling()], key=KEY, max_clients=1) as address,
        contextlib.AsyncExitStack() as stack,
    ):
        peers = [await stack.enter_async_context(stranger(address)) for _ in range(9)]
        for peer in peers:
            assert (await peer.receive()).kind is FrameKind.CHALLENGE
        for peer in peers[:5]:
            assert await peer.receive() is None  # the oldest
        async with reached(address, KEY) as backend:
            assert np.array_equal((await ask(backend, ROW)).outputs, 2 * ROW)
            second = WorkerBackend("second", address, ("double",), ClientOptions(key=KEY))
            starting = asyncio.ensure_future(second.start())
            while second.last_error is None:
                await asyncio.sleep(0.001)
            assert "1 clients are connected" in str(second.last_error)
            await second.close()
            await asyncio.gather(starting, return_exceptions=True)


@in_loop
async def test_a_false_worker_cannot_have_memory_set_aside_either():
    async def impostor(reader, writer):
        writer.write(encode_object(FrameKind.CHALLENGE, {"challenge": "x" * 100_000}))
        await reader.read()
        writer.close()

    listening = await asyncio.start_server(impostor, "127.0.0.1", 0)
    with pytest.raises(ProtocolError, match="at most 4096 are"):
        async with reached(f"tcp://127.0.0.1:{listening.sockets[0].getsockname()[1]}", KEY):
            pass
    listening.close()


@in_loop
async def test_a_new_key_is_used_for_new_connections(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_bytes(KEY)
    monkeypatch.setattr(reloaded, "LOOK_EVERY_S", 0.0)
    async with (
        serving("tcp://127.0.0.1:0", [doubling()], key=follow_key(file)) as address,
        reached(address, follow_key(file)) as before,
    ):
        file.write_bytes(OTHER)
        async with reached(address, follow_key(file)) as after:
            for backend in (before, after):
                assert np.array_equal((await ask(backend, ROW)).outputs, 2 * ROW)
        with pytest.raises(ProtocolError, match="the keys differ"):
            async with reached(address, KEY):
                pass


@in_loop
async def test_clients_beyond_the_most_are_told_so_and_the_others_go_on():
    async with (
        serving("tcp://127.0.0.1:0", [doubling()], max_clients=2) as address,
        reached(address, b"") as backend,
        stranger(address) as second,
    ):
        assert (await second.receive()).kind is FrameKind.HELLO
        async with stranger(address) as third:
            assert "2 clients are connected" in (await third.receive()).text()
            assert await third.receive() is None
        assert (await ask(backend, ROW)).outputs is not None


@in_loop
async def test_a_task_of_more_rows_than_allowed_is_refused():
    model = doubling(input_shape=(3,), dtype="float32")
    async with serving("tcp://127.0.0.1:0", [model], max_rows=4) as address, stranger(address) as peer:
        await peer.receive()
        peer.send(b"".join(encode_tensor(FrameKind.TASK, 1, np.repeat(ROW, 4, 0))))
        assert (await peer.receive()).kind is FrameKind.REPLY
        peer.send(b"".join(encode_tensor(FrameKind.TASK, 2, np.repeat(ROW, 5, 0))))
        assert "at most 48 are" in (await peer.receive()).text()


@in_loop
async def test_connections_notice_a_peer_that_vanished():
    async with serving("tcp://127.0.0.1:0", [doubling()]) as address, reached(address, b"") as backend:
        plain = backend._session.connection._transport.get_extra_info("socket")
        assert plain.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key() == b""
    file = tmp_path / "key"
    file.write_bytes(KEY + b"\n")
    file.chmod(0o600)
    assert read_key(file) == KEY
    assert not caplog.records
    file.chmod(0o644)
    assert read_key(file) == KEY
    assert "can be read by other users" in caplog.text
    monkeypatch.setenv(KEY_VARIABLE, OTHER.decode())
    assert read_key() == OTHER
    assert read_key(file) == KEY  # the more explicit one
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(ConfigurationError, match="16 to 4096 bytes, found 5"):
        read_key()
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_key(tmp_path / "none")


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:7000", "tcp://[::]:7000", "tcp://10.0.0.7:7000", "tcp://gpu-3:7000"]
)
def test_beyond_this_machine_a_key_is_needed_unless_said_otherwise(address, caplog):
    with pytest.raises(ConfigurationError, match="can be reached from other machines"):
        check_open(parse_address(address), b"", False)
    check_open(parse_address(address), KEY, False)
    assert not caplog.records
    check_open(parse_address(address), b"", False, tls=True)
    assert not caplog.records
    check_open(parse_address(address), b"", True)
    assert "NO KEY AND NO TLS" in caplog.text


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:7000", "tcp://[::1]:7000", "tcp://localhost:7000", "unix:/tmp/w", "fd:3"]
)
def test_on_this_machine_none_is_needed(address):
    check_open(parse_address(address), b"", False)


def test_roles_and_challenges_bind_a_proof():
    worker, client = challenge(), challenge()
    check_proof(proof(KEY, "client", worker, client), KEY, "client", worker, client)
    for key, role, of_worker, of_client in (
        (OTHER, "client", worker, client),
        (KEY, "worker", worker, client),
        (KEY, "client", challenge(), client),
        (KEY, "client", worker, challenge()),
    ):
        with pytest.raises(ProtocolError, match="does not hold"):
            check_proof(proof(key, role, of_worker, of_client), KEY, "client", worker, client)
