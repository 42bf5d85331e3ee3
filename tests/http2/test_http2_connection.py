"""One end of HTTP/2: a server and a client that talk to each other, in whatever pieces; and peers that break rules."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import Http2Error
from evenkeel.http2.connection import PREFACE, REFUSED_STREAM, Http2Connection, Http2Limits
from evenkeel.http2.hpack import write_headers

LIMITS = Http2Limits(streams=4, window_bytes=1 << 17, connection_bytes=1 << 18)
HEAD = write_headers([(b":method", b"POST"), (b":path", b"/a/b")])
HEADERS = ((b":method", b"POST"), (b":path", b"/a/b"))
DONE = write_headers([(b"grpc-status", b"0")])


class End:
    """One end, what it heard, and what it wants to send."""

    def __init__(self, client: bool, limits: Http2Limits = LIMITS) -> None:
        self.heard: list[tuple] = []
        self.out = b""
        self.rooms = 0
        self.http2 = Http2Connection(self, self.write, limits, client=client)

    def write(self, data: bytes) -> None:
        self.out += bytes(data)

    def take(self) -> bytes:
        data, self.out = self.out, b""
        return data

    def on_headers(self, stream, headers, ended):
        self.heard.append(("headers", stream, headers, ended))

    def on_data(self, stream, data, ended):
        if self.heard and self.heard[-1][:2] == ("data", stream):
            data = self.heard.pop()[2] + data  # how it was cut says nothing
        self.heard.append(("data", stream, data, ended))
        self.http2.give_room(stream, len(data))

    def on_reset(self, stream, code):
        self.heard.append(("reset", stream, code))

    def on_goaway(self, code):
        self.heard.append(("goaway", code))

    def on_room(self, stream):
        self.rooms += 1


def talk(client: End, server: End, chance: random.Random | None = None) -> None:
    """Exchange what both want to send, cut anyhow, until nothing is left."""
    while client.out or server.out:
        for one, other in ((client, server), (server, client)):
            data = one.take()
            edges = [0, len(data)]
            if chance is not None:
                edges += [chance.randrange(len(data) + 1) for _ in range(chance.randrange(4))]
            for start, end in pairwise(sorted(edges)):
                other.http2.feed(data[start:end])


def both(limits: Http2Limits = LIMITS) -> tuple[End, End]:
    client, server = End(True), End(False, limits)
    talk(client, server)
    assert client.http2.settled
    assert server.http2.settled
    return client, server


def test_a_call_and_its_answer():
    client, server = both()
    assert client.http2.open(HEAD, b"question") == 1
    talk(client, server)
    assert server.heard == [("headers", 1, HEADERS, False), ("data", 1, b"question", True)]
    server.http2.send(1, write_headers([(b":status", b"200")]), b"answer", DONE)
    talk(client, server)
    assert client.heard == [
        ("headers", 1, ((b":status", b"200"),), False),
        ("data", 1, b"answer", False),
        ("headers", 1, ((b"grpc-status", b"0"),), True),
    ]
    assert client.http2.open_streams == server.http2.open_streams == 0


@given(st.integers(0, 2**32), st.lists(st.integers(0, 300_000), min_size=1, max_size=4))
def test_any_cutting_gives_the_same_and_large_data_waits_for_room(seed, sizes):
    chance = random.Random(seed)
    client, server = End(True), End(False)
    bodies = [chance.randbytes(size) for size in sizes]
    for body in bodies:
        client.http2.open(HEAD, body)
    talk(client, server, chance)
    assert not client.http2.blocked
    found = dict.fromkeys(range(1, 2 * len(bodies), 2), b"")
    ended = set()
    for kind, stream, *rest in server.heard:
        if kind == "data":
            found[stream] += rest[0]
        if rest[-1]:
            ended.add(stream)
    assert list(found.values()) == bodies
    assert ended == set(found)
    for stream, body in zip(found, bodies, strict=True):
        server.http2.send(stream, b"", body, DONE)
    talk(client, server, chance)
    assert client.http2.open_streams == server.http2.open_streams == 0
    answered = dict.fromkeys(found, b"")
    for kind, stream, *rest in client.heard:
        if kind == "data":
            answered[stream] += rest[0]
    assert list(answered.values()) == bodies


def test_more_streams_than_allowed_are_refused_and_those_before_go_on():
    client, server = both()
    for _ in range(5):
        client.http2.open(HEAD, b"", ended=False)
    talk(client, server)
    assert client.heard == [("reset", 9, REFUSED_STREAM)]
    assert server.http2.open_streams == 4


def test_a_stream_that_is_given_up_is_over_on_both_sides():
    client, server = both()
    client.http2.open(HEAD, b"x", ended=False)
    talk(client, server)
    client.http2.reset(1, 8)
    talk(client, server)
    assert server.heard[-1] == ("reset", 1, 8)
    server.http2.send(1, b"", b"late", DONE)
    assert not server.out


def test_an_answer_before_the_question_has_come_stops_it():
    client, server = both()
    client.http2.open(HEAD, b"x", ended=False)
    talk(client, server)
    server.http2.send(1, b"", b"", DONE)
    talk(client, server)
    assert client.heard == [("headers", 1, ((b"grpc-status", b"0"),), True), ("reset", 1, 0)]
    assert server.http2.open_streams == 0
    server.http2.feed(frame(0, 0, 1, b"more"))  # on its way meanwhile
    assert server.heard[-1] == ("data", 1, b"x", False)


def test_leaving_tells_which_streams_are_not_begun():
    client, server = both()
    client.http2.open(HEAD, b"")
    server.http2.feed(client.take())
    client.http2.open(HEAD, b"")
    server.http2.leave()
    client.http2.feed(server.take())
    assert client.heard == [("goaway", 0), ("reset", 3, REFUSED_STREAM)]
    assert client.http2.open_streams == 1


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


SETTINGS = frame(4, 0, 0)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(6, 0, 0, bytes(8)), 1),  # before SETTINGS
        (SETTINGS + frame(0, 0, 1, b"x"), 5),  # data of a stream that was never opened
        (SETTINGS + frame(1, 5, 2, HEAD), 1),  # a server's number
        (SETTINGS + frame(1, 5, 0, HEAD), 1),
        (SETTINGS + frame(1, 4, 1, HEAD) + frame(1, 4, 1, HEAD), 1),  # trailers that end nothing
        (SETTINGS + frame(1, 5, 1, HEAD) + frame(0, 0, 1, b"x"), 5),  # data behind the end
        (SETTINGS + frame(1, 1, 1, HEAD) + frame(6, 0, 0, bytes(8)), 1),  # a block that does not go on
        (SETTINGS + frame(9, 4, 1, HEAD), 1),  # a block that goes on without a beginning
        (SETTINGS + frame(1, 1, 1, HEAD) + 20 * frame(9, 0, 1, bytes(1000)), 11),  # a block without an end
        (SETTINGS + frame(1, 0x2D, 1, b"\x00abc"), 6),
        (SETTINGS + frame(1, 0xD, 1, b"\x09" + HEAD[:4]), 1),  # more padding than bytes
        (SETTINGS + frame(3, 0, 1, bytes(4)), 1),
        (SETTINGS + frame(3, 0, 1, bytes(3)), 6),
        (SETTINGS + frame(4, 0, 1), 1),
        (SETTINGS + frame(4, 0, 0, bytes(5)), 6),
        (SETTINGS + frame(4, 0, 0, b"\x00\x02\x00\x00\x00\x02"), 1),
        (SETTINGS + frame(4, 0, 0, b"\x00\x04\x80\x00\x00\x00"), 3),
        (SETTINGS + frame(4, 0, 0, b"\x00\x05\x00\x00\x00\x01"), 1),
        (SETTINGS + frame(5, 0, 1, bytes(4)), 1),
        (SETTINGS + frame(6, 0, 0, bytes(7)), 6),
        (SETTINGS + frame(6, 0, 1, bytes(8)), 1),
        (SETTINGS + frame(7, 0, 0, bytes(7)), 6),
        (SETTINGS + frame(8, 0, 0, bytes(4)), 1),
        (SETTINGS + frame(8, 0, 0, b"\x7f\xff\xff\xff"), 3),
        (SETTINGS + frame(8, 0, 1, b"\x00\x00\x00\x01"), 1),
        (SETTINGS + frame(2, 0, 1, bytes(4)), 6),
        (SETTINGS + b"\x00\x40\x01\x00\x00\x00\x00\x00\x01", 6),  # a frame that is too large
        (SETTINGS + frame(1, 4, 1, b"\xff\xff\xff\xff\xff"), 9),
        (SETTINGS + 1200 * frame(6, 0, 0, bytes(8)), 11),
        (SETTINGS + 1200 * frame(4, 0, 0), 11),
        (SETTINGS + frame(4, 0, 0, 33 * b"\x00\x04\x00\x00\xff\xff"), 11),  # each would change every stream
        (SETTINGS + frame(1, 4, 1, HEAD) + 1200 * frame(0, 0, 1), 11),
        (SETTINGS + b"".join(frame(1, 4, 2 * n + 1, HEAD) + frame(3, 0, 2 * n + 1, bytes(4)) for n in range(1002)), 11),
    ],
)
def test_who_breaks_a_rule_is_told_which_and_nothing_more_is_read(sent, code):
    server = End(False)
    with pytest.raises(Http2Error) as caught:
        server.http2.feed(PREFACE + sent)
    assert caught.value.code == code
    said = server.out[server.out.rindex(b"\x07\x00\x00\x00\x00\x00") :]  # GOAWAY
    assert said[10:14] == bytes([0, 0, 0, code])
    assert server.http2.over
    heard = list(server.heard)
    server.http2.feed(frame(6, 0, 0, bytes(8)))
    assert server.heard == heard


def test_who_does_not_speak_http2_gets_none_of_it():
    server = End(False)
    with pytest.raises(Http2Error, match="speaks HTTP/2"):
        server.http2.feed(b"GET / HTTP/1.1\r\n")
    assert server.out == b""


def test_a_peer_that_sends_more_than_there_is_room_for_is_stopped():
    _, server = both(Http2Limits(window_bytes=1 << 17, connection_bytes=1 << 18))
    server.on_data = lambda *heard: None  # which gives no room
    server.http2.feed(frame(1, 4, 1, HEAD) + 8 * frame(0, 0, 1, bytes(16384)))
    with pytest.raises(Http2Error) as caught:
        server.http2.feed(frame(0, 0, 1, b"x"))
    assert caught.value.code == 3


def test_settings_change_the_room_of_open_streams():
    _, server = both()
    server.http2.feed(frame(4, 0, 0, b"\x00\x04\x00\x00\x00\x03") + frame(1, 5, 1, HEAD))
    server.take()
    server.http2.send(1, b"", b"abcdef", DONE)
    assert server.take() == frame(0, 0, 1, b"abc")
    assert server.http2.blocked
    server.http2.feed(frame(4, 0, 0, b"\x00\x04\x00\x00\x00\x04"))
    assert server.take() == frame(4, 1, 0) + frame(0, 0, 1, b"d")
    server.http2.feed(frame(8, 0, 1, b"\x00\x00\x00\x09"))
    assert server.take() == frame(0, 0, 1, b"ef") + frame(1, 5, 1, DONE)
    assert not server.http2.blocked
    assert server.rooms == 1


def test_what_a_peer_gives_up_does_not_count_as_waiting_any_more():
    _, server = both()
    server.http2.feed(frame(4, 0, 0, b"\x00\x04\x00\x00\x00\x03") + frame(1, 5, 1, HEAD) + frame(1, 5, 3, HEAD))
    server.http2.send(1, b"", b"abcdef", DONE)
    server.http2.send(3, b"", b"abcdef", DONE)
    assert server.http2.longest_blocked == 1
    server.http2.feed(frame(3, 0, 1, b"\x00\x00\x00\x08"))
    assert (server.http2.is_blocked(1), server.http2.longest_blocked, server.rooms) == (False, 3, 1)
    server.http2.reset(3, 8)
    assert (server.http2.blocked, server.http2.longest_blocked, server.rooms) == (False, 0, 2)
