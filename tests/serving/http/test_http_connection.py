"""HTTP/1.1 on a transport that only records, and on a virtual clock."""

import gc
from dataclasses import dataclass, field
from itertools import pairwise

import orjson
import pytest
from hypothesis import given, strategies as st

from evenkeel.clock import VirtualClock
from evenkeel.serving.front.sweeper import Sweeper
from evenkeel.serving.http.connection import Exchange, HttpConnection, HttpLimits, HttpServer
from evenkeel.serving.http.reader import ReadLimits
from http_helpers import Response, connect, read_responses, request_bytes

LIMITS = HttpLimits(
    ReadLimits(head_bytes=2000, target_bytes=300, body_bytes=1000),
    head_timeout_s=1.0,
    body_timeout_s=2.0,
    keep_alive_s=5.0,
    write_timeout_s=3.0,
    linger_s=0.5,
    connections=3,
)


@dataclass
class Echo:
    """Says what it was asked, at once or, with `hold`, when told to."""

    hold: bool = False
    last: bool = False
    asked: list[Exchange] = field(default_factory=list)
    lost: list[Exchange] = field(default_factory=list)
    padding: bytes = b""

    def handle(self, exchange: Exchange) -> None:
        self.asked.append(exchange)
        if not self.hold:
            self.answer(exchange)

    def answer(self, exchange: Exchange) -> None:
        exchange.last = self.last
        asked = exchange.request
        seen = b"%b %b %b %b" % (asked.method, asked.target, asked.headers.get(b"x-kept", b"-"), asked.body)
        exchange.respond(200, b"x-echo: 1\r\n", seen + self.padding)

    def gone(self, exchange: Exchange) -> None:
        self.lost.append(exchange)


class Server:
    """A server on a virtual clock, with one connection."""

    def __init__(self, echo: Echo | None = None, limits: HttpLimits = LIMITS) -> None:
        self.echo = echo or Echo()
        self.clock = VirtualClock()
        self.http = HttpServer(self.echo, limits, (b"x-kept",), lambda: self.clock)
        self.protocol, self.transport = connect(self.http)

    def feed(self, data: bytes) -> None:
        if not self.transport.closing:
            self.protocol.data_received(data)

    def responses(self, *methods: str) -> list[Response]:
        """All that was answered: nothing may be left over."""
        found = read_responses(self.transport.sent, list(methods))
        assert len(found) == len(methods) == self.transport.sent.count(b"HTTP/1.1 ")
        return found

    @property
    def targets(self) -> list[bytes]:
        return [exchange.request.target for exchange in self.echo.asked]


def ask(*requests: bytes, echo: Echo | None = None) -> Server:
    server = Server(echo)
    for request in requests:
        server.feed(request)
    return server


GET = request_bytes("/a", method="GET")

REQUESTS = st.builds(
    lambda method, path, body, headers: (method, request_bytes(path, body, method=method, headers=headers)),
    st.sampled_from(["GET", "POST", "HEAD", "PUT"]),
    st.sampled_from(["/", "/v2", "/v2/models/toy/infer?x=1"]),
    st.binary(max_size=40) | st.lists(st.binary(min_size=1, max_size=20), max_size=4),
    st.dictionaries(
        st.sampled_from(["X-Kept", "X-Other", "Connection"]), st.sampled_from(["keep-alive", "a", "b c"]), max_size=3
    ),
)


@given(st.lists(REQUESTS, min_size=1, max_size=25), st.lists(st.integers(0, 3000), max_size=30), st.booleans())
def test_any_split_of_the_stream_gives_the_same_responses(requests, cuts, hold):
    methods = [method for method, _ in requests]
    stream = b"".join(request for _, request in requests)
    expected = []
    for method, request in requests:
        (found,) = ask(request).responses(method)
        found.headers.pop("date")
        expected.append(found)
    server = Server(Echo(hold=hold))
    edges = [0, *sorted({cut % len(stream) for cut in cuts}), len(stream)]
    for start, end in pairwise(edges):
        server.feed(stream[start:end])
        server.clock.run(server.clock.time())
    done = 0
    while hold and done < len(server.echo.asked):
        server.echo.answer(server.echo.asked[done])
        done += 1
        server.clock.run(server.clock.time())
    found = server.responses(*methods)
    for response in found:
        response.headers.pop("date")
    assert found == expected
    assert not server.transport.closing
    assert not server.transport.paused


def test_requests_sent_ahead_are_answered_in_order_and_bounded():
    server = Server(Echo(hold=True))
    for number in range(17):
        server.feed(request_bytes(f"/{number}", method="GET"))
    assert server.targets == [b"/0"]
    assert not server.transport.paused
    server.feed(request_bytes("/17", method="GET"))
    assert server.transport.paused
    for number in range(18):
        assert len(server.echo.asked) == number + 1
        server.echo.answer(server.echo.asked[number])
    assert not server.transport.paused
    assert [response.body for response in server.responses(*["GET"] * 18)] == [b"GET /%d - " % n for n in range(18)]


def test_bodies_sent_ahead_are_bounded_by_their_size():
    server = Server(Echo(hold=True), HttpLimits())
    big = request_bytes("/", b"x" * 200_000)
    for _ in range(2):
        server.feed(big)
    assert not server.transport.paused
    server.feed(big)
    assert server.transport.paused


def test_one_connection_does_not_hold_up_the_others():
    server = ask(GET * 100)
    assert 16 <= len(server.echo.asked) <= 40
    server.clock.run(0.0)
    assert len(server.responses(*["GET"] * 100)) == 100
    assert not server.transport.paused


def test_a_client_that_goes_away_is_told_once_and_its_answer_dropped():
    server = ask(request_bytes("/1") + request_bytes("/2"), echo=Echo(hold=True))
    server.protocol.connection_lost(None)
    (exchange,) = server.echo.asked
    assert server.echo.lost == [exchange]
    server.echo.answer(exchange)
    assert server.transport.sent == b""
    assert len(server.echo.asked) == 1
    assert server.http.empty.is_set()


def test_a_lost_connection_is_freed_without_the_garbage_collector():
    def alive() -> int:
        return sum(type(thing) is HttpConnection for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        server = ask(GET)
        assert alive() == before + 1
        server.protocol.connection_lost(None)
        server.echo.asked.clear()
        del server.protocol
        assert alive() == before
    finally:
        gc.enable()


# ---- limits ----


def refused(server: Server, status: int, message: str, methods: int = 1) -> None:
    """The last response is this refusal, and then nothing is read any more."""
    found = server.responses(*["GET"] * methods)[-1]
    assert found.status == status
    assert message in found.error
    assert found.headers["connection"] == "close"
    asked = len(server.echo.asked)
    assert server.transport.eof
    assert not server.transport.closing
    server.protocol.data_received(GET)
    assert len(server.echo.asked) == asked
    server.clock.run(server.clock.time() + 1.0)
    assert server.transport.aborted


def test_long_heads_and_targets_are_refused():
    refused(ask(request_bytes("/", headers={"X": "y" * 2001})), 431, "the headers have more than 2000 bytes")
    many = {f"X-{number}": "y" for number in range(500)}
    refused(ask(request_bytes("/", headers=many)), 431, "headers have more than 2000")
    refused(ask(request_bytes("/" + "a" * 300)), 414, "the URL has more than 300 bytes")
    server = ask(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
    for _ in range(4400):
        server.feed(b"y")
    refused(server, 431, "headers have more than 2000")
    assert server.echo.asked == []


def test_long_bodies_are_refused_before_they_are_read():
    declared = request_bytes("/", headers={"Content-Length": "1001"})
    refused(ask(declared), 413, "the body has more than 1000 bytes")
    refused(ask(request_bytes("/", headers={"Content-Length": "1001", "Expect": "100-continue"})), 413, "more than")
    refused(ask(request_bytes("/", [b"x" * 600] * 2)), 413, "the body has more than 1000 bytes")
    assert ask(request_bytes("/", b"x" * 1000)).responses("POST")[0].status == 200
    assert ask(request_bytes("/", [b"x" * 500] * 2)).responses("POST")[0].status == 200


def test_a_body_in_very_many_pieces_is_put_together():
    body = bytes(range(256)) * 3
    server = ask(request_bytes("/", [body[n : n + 1] for n in range(len(body))]))
    assert server.echo.asked[0].request.body == body
    pieces = request_bytes("/", body)
    server = ask(*[pieces[n : n + 1] for n in range(len(pieces))])
    assert server.echo.asked[0].request.body == body


@pytest.mark.parametrize("begin", [b"1;x=", b"0\r\nX: "])
def test_chunks_that_hold_nothing_are_refused(begin):
    server = ask(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", begin)
    for _ in range(30):
        server.feed(b"y" * 100)
    refused(server, 400, "chunks of the body hold too little")
    assert server.echo.asked == []


def test_a_trailer_changes_nothing():
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nX-Kept: a\r\n\r\n"
    server = ask(head + b"1\r\nz\r\n0\r\nX-Kept: b\r\nExpect: 100-continue\r\n\r\n" + GET)
    assert [response.body for response in server.responses("POST", "GET")] == [b"POST / a z", b"GET /a - "]


def test_connections_beyond_the_limit_are_refused():
    server = Server()
    others = [connect(server.http) for _ in range(2)]
    protocol, transport = connect(server.http)
    (found,) = read_responses(transport.sent, ["GET"])
    assert (found.status, found.headers["connection"]) == (503, "close")
    assert "too many connections" in found.error
    assert transport.eof
    protocol.connection_lost(None)
    others[0][0].connection_lost(None)
    protocol, transport = connect(server.http)
    protocol.data_received(GET)
    assert read_responses(transport.sent, ["GET"])[0].status == 200


def test_clients_that_are_sent_away_take_up_no_more_than_a_few_places():
    server = Server()
    transports = [connect(server.http)[1] for _ in range(60)]
    sent_away = [transport for transport in transports if transport.sent]
    assert len(sent_away) == 58
    assert all(read_responses(transport.sent, ["GET"])[0].status == 503 for transport in sent_away)
    assert [transport.closing for transport in sent_away] == [False] * 32 + [True] * 26


# ---- times ----


def drip(server: Server, data: bytes, every_s: float) -> None:
    for place in range(len(data)):
        server.feed(data[place : place + 1])
        server.clock.run(server.clock.time() + every_s)


def test_a_head_that_drips_in_is_408():
    server = Server()
    drip(server, b"GET /a HTTP/1.1\r\nHost: x", 0.1)
    refused(server, 408, "the head of the request did not come in time")


def test_a_body_that_drips_in_is_408():
    server = Server()
    drip(server, request_bytes("/", b"x" * 30), 0.02)
    assert server.responses("POST")[0].status == 200
    server = ask(request_bytes("/", headers={"Content-Length": "100"}))
    drip(server, b"x" * 50, 0.1)
    refused(server, 408, "the whole body did not come in time")


def test_each_request_has_its_own_time():
    server = Server()
    for _ in range(10):
        server.feed(GET[:9])
        server.clock.run(server.clock.time() + 0.5)
        server.feed(GET[9:])
    assert len(server.responses(*["GET"] * 10)) == 10


def test_a_body_has_its_own_time():
    server = Server()
    request = request_bytes("/", b"xy")
    server.feed(request[:9])
    server.clock.run(0.5)
    server.feed(request[9:-1])
    server.clock.run(2.2)
    server.feed(request[-1:])
    assert server.responses("POST")[0].status == 200


def test_what_we_do_not_read_is_not_late():
    server = ask(GET * 20 + GET[:9], echo=Echo(hold=True))
    assert server.transport.paused
    server.clock.run(100.0)
    for number in range(20):
        server.echo.answer(server.echo.asked[number])
    server.feed(GET[9:])
    server.echo.answer(server.echo.asked[20])
    assert {response.status for response in server.responses(*["GET"] * 21)} == {200}


def test_a_slow_answer_is_not_the_clients_fault():
    server = ask(GET + GET[:9], echo=Echo(hold=True))
    server.feed(GET[9:])
    server.clock.run(100.0)
    assert server.transport.sent == b""
    for number in (0, 1):
        server.echo.answer(server.echo.asked[number])
    assert len(server.responses("GET", "GET")) == 2
    assert not server.transport.closing


@pytest.mark.parametrize("sent", [b"", GET, b"\r\n" * 3])
def test_an_idle_connection_is_closed(sent):
    server = Server()
    if sent:
        server.feed(sent)
    server.clock.run(4.9)
    assert not server.transport.closing
    server.clock.run(10.1)
    assert server.transport.closing
    assert not server.transport.aborted
    server.clock.run(20.0)  # it is still there: the client does not read what is left
    assert server.transport.aborted


def test_a_used_connection_is_not_idle():
    server = Server()
    for number in range(20):
        server.clock.run(4.0 * number)
        server.feed(GET)
    assert not server.transport.closing
    server.protocol.connection_lost(None)
    server.clock.run()
    assert not server.transport.aborted


# ---- writing ----


def test_a_client_that_does_not_read_is_not_asked_for_more_and_closed_in_the_end():
    server = ask(GET * 3, echo=Echo(hold=True))
    server.protocol.pause_writing()
    server.echo.answer(server.echo.asked[0])
    assert len(server.echo.asked) == 1
    server.protocol.resume_writing()
    assert len(server.echo.asked) == 2
    server.clock.run(20.0)
    assert not server.transport.closing
    server.protocol.pause_writing()
    server.clock.run(22.9)
    assert not server.transport.aborted
    server.clock.run(26.1)
    assert server.transport.aborted


def test_nothing_is_begun_while_a_client_does_not_read():
    server = Server()
    server.protocol.pause_writing()
    server.feed(GET)
    assert server.echo.asked == []
    server.protocol.resume_writing()
    assert server.responses("GET")[0].status == 200
    server.protocol.pause_writing()
    server.protocol.connection_lost(None)
    server.clock.run()
    assert not server.transport.aborted


def test_a_large_body_is_written_whole():
    server = ask(GET, echo=Echo(padding=b"x" * 200_000))
    assert server.responses("GET")[0].body == b"GET /a - " + b"x" * 200_000


# ---- who keeps the connection ----


def test_http_1_0_is_closed_unless_it_asks():
    server = ask(b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", b"GET /a HTTP/1.0\r\n\r\n")
    first, second = server.responses("GET", "GET")
    assert (first.headers["connection"], second.headers["connection"]) == ("keep-alive", "close")
    assert server.transport.closing


def test_what_follows_the_last_request_is_not_read():
    server = ask(request_bytes("/a", method="GET", headers={"Connection": "close"}) + GET)
    assert server.responses("GET")[0].headers["connection"] == "close"
    assert server.transport.closing


def test_head_has_no_body():
    server = ask(request_bytes("/a", method="HEAD") + GET)
    head, _ = server.responses("HEAD", "GET")
    assert head.headers["content-length"] == str(len(b"HEAD /a - "))


UPGRADE = {
    "Connection": "Upgrade, HTTP2-Settings",
    "Upgrade": "h2c",
    "HTTP2-Settings": "AAEAAEAA",
}


@pytest.mark.parametrize("body", [b"", b"xyz", [b"x", b"yz"], b"GET / HTTP/1.1\r\n\r\n"])
def test_an_upgrade_is_answered_as_if_it_were_none(body):
    for upgrade in (UPGRADE, {"Connection": "upgrade", "Upgrade": "websocket"}):
        server = ask(request_bytes("/a", body, headers=upgrade) + GET + request_bytes("/b", body, headers=upgrade), GET)
        plain = b"".join(body) if isinstance(body, list) else body
        posted = [b"POST /a - " + plain, b"POST /b - " + plain]
        found = [response.body for response in server.responses("POST", "GET", "POST", "GET")]
        assert found == [posted[0], b"GET /a - ", posted[1], b"GET /a - "]
        assert not server.transport.closing


def test_the_last_request_may_ask_for_an_upgrade_too():
    server = ask(request_bytes("/a", b"x", headers={**UPGRADE, "Connection": "close, Upgrade"}) + GET)
    assert [response.body for response in server.responses("POST")] == [b"POST /a - x"]
    assert server.transport.closing


def test_an_upgrade_that_waits_for_leave_to_send_gets_it():
    headers = {**UPGRADE, "Expect": "100-continue", "Content-Length": "3"}
    server = ask(request_bytes("/a", headers=headers))
    assert server.transport.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    server.transport.sent = b""
    server.feed(b"xyz" + GET)
    assert [response.body for response in server.responses("POST", "GET")] == [b"POST /a - xyz", b"GET /a - "]


def test_a_tunnel_is_the_last_request():
    server = ask(b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n" + GET)
    assert [response.headers["connection"] for response in server.responses("CONNECT")] == ["close"]


@pytest.mark.parametrize("host", [b"a", b"a:80", b"[::1]:8000", b"127.0.0.1", b"", b"a_b.c-d", b"%41"])
def test_a_host_is_a_name_and_a_port(host):
    request = b"GET /a HTTP/1.1\r\nHost: %b\r\n\r\n" % host
    assert [found.status for found in ask(request, request).responses("GET", "GET")] == [200, 200]


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"X: a\r\n",
        b"Host: a\r\nHost: a\r\n",
        b"Host: a\r\nHost: b\r\n",
        b"Host:\r\nHost:\r\n",
        b"Host: a b\r\n",
        b"Host: a/c\r\n",
        b"Host: u@a\r\n",
        b"Host: a:b\r\n",
        b"Host: a:123456\r\n",
        b"Host: [a\r\n",
        b"Host: a, b\r\n",
        b"Host: %4\r\n",
        b"Host: a\\b\r\n",
    ],
)
def test_without_one_right_host_it_is_400(lines):
    server = ask(GET + b"GET /a HTTP/1.1\r\n" + lines + b"\r\n" + GET)
    refused(server, 400, "the Host header", methods=2)
    assert len(server.echo.asked) == 1


def test_leave_to_send_is_given_when_it_is_the_requests_turn():
    head = request_bytes("/", headers={"Content-Length": "2", "Expect": "100-continue"})
    server = ask(head)
    assert server.transport.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    server.feed(b"xy")
    assert server.transport.sent.count(b"HTTP/1.1 200") == 1
    server = ask(GET + head, echo=Echo(hold=True))
    assert server.transport.sent == b""
    server.echo.answer(server.echo.asked[0])
    assert server.transport.sent.endswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert ask(head.replace(b"HTTP/1.1", b"HTTP/1.0")).transport.sent == b""


def test_a_handler_may_ask_for_the_end_but_not_lose_what_was_sent_ahead():
    server = ask(GET * 3, echo=Echo(last=True, hold=True))
    for number in range(3):
        server.echo.answer(server.echo.asked[number])
    found = server.responses("GET", "GET", "GET")
    assert ["connection" in response.headers for response in found] == [False, False, True]
    assert server.transport.closing


def test_a_server_that_closes_answers_what_was_sent_to_it():
    server = ask(GET, echo=Echo(hold=True))
    idle, idle_transport = connect(server.http)
    idle.data_received(b"\r\n")
    half, half_transport = connect(server.http)
    half.data_received(GET[:9])
    server.http.close()
    assert idle_transport.closing
    assert not half_transport.closing
    assert not server.transport.closing
    half.data_received(GET[9:])
    for exchange in server.echo.asked:
        server.echo.answer(exchange)
    for transport in (server.transport, half_transport):
        assert read_responses(transport.sent, ["GET"])[0].headers["connection"] == "close"
        assert transport.closing
    for protocol in (server.protocol, idle, half):
        assert not server.http.empty.is_set()
        protocol.connection_lost(None)
    assert server.http.empty.is_set()


def test_a_server_that_closes_waits_a_moment_for_those_who_just_connected():
    server = Server()
    server.http.close()
    late, late_transport = connect(server.http)
    silent, silent_transport = connect(server.http)
    for protocol, transport in ((server.protocol, server.transport), (late, late_transport)):
        assert not transport.closing
        protocol.data_received(GET[:9])
        server.clock.run(server.clock.time() + 0.3)
        protocol.data_received(GET[9:])
        (found,) = read_responses(transport.sent, ["GET"])
        assert (found.status, found.headers["connection"]) == (200, "close")
    server.clock.run(server.clock.time() + 1.1)
    assert silent_transport.closing
    for protocol in (server.protocol, late, silent):
        protocol.connection_lost(None)
    assert server.http.empty.is_set()


# ---- what is no request, or two at once ----

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("upgrade", [b"", b"Connection: upgrade\r\nUpgrade: h2c\r\n"])
@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 3\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3",
        b"Content-Length: 3\r\nContent-Length: 4",
        b"Content-Length: 3, 4",
        b"Content-Length : 3",
        b"Content-Length: +3",
        b"Content-Length: 0x3",
        b"Content-Length: 99999999999999999999999",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding:\r\n chunked",
        b"X: a\nTransfer-Encoding: chunked",
        b"X: a\x00b",
        b": no name",
    ],
)
def test_a_request_whose_end_is_doubtful_ends_the_connection(head, upgrade):
    server = ask(b"POST / HTTP/1.1\r\nHost: x\r\n" + upgrade + head + b"\r\n\r\n0\r\n\r\n" + SMUGGLED)
    (found,) = server.responses("POST")
    assert found.status in (400, 501)
    assert found.headers["connection"] == "close"
    assert found.error
    assert server.echo.asked == []


@pytest.mark.parametrize("version", [b"2.0", b"0.9"])
@pytest.mark.parametrize("more", [b"", b"Connection: keep-alive\r\n"])
def test_other_versions_are_refused(version, more):
    refused(
        ask(b"GET / HTTP/" + version + b"\r\nHost: x\r\n" + more + b"\r\n"), 505, "this version of HTTP is not offered"
    )


def test_chunks_in_http_1_0_are_refused():
    refused(
        ask(b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED),
        400,
        "Transfer-Encoding needs HTTP/1.1",
    )


def test_what_is_no_request_is_refused_after_the_answers_before_it():
    server = ask(GET + b"nonsense\r\n\r\n" + GET, echo=Echo(hold=True))
    assert server.transport.sent == b""
    server.echo.answer(server.echo.asked[0])
    refused(server, 400, "Invalid HTTP request received.", methods=2)
    assert len(server.echo.asked) == 1


def test_an_error_of_ours_while_reading_is_logged_and_ends_the_connection(caplog):
    class Broken(Echo):
        def handle(self, exchange):
            raise ZeroDivisionError("secret detail")

    server = ask(GET, echo=Broken())
    assert server.transport.aborted
    assert server.transport.sent == b""
    assert "ZeroDivisionError" in caplog.text


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_any_bytes_are_answered_with_errors_only(data, cuts):
    server = Server()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in pairwise(edges):
        server.feed(data[start:end])
    for response in read_responses(server.transport.sent, ["GET"] * 9):
        assert response.status == 400 or server.echo.asked
        assert orjson.loads(response.body) or server.echo.asked


def test_the_timers_end_with_the_connections():
    server = ask(GET)
    held = [*vars(server.http).values(), *server.http.patience.values()]
    sweepers = [value for value in held if isinstance(value, Sweeper)]
    assert len(sweepers) == 5
    server.protocol.connection_lost(None)
    server.clock.run()  # would not end if anything stayed in a sweeper
    assert not any(sweeper._young or sweeper._old for sweeper in sweepers)


def test_the_date_is_that_of_now():
    server = Server()
    now = [0.0]
    server.http.heads._wall_clock = lambda: now[0]
    for now[0] in (0.2, 0.9, 86_400.0):
        server.feed(GET)
    dates = [response.headers["date"] for response in server.responses("GET", "GET", "GET")]
    assert dates == ["Thu, 01 Jan 1970 00:00:00 GMT"] * 2 + ["Fri, 02 Jan 1970 00:00:00 GMT"]


# ---- answers without an end ----


def begun():
    server = Server(Echo(hold=True))
    server.feed(GET + request_bytes("/behind", method="GET"))
    exchange = server.echo.asked[0]
    exchange.begin(200, b"content-type: text/event-stream\r\n")
    return server, exchange


def test_an_answer_without_an_end_is_sent_in_parts_and_says_that_the_connection_ends_it():
    server, exchange = begun()
    exchange.send(b"data: 1\n\n")
    exchange.send(b"data: 2\n\n")
    head, _, body = server.transport.sent.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\ncontent-type: text/event-stream\r\nconnection: close" in head
    assert b"content-length" not in head
    assert body == b"data: 1\n\ndata: 2\n\n"
    assert server.http.responses == {200: 1}


def test_nothing_behind_an_answer_without_an_end_is_read():
    server, exchange = begun()
    server.feed(GET * 100)
    assert server.targets == [b"/a"]
    assert not server.transport.paused
    server.protocol.connection_lost(None)
    assert server.echo.lost == [exchange]
    exchange.send(b"late")
    assert b"late" not in server.transport.sent


def test_who_does_not_read_misses_parts_and_is_cut_off_in_the_end():
    server, exchange = begun()
    server.protocol.pause_writing()
    exchange.send(b"missed")
    server.protocol.resume_writing()
    exchange.send(b"read")
    assert server.transport.sent.endswith(b"\r\n\r\nread")
    server.protocol.pause_writing()
    server.clock.run()
    assert server.transport.aborted
    assert server.clock.time() <= 2 * LIMITS.write_timeout_s


def test_a_server_that_closes_ends_answers_without_an_end_at_once():
    server, exchange = begun()
    server.http.close()
    assert server.transport.closing
    assert not server.transport.aborted
    exchange.send(b"late")
    assert b"late" not in server.transport.sent


# ---- what is counted ----


def test_every_answer_is_counted_by_its_status():
    server = Server()
    server.feed(GET)
    server.feed(GET)
    server.feed(b"BROKEN\r\n\r\n")
    assert server.http.responses == {200: 2, 400: 1}


def test_a_request_says_when_its_first_byte_came(monkeypatch):
    times = iter([10.0, 11.0, 12.0])
    monkeypatch.setattr("evenkeel.serving.http.connection.monotonic", lambda: next(times))
    server = Server()
    server.feed(GET + GET[:5])
    server.feed(GET[5:-2])
    server.feed(GET[-2:] + GET)
    assert [exchange.request.since_s for exchange in server.echo.asked] == [10.0, 10.0, 12.0]
