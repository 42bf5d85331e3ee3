"""Requests over real sockets to servers that behave, that do not, and that are not there."""

import asyncio
import contextlib
import gc
import shutil
import socket
import ssl
import subprocess

import pytest
import uvloop

from evenkeel.errors import BackendLostError, ConfigurationError, ProtocolError
from evenkeel.http_client.client import ClientExchange, HttpClient, NotConnectedError
from evenkeel.http_client.reply import HttpReply

REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"

pytestmark = pytest.mark.timeout(60)


class Server:
    """Answers request after request as `answer` says, and counts what it sees."""

    def __init__(self, answer=None):
        self.answer = answer or self.hello
        self.connected = self.open = self.max_open = 0
        self.requests: list[bytes] = []
        self.ahead = 0  # bytes that had come before the reply was sent
        self.writers: list[asyncio.StreamWriter] = []
        self.url = ""

    async def hello(self, number: int, writer: asyncio.StreamWriter) -> bool:
        """Sends a reply; true if the connection is to be kept."""
        writer.write(REPLY)
        return True

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected += 1
        self.open += 1
        self.max_open = max(self.max_open, self.open)
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = b""
                if b"content-length: " in head:
                    body = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                self.requests.append(head + body)
                if not await self.answer(len(self.requests) - 1, writer):
                    break
                self.ahead += len(reader._buffer)  # type: ignore[attr-defined]
                await writer.drain()
        self.open -= 1
        writer.close()


@contextlib.asynccontextmanager
async def serving(answer=None, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", **options):
    script = Server(answer)
    server = await asyncio.start_server(script.talk, host, 0, ssl=tls)
    shown = f"[{host}]" if ":" in host else host
    script.url = f"http{'s' if tls else ''}://{shown}:{server.sockets[0].getsockname()[1]}"
    client = HttpClient(script.url, [b"retry-after"], **options)
    try:
        yield script, client
    finally:
        await client.close()
        assert client.connections == 0
        server.close()
        for writer in script.writers:
            writer.transport.abort()


def send(client: HttpClient, body: bytes | None = b"ping") -> tuple[asyncio.Future, ClientExchange]:
    """A future of what `on_done` is called with; a second call would be an error that is logged."""
    future = asyncio.get_running_loop().create_future()
    exchange = client.send(client.start_of("POST", "/x"), body, 1000, future.set_result)
    assert not future.done()
    return future, exchange


async def until(holds) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0)


def count(kind: str) -> int:
    return sum(type(each).__name__ == kind for each in gc.get_objects())


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request, caplog):
    yield asyncio.run if request.param == "asyncio" else uvloop.run
    assert not caplog.records  # nothing unexpected was logged


def test_requests_over_a_kept_connection(run):
    async def test():
        async with serving() as (server, client):
            for _ in range(5):
                reply = await client.request("POST", "/a%20b", b"ping", b"x-y: 1\r\n")
                assert (reply.status, reply.body) == (200, b"hello")
            assert (await client.request("GET", "/a")).status == 200
            assert server.connected == client.connections == 1
            host = server.url.removeprefix("http://").encode()
            lines = server.requests[0].split(b"\r\n")
            assert lines[:2] == [b"POST /a%20b HTTP/1.1", b"host: " + host]
            assert {b"accept-encoding: identity", b"x-y: 1", b"content-length: 4"} < set(lines)
            assert lines[-2:] == [b"", b"ping"]
            assert b"content-length" not in server.requests[-1]

    run(test())


@pytest.mark.parametrize("at_once", [1, 8])
def test_ten_thousand_requests_leave_nothing_and_none_is_sent_ahead(run, at_once):
    async def test():
        async with serving() as (server, client):
            left = 10_000
            ended = asyncio.Event()
            bad: list[object] = []

            def next_one(reply: HttpReply | None = None) -> None:
                nonlocal left
                if reply is not None and (not isinstance(reply, HttpReply) or reply.body != b"hello"):
                    bad.append(reply)
                if left > 0:
                    left -= 1
                    client.send(client.start_of("POST", "/"), b"ping", 1000, next_one)
                elif len(client._idle) == at_once:
                    ended.set()

            for _ in range(at_once):
                next_one()
            await ended.wait()
            assert not bad
            assert len(server.requests) == 10_000
            assert server.connected == server.max_open == client.connections == at_once
            assert server.ahead == 0
            assert not client._connecting
            gc.collect()
            assert count("_ClientConnection") == at_once
            assert count("ClientExchange") + count("HttpReply") <= 2 * at_once

    run(test())


def test_connections_that_end_are_freed_without_the_collector(run):
    async def test():
        async with serving() as (server, client):
            gc.collect()
            gc.disable()
            try:
                await client.request("GET", "/")
                assert count("_ClientConnection") == count("ReplyReader") == 1
                server.writers[0].transport.abort()
                await until(lambda: not client.connections)
                await until(lambda: not count("_ClientConnection") and not count("ReplyReader"))
            finally:
                gc.enable()

    run(test())


@pytest.mark.parametrize("reply", [REPLY, CHUNKS])
@pytest.mark.parametrize("kept", [False, True])
def test_a_connection_that_closes_at_any_byte_is_lost_or_was_kept_and_is_tried_again(run, kept, reply):
    async def test():
        for size in range(len(reply)):
            cut = asyncio.Event()

            async def answer(number, writer, size=size, cut=cut):
                if number == (1 if kept else 0):
                    writer.write(reply[:size])
                    cut.set()
                    return False
                writer.write(REPLY)
                return True

            async with serving(answer) as (server, client):
                if kept:
                    await send(client)[0]
                result = await send(client)[0]
                if kept and size == 0:
                    assert result.body == b"hello"
                    assert (len(server.requests), server.connected) == (3, 2)
                else:
                    assert type(result) is BackendLostError
                    assert "the server closed it" in str(result)
                    assert len(server.requests) == 1 + kept  # never twice
                assert (await send(client)[0]).body == b"hello"

    run(test())


def test_a_request_is_sent_once_more_only_once(run):
    async def answer(number, writer):
        if number == 0:
            writer.write(REPLY)
        return number == 0

    async def test():
        async with serving(answer) as (server, client):
            await send(client)[0]
            assert type(await send(client)[0]) is BackendLostError
            assert len(server.requests) == 3

    run(test())


def test_connections_that_all_ended_while_nobody_looked_lose_nothing(run):
    async def test():
        async with serving() as (server, client):
            for _ in range(3):
                await asyncio.gather(*(send(client)[0] for _ in range(8)))
                for writer in server.writers:
                    writer.transport.abort()
                results = await asyncio.gather(*(send(client)[0] for _ in range(8)))
                assert [result.body for result in results] == [b"hello"] * 8

    run(test())


@pytest.mark.parametrize(
    ("reply", "body"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\nto the end", b"to the end"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (REPLY + b"too much", b"hello"),
    ],
)
def test_a_connection_that_cannot_be_kept_is_not(run, reply, body):
    async def answer(number, writer):
        writer.write(reply)
        return b"to the end" not in reply

    async def test():
        async with serving(answer) as (server, client):
            for number in range(3):
                assert (await send(client)[0]).body == body
                await until(lambda: not client.connections)
                assert server.connected == number + 1

    run(test())


def test_what_comes_unasked_ends_the_connection(run):
    async def test():
        async with serving() as (server, client):
            await send(client)[0]
            server.writers[0].write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            await until(lambda: not client.connections)
            assert (await send(client)[0]).status == 200

    run(test())


@pytest.mark.parametrize("reply", [b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n"])
def test_what_is_no_reply_is_a_protocol_error_and_ends_the_connection(run, reply):
    async def answer(number, writer):
        writer.write(reply)
        return True

    async def test():
        async with serving(answer) as (server, client):
            assert type(await send(client)[0]) is ProtocolError
            await until(lambda: not client.connections and not server.open)

    run(test())


def test_a_server_that_speaks_before_it_is_spoken_to_is_an_error(run):
    async def test():
        async def talk(reader, writer):
            writer.write(b"220 ready\r\n")
            await reader.read()
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        assert isinstance(await send(client)[0], BackendLostError | ProtocolError)
        await client.close()
        server.close()
        await until(lambda: len(asyncio.all_tasks()) == 1)

    run(test())


def test_a_reply_before_the_whole_request_was_taken_ends_the_connection(run):
    async def test():
        replied = asyncio.Event()

        async def talk(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(REPLY)
            await replied.wait()
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0, limit=1 << 10)
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        result = await send(client, bytes(64 << 20))[0]
        assert result.body == b"hello"
        await until(lambda: not client.connections)
        replied.set()
        await client.close()
        server.close()

    run(test())


def test_giving_a_request_up_closes_its_connection_and_nothing_is_called(run):
    async def test():
        held = asyncio.Event()

        async def answer(number, writer):
            await held.wait()
            return False

        async with serving(answer) as (server, client):
            early, exchange = send(client)
            exchange.abort()  # before it is connected
            exchange.abort()
            late, exchange = send(client)
            await until(lambda: len(server.requests) == 1)
            exchange.abort()
            exchange.abort()
            await until(lambda: not client.connections and not client._connecting)
            held.set()
            waiting = asyncio.create_task(client.request("GET", "/"))
            held.clear()
            await until(lambda: len(server.requests) == 2)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: not client.connections)
            held.set()
            assert not early.done()
            assert not late.done()

    run(test())


@pytest.mark.parametrize("gives_up", [False, True])
def test_closing_or_giving_up_at_any_step_of_connecting_leaves_nothing(run, gives_up):
    async def test():
        for steps in range(25):
            async with serving() as (server, client):
                sent = [send(client) for _ in range(4)]
                for _ in range(steps):
                    await asyncio.sleep(0)
                if gives_up:
                    for _, exchange in sent:
                        exchange.abort()
                    await until(lambda: len(client._idle) == client.connections and not client._connecting)
                    assert client.connections <= sum(future.done() for future, _ in sent)
                async with asyncio.timeout(10):
                    await client.close()
                assert client.connections == 0
                if not gives_up:
                    assert all(future.done() for future, _ in sent)
                # What was connected before this one has been accepted when this one is answered.
                async with HttpClient(server.url) as other:
                    assert (await other.request("GET", "/")).status == 200
                await until(lambda: server.open == 0)

    run(test())


def test_closing_answers_everything_and_then_nothing_is_sent(run):
    async def test():
        async def answer(number, writer):
            if number == 0:
                writer.write(REPLY)
                return True
            await asyncio.Event().wait()
            return False

        async with serving(answer) as (server, client):
            await send(client)[0]
            futures = [send(client)[0] for _ in range(3)]
            await until(lambda: len(server.requests) == 4)
            futures += [send(client)[0] for _ in range(3)]
            await client.close()
            for future in futures:
                assert type(future.result()) is BackendLostError
            with pytest.raises(BackendLostError, match="closed"):
                send(client)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    run(test())


def test_an_idle_connection_is_closed_after_a_while(run):
    async def test():
        async with serving(idle_s=0.01) as (server, client):
            await asyncio.gather(*(send(client)[0] for _ in range(4)))
            await until(lambda: not client.connections and not server.open)
            assert client._sweeping is None
            assert (await send(client)[0]).status == 200

    run(test())


def test_one_that_has_been_idle_for_too_long_is_not_used(run):
    async def test():
        async with serving(idle_s=1000) as (server, client):
            await send(client)[0]
            (connection,) = client._idle
            client._idle[connection] -= 1001
            await send(client)[0]
            assert server.connected == 2
            await until(lambda: client.connections == 1)

    run(test())


def test_where_nobody_listens_nothing_was_sent(run):
    async def test():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        client = HttpClient(f"http://127.0.0.1:{port}")
        result = await send(client)[0]
        assert type(result) is NotConnectedError
        assert f"cannot connect to 127.0.0.1:{port}: " in str(result)
        result = await send(HttpClient("http://no-such-host.invalid"))[0]
        assert type(result) is NotConnectedError
        await client.close()

    run(test())


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_ipv6(run):
    async def test():
        async with serving(host="::1") as (server, client):
            assert (await client.request("GET", "/")).status == 200
            assert b"host: " + server.url.removeprefix("http://").encode() + b"\r\n" in server.requests[0]

    run(test())


class Names:
    """Gives a host the addresses that it is told to have."""

    def __init__(self, monkeypatch, addresses):
        def resolve(host, port, *args, **options):
            if host != "replica.test":
                return plain(host, port, *args, **options)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        plain = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", resolve)


def named(server: Server) -> HttpClient:
    return HttpClient(server.url.replace("127.0.0.1", "replica.test"))


def test_a_name_with_addresses_that_refuse_is_reached_by_the_one_that_does_not(monkeypatch):
    async def test():
        Names(monkeypatch, ["127.0.0.2", "127.0.0.3", "127.0.0.1"])
        async with serving() as (server, _):
            client = named(server)
            assert (await client.request("GET", "/")).status == 200
            assert b"host: replica.test:" in server.requests[0]
            await client.close()

    asyncio.run(test())


def test_a_name_whose_addresses_all_refuse_cannot_be_reached(monkeypatch):
    async def test():
        Names(monkeypatch, ["127.0.0.2", "127.0.0.3"])
        async with serving() as (server, _):
            client = named(server)
            assert type(await send(client)[0]) is NotConnectedError
            await client.close()

    asyncio.run(test())


def test_an_address_that_does_not_answer_holds_nobody_up(monkeypatch):
    async def test():
        Names(monkeypatch, ["10.0.0.1", "127.0.0.1"])
        async with serving() as (server, _):
            client = named(server)
            plain, silent = client._reach, []

            async def reach(address):
                if address == "10.0.0.1":
                    silent.append(asyncio.current_task())
                    await asyncio.Event().wait()
                return await plain(address)

            client._reach = reach
            assert (await client.request("GET", "/")).status == 200
            await until(lambda: silent[0].cancelled())
            _, exchange = send(client)  # over the kept connection
            exchange.abort()
            _, exchange = send(client)
            await until(lambda: len(silent) == 2)
            exchange.abort()
            await until(lambda: silent[1].cancelled() and not client._connecting)
            await client.close()

    asyncio.run(test())


def test_of_two_addresses_that_both_answer_one_is_dropped(monkeypatch):
    async def test():
        Names(monkeypatch, ["127.0.0.1", "127.0.0.9"])
        async with serving() as (server, _):
            client = named(server)
            plain, held = client._reach, []

            async def reach(address):
                connection = await plain("127.0.0.1")
                held.append(connection)
                await until(lambda: len(held) == 2)
                return connection

            client._reach = reach
            assert (await client.request("GET", "/")).status == 200
            await until(lambda: client.connections == 1)
            await client.close()

    asyncio.run(test())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


def test_https_is_checked_against_the_certificates_that_are_trusted(run, certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")

    async def test():
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
        async with serving(tls=context) as (server, wrong_name):
            url = server.url.replace("127.0.0.1", "localhost")
            async with HttpClient(url) as client:
                for _ in range(3):
                    assert (await client.request("POST", "/", bytes(100_000))).body == b"hello"
                assert client.connections == 1
                for writer in server.writers:
                    writer.transport.abort()
                assert (await client.request("POST", "/", b"ping")).body == b"hello"
            refusal = await send(wrong_name)[0]
            assert type(refusal) is NotConnectedError
            assert "the certificate of the other side is refused: IP address mismatch" in str(refusal)
            monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
            async with HttpClient(url) as trusts_nobody:
                assert "refused: self-signed certificate" in str(await send(trusts_nobody)[0])

    run(test())


def test_the_url_says_name_password_and_beginning_of_the_path(run):
    async def test():
        async with serving() as (server, _):
            url = server.url.replace("://", "://me:pass%20w%3Ard@") + "/deep/a b/ö/"
            async with HttpClient(url) as client:
                await client.request("GET", "/v2")
            assert server.requests[0].startswith(b"GET /deep/a%20b/%C3%B6/v2 HTTP/1.1\r\n")
            assert b"authorization: Basic bWU6cGFzcyB3OnJk\r\n" in server.requests[0]

    run(test())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "must begin with http"),
        ("ftp://localhost", "must begin with http"),
        ("http://", "names no host"),
        ("http://:80", "names no host"),
        ("http://a b", "names no host"),
        ("http://host:port", "not a URL that can be reached"),
        ("http://host:99999", "not a URL that can be reached"),
        ("http://[::1", "not a URL that can be reached"),
        ("http://" + "x" * 64, "not a URL that can be reached"),
        ("http://host/v?token=1", "must end with its path"),
        ("http://host/#x", "must end with its path"),
    ],
)
def test_a_url_that_cannot_be_reached_is_refused(url, message):
    with pytest.raises(ConfigurationError, match=message):
        HttpClient(url)
    with pytest.raises(ConfigurationError) as refusal:
        HttpClient(url.replace("//", "//admin:hunter2@"))
    assert "hunter2" not in str(refusal.value)


def test_a_header_cannot_come_from_a_url():
    assert b"evil" not in HttpClient("http://host/a\r\nevil: 1").start_of("GET", "").split(b"\r\n", 1)[1]


def test_an_error_in_on_done_is_logged_and_ends_nothing(caplog):
    async def test():
        async with serving() as (server, client):

            def fail(reply):
                raise RuntimeError("what now")

            client.send(client.start_of("GET", "/"), None, 1000, fail)
            await until(lambda: len(caplog.records) == 1)
            assert (await client.request("GET", "/")).status == 200
            assert server.connected == 1

    asyncio.run(test())
    assert "what now" in caplog.text
