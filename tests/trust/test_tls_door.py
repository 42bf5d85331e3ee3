"""TLS in front of a protocol: what is inside comes through whole, and who does not finish a handshake is bounded."""

import asyncio
import contextlib
import gc
import os
import random
import ssl
import weakref

import pytest
import uvloop

from certificates import Authority
from evenkeel.trust import tls_door
from evenkeel.trust.tls import ClientTls, ServerTls, client_contexts, server_contexts
from evenkeel.trust.tls_door import TlsDoor, peer_name

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = Authority(tmp_path_factory.mktemp("certificates"))
    made.sign("server")
    made.sign("camera")
    return made


class Echo(asyncio.Protocol):
    """Sends back what comes, and closes when the other side has."""

    made: "list[Echo]"

    def __init__(self) -> None:
        self.made.append(self)
        self.lost = asyncio.get_running_loop().create_future()
        self.received = 0

    def connection_made(self, transport):
        self.transport = transport
        self.name = peer_name(transport)

    def data_received(self, data):
        self.received += len(data)
        self.transport.write(data)

    def connection_lost(self, exc):
        self.lost.set_result(exc)


class BufferedEcho(asyncio.BufferedProtocol, Echo):
    """The same, with a buffer of its own that is smaller than a record."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.room = memoryview(bytearray(1000))

    def get_buffer(self, sizehint):
        return self.room

    def buffer_updated(self, nbytes):
        self.data_received(bytes(self.room[:nbytes]))


def door_of(authority, make=Echo, client_ca=None, **options) -> TlsDoor:
    Echo.made = []
    files = ServerTls(authority.folder / "server.pem", authority.folder / "server.key", client_ca)
    return TlsDoor(server_contexts(files), make, **options)


@contextlib.asynccontextmanager
async def behind(door):
    server = await asyncio.get_running_loop().create_server(door.connect, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        door.abort()
        for echo in Echo.made:
            echo.transport.abort()
            await echo.lost


async def connect(port, authority, of=""):
    files = (authority.folder / f"{of}.pem", authority.folder / f"{of}.key") if of else ()
    context = client_contexts(ClientTls(authority.file, *files)).get()
    return await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost", limit=1 << 24)


def in_both(test):
    """Run a test on the loop of asyncio and on uvloop."""

    @pytest.mark.parametrize("loop", LOOPS)
    def run(loop, authority):
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(asyncio.wait_for(test(authority), 30))

    run.__name__ = test.__name__
    return run


async def until(holds):
    while not holds():
        await asyncio.sleep(0.001)


def crossing(make):
    async def run(authority):
        door = door_of(authority, make)
        async with behind(door) as port:
            reader, writer = await connect(port, authority)
            for size in (1, 1000, 16384, 16385, 3_000_000):
                sent = os.urandom(size)
                writer.write(sent)
                assert await reader.readexactly(size) == sent
            assert door.outcomes == {"done": 1}
            writer.close()
            await Echo.made[0].lost

    return run


@in_both
async def test_everything_comes_through_whole(authority):
    await crossing(Echo)(authority)


@in_both
async def test_a_protocol_with_a_buffer_of_its_own_is_served_too(authority):
    await crossing(BufferedEcho)(authority)


@in_both
async def test_who_pauses_gets_nothing_until_it_goes_on(authority):
    async with behind(door_of(authority)) as port:
        reader, writer = await connect(port, authority)
        writer.write(b"x")
        await reader.readexactly(1)
        (echo,) = Echo.made
        echo.transport.pause_reading()
        assert not echo.transport.is_reading()
        writer.write(os.urandom(100_000))
        for _ in range(20):
            await asyncio.sleep(0)
        assert echo.received == 1
        echo.transport.resume_reading()
        assert len(await reader.readexactly(100_000)) == 100_000
        writer.close()


@in_both
async def test_the_client_learns_that_the_end_is_the_end(authority):
    async with behind(door_of(authority)) as port:
        reader, writer = await connect(port, authority)
        writer.write(b"x")
        await reader.readexactly(1)
        Echo.made[0].transport.write(b"last")
        Echo.made[0].transport.close()
        assert Echo.made[0].transport.is_closing()
        Echo.made[0].transport.write(b"nothing more")
        assert await reader.read() == b"last"  # a connection that was cut would be an error
        writer.close()


@in_both
async def test_a_client_is_known_by_its_certificate_and_none_else_is_let_in(authority):
    door = door_of(authority, client_ca=authority.file)
    async with behind(door) as port:
        reader, writer = await connect(port, authority, "camera")
        writer.write(b"x")
        await reader.readexactly(1)
        assert Echo.made[0].name == "camera"
        writer.close()
        reader, stranger = await connect(port, authority)  # TLS 1.3: the client hears of it only afterwards
        with pytest.raises(ssl.SSLError, match="certificate required"):
            await reader.readexactly(1)
        stranger.close()
        assert len(Echo.made) == 1
        assert door.outcomes == {"done": 1, "failed": 1}


@in_both
async def test_who_speaks_no_tls_gets_the_plain_answer_and_reaches_nobody(authority):
    door = door_of(authority, plain_answer=b"this port speaks TLS")
    async with behind(door) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await reader.read() == b"this port speaks TLS"
        writer.close()
    assert not Echo.made
    assert door.outcomes == {"plain": 1}


@in_both
async def test_a_handshake_that_is_not_done_in_time_is_ended(authority):
    door = door_of(authority, handshake_s=0.05)
    async with behind(door) as port:
        silent, slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        slow[1].write(b"\x16\x03\x01\x02\x00")  # the beginning of one
        for reader, writer in (silent, slow):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        assert door.outcomes == {"late": 2}
        assert not door.shaking


@in_both
async def test_a_handshake_that_ends_half_way_or_is_nonsense_is_forgotten(authority):
    door = door_of(authority)
    async with behind(door) as port:
        for sent in (b"", b"\x16\x03", b"\x16\x03\x01\x00\x05abcde", b"\x16" * 300):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            writer.write_eof()
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
            writer.close()
        await until(lambda: not door.shaking)
        assert door.outcomes == {"failed": 4}
        reader, writer = await connect(port, authority)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        writer.close()


@in_both
async def test_an_endless_handshake_is_cut_off(authority):
    door = door_of(authority)
    async with behind(door) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(b"\x16\x03\x01\x00\x01\x00" * 1000)
                await writer.drain()
            await reader.read()
        await until(lambda: not door.shaking)
        writer.close()


@in_both
async def test_a_crowd_of_half_open_handshakes_keeps_nobody_out(authority):
    door = door_of(authority, max_handshakes=8)
    async with behind(door) as port:
        crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        await until(lambda: door.outcomes["crowded"] >= 42)
        assert len(door.shaking) == 8
        reader, writer = await connect(port, authority)
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        for _, one in [*crowd, (reader, writer)]:
            one.close()


@in_both
async def test_a_heard_handshake_said_again_lets_nobody_in(authority):
    door = door_of(authority)
    heard = []

    async def between(reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)

        async def pump(source, sink, kept):
            while data := await source.read(65536):
                kept.append(data)
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, inner_writer, heard), pump(inner_reader, writer, []))

    async with behind(door) as port:
        listening = await asyncio.start_server(between, "127.0.0.1", 0)
        reader, writer = await connect(listening.sockets[0].getsockname()[1], authority)
        writer.write(b"once")
        assert await reader.readexactly(4) == b"once"
        writer.close()
        await Echo.made[0].lost
        listening.close()
        again_reader, again = await asyncio.open_connection("127.0.0.1", port)
        again.write(b"".join(heard))
        with contextlib.suppress(ConnectionResetError):
            await again_reader.read()
        again.close()
        await until(lambda: not door.shaking)
        assert len(Echo.made) == 1
        assert door.outcomes == {"done": 1, "failed": 1}


@in_both
async def test_new_connections_use_a_new_certificate_and_old_ones_go_on(authority):
    pair = authority.sign("before", file="renewed")
    Echo.made = []
    door = TlsDoor(server_contexts(ServerTls(pair.certificate, pair.key)), Echo)
    async with behind(door) as port:
        seen, connections = [], []
        for name in ("before", "after"):
            authority.sign(name, file="renewed")
            door.contexts.reload()
            connections.append(await connect(port, authority))
            certificate = connections[-1][1].get_extra_info("ssl_object").getpeercert()
            seen.append(certificate["subject"][0][0][1])
        for reader, writer in connections:
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            writer.close()
        assert seen == ["before", "after"]


@in_both
async def test_nothing_is_kept_of_a_connection_that_ended(authority):
    async with behind(door_of(authority)) as port:
        gc.collect()
        gc.disable()
        try:
            reader, writer = await connect(port, authority)
            writer.write(b"x")
            await reader.readexactly(1)
            kept = weakref.ref(Echo.made[0].transport)
            writer.close()
            await Echo.made[0].lost
            Echo.made.clear()
            await until(lambda: kept() is None)
        finally:
            gc.enable()


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self):
        super().__init__()
        self.sent, self.ended, self.paused = b"", False, False

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False

    def is_closing(self):
        return self.ended

    def write(self, data):
        self.sent += data

    def close(self):
        self.ended = True

    abort = close


def test_what_comes_together_with_the_end_of_a_handshake_is_part_of_what_follows(authority):
    """A server that is busy finds both in one piece, however much the client sent meanwhile."""
    body = os.urandom(200_000)

    async def run():
        wire, connection = Wire(), door_of(authority).connect()
        connection.connection_made(wire)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = client_contexts(ClientTls(authority.file)).get()
        client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        connection.data_received(outgoing.read())
        assert wire.paused  # until its turn comes
        await asyncio.sleep(0)
        assert not wire.paused
        incoming.write(wire.sent)
        client.do_handshake()
        client.write(body)
        connection.data_received(outgoing.read())
        await asyncio.sleep(0)
        assert Echo.made[0].received == len(body)
        connection.connection_lost(None)

    asyncio.run(run())


def test_a_handshake_in_which_anything_was_changed_lets_nobody_in(authority, caplog):
    """Whatever byte of the client's is flipped, whenever it comes, nobody is connected and nothing breaks."""
    chance = random.Random(7)
    context = client_contexts(ClientTls(authority.file)).get()

    async def shake(door, flip_at: int) -> int:
        wire, connection = Wire(), door.connect()
        connection.connection_made(wire)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        sent = 0
        for _ in range(6):
            with contextlib.suppress(ssl.SSLError):
                client.do_handshake()
            data = bytearray(outgoing.read())
            if sent <= flip_at < sent + len(data):
                data[flip_at - sent] ^= 1 << chance.randrange(8)
            sent += len(data)
            while data and not wire.ended:
                piece = chance.randrange(1, 200)
                connection.data_received(bytes(data[:piece]))
                del data[:piece]
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            incoming.write(wire.sent)
            wire.sent = b""
        connection.connection_lost(None)
        return sent

    async def run():
        door = door_of(authority, plain_answer=b"no TLS")
        size = await shake(door, -1)
        assert door.outcomes == {"done": 1}
        flipped = range(5, size, 3)  # not of the first record's head, whose version TLS 1.3 has everybody ignore
        for at in flipped:
            await shake(door, at)
        assert len(Echo.made) == 1
        assert door.outcomes["done"] == 1
        assert sum(door.outcomes.values()) == 1 + len(flipped)
        assert not door.shaking

    asyncio.run(run())
    assert not [record for record in caplog.records if record.exc_info]


def test_the_log_says_why_handshakes_fail_but_not_each_time(authority, caplog):
    async def run():
        async with behind(door_of(authority, client_ca=authority.file)) as port:
            for _ in range(5):
                reader, writer = await connect(port, authority)
                with pytest.raises(ssl.SSLError):
                    await reader.readexactly(1)
                writer.close()

    asyncio.run(run())
    (record,) = [one for one in caplog.records if one.name == tls_door.__name__]
    assert "a handshake failed: the other side showed no certificate" in record.getMessage()
