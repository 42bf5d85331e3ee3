"""What one client can use up, and for how long: on a clock of our own, without a socket."""

import dataclasses

import pytest

from evenkeel.clock import VirtualClock
from evenkeel.errors import UnauthenticatedError
from evenkeel.http2.connection import PREFACE, Http2Limits
from evenkeel.http2.grpc import frame_message
from evenkeel.http2.hpack import HeaderReader, write_headers
from evenkeel.serving.grpc.connection import Ask, GrpcLimits, GrpcMethod, GrpcServer
from http_helpers import FakeTransport

SETTINGS = bytes(3) + b"\x04" + bytes(5)


class Handler:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.left: list[Ask] = []

    def method(self, path: bytes) -> GrpcMethod | None:
        return {b"/a/One": GrpcMethod(), b"/a/Many": GrpcMethod(streams=True)}.get(path)

    def handle(self, ask: Ask) -> None:
        self.asks.append(ask)

    def gone(self, ask: Ask) -> None:
        self.left.append(ask)


class Peer:
    """A client of a server on a virtual clock."""

    def __init__(self, access=None, **limits) -> None:
        self.clock = VirtualClock()
        self.handler = Handler()
        self.server = GrpcServer(self.handler, GrpcLimits(**limits), clock=lambda: self.clock, access=access)
        self.connection, self.transport = self.connect()
        self.connection.data_received(PREFACE + SETTINGS)

    def connect(self):
        connection, transport = self.server.connect(), FakeTransport()
        connection.connection_made(transport)
        return connection, transport

    def call(self, stream=1, path=b"/a/One", ended=False, **headers):
        fields = [(b":method", b"POST"), (b":path", path), (b"content-type", b"application/grpc")]
        fields += [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
        self.frame(1, 5 if ended else 4, stream, write_headers(fields))

    def data(self, payload, stream=1, ended=False):
        for start in range(0, len(payload) or 1, 16384):
            last = ended and start + 16384 >= len(payload)
            self.frame(0, last, stream, payload[start : start + 16384])

    def frame(self, kind, flags, stream, payload=b""):
        self.connection.data_received(len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload)

    def frames(self):
        """What was sent so far: (kind, stream, headers or payload)."""
        reader, sent, found = HeaderReader(), self.transport.sent, []
        while sent:
            size, kind, stream = int.from_bytes(sent[:3]), sent[3], int.from_bytes(sent[5:9])
            payload = sent[9 : 9 + size]
            found.append((kind, stream, dict(reader.read(payload)) if kind == 1 else payload))
            sent = sent[9 + size :]
        return found

    def statuses(self):
        return [found[b"grpc-status"] for kind, _, found in self.frames() if kind == 1 and b"grpc-status" in found]

    def messages(self):
        return [found for kind, _, found in self.frames() if kind == 0]


def test_a_call_is_handed_over_whole_and_answered():
    peer = Peer()
    peer.call(grpc_timeout=b"5S")
    peer.data(frame_message(b"question")[:7])
    assert not peer.handler.asks
    peer.data(frame_message(b"question")[7:], ended=True)
    (ask,) = peer.handler.asks
    assert ask.message == b"question"
    assert ask.until_s == peer.clock.time() + 5
    ask.respond(b"answer")
    ask.respond(b"again")
    assert peer.messages() == [frame_message(b"answer")]
    assert peer.statuses() == [b"0"]
    assert not peer.handler.left


def test_the_rest_of_a_message_is_not_waited_for_for_ever():
    peer = Peer(message_timeout_s=10)
    peer.call()
    peer.data(b"\0\0")
    peer.call(3, b"/a/Many")  # which may be quiet for as long as it likes
    peer.clock.run(25)
    assert peer.statuses() == [b"4"]
    peer.data(b"\0", stream=3)
    peer.clock.run(50)
    assert peer.statuses() == [b"4", b"4"]


def test_an_idle_connection_is_asked_to_leave_and_closed_when_it_does_not():
    peer = Peer(keep_alive_s=10, linger_s=1)
    peer.call()
    peer.clock.run(30)
    assert not peer.transport.closing, "a call is under way"
    peer.data(frame_message(b""), ended=True)
    peer.handler.asks[0].respond(b"")
    peer.clock.run(55)
    assert [kind for kind, *_ in peer.frames()][-1] == 7
    assert peer.transport.closing


def test_who_does_not_read_is_closed():
    peer = Peer(write_timeout_s=5)
    peer.frame(4, 0, 0, b"\x00\x04\x00\x00\x00\x02")  # takes two bytes
    peer.call()
    peer.data(frame_message(b""), ended=True)
    peer.handler.asks[0].respond(b"a long answer")
    assert peer.messages() == [b"\0\0"]
    peer.clock.run(11)
    assert peer.transport.aborted


def test_a_peer_that_reads_again_is_not():
    peer = Peer(write_timeout_s=5)
    peer.frame(4, 0, 0, b"\x00\x04\x00\x00\x00\x02")
    peer.call()
    peer.data(frame_message(b""), ended=True)
    peer.handler.asks[0].respond(b"a long answer")
    peer.frame(8, 0, 1, b"\0\0\0\x50")
    peer.clock.run(60)
    assert b"".join(peer.messages()) == frame_message(b"a long answer")
    assert not peer.transport.closing


WINDOW_OF_TWO = b"\x00\x04\x00\x00\x00\x02"


def test_a_call_that_is_given_up_before_its_answer_was_read_ends_no_others():
    peer = Peer(write_timeout_s=5)
    peer.frame(4, 0, 0, WINDOW_OF_TWO)
    for stream in (1, 3):
        peer.call(stream)
        peer.data(frame_message(b""), stream, ended=True)
    peer.handler.asks[0].respond(b"a long answer")
    peer.frame(3, 0, 1, bytes(4))
    peer.clock.run(60)
    assert not peer.transport.closing
    peer.frame(8, 0, 3, b"\0\0\0\x50")
    peer.handler.asks[1].respond(b"another")
    assert peer.messages()[1:] == [frame_message(b"another")]


def test_one_who_reads_is_not_closed_though_something_always_waits():
    peer = Peer(write_timeout_s=5)
    peer.frame(4, 0, 0, WINDOW_OF_TWO)
    for turn in range(20):  # the next answer waits before the last one is read
        stream = 2 * turn + 1
        peer.call(stream)
        peer.data(frame_message(b""), stream, ended=True)
        peer.handler.asks[turn].respond(b"a long answer")
        peer.clock.run(3 * turn)
        if turn:
            peer.frame(8, 0, stream - 2, b"\0\0\0\x50")
    assert not peer.transport.closing
    peer.clock.run(100)
    assert peer.transport.aborted, "the last one was never read"


def test_a_client_that_takes_room_and_does_not_read_is_closed_though_a_stream_is_open():
    peer = Peer(write_timeout_s=5)
    peer.frame(4, 0, 0, WINDOW_OF_TWO)
    peer.call(1, b"/a/Many")
    peer.call(3)
    peer.data(frame_message(b""), 3, ended=True)
    peer.handler.asks[0].respond(b"a long answer")
    write = peer.transport.write

    def fill(data):
        write(data)
        peer.connection.pause_writing()  # as a transport does whose socket takes no more

    peer.connection._http2._write = fill
    peer.frame(8, 0, 3, b"\0\0\0\x50")
    peer.clock.run(20)
    assert peer.transport.aborted


def test_small_messages_are_counted_too_in_whole_and_in_part():
    peer = Peer(bodies_bytes=300_000, free_bytes=60_000, ahead=2)
    small = frame_message(bytes(50_000))
    peer.call(1, b"/a/Many")
    peer.data(4 * small, 1)  # two are at work, two wait
    assert len(peer.handler.asks) == 2
    assert peer.server.held_bytes == 200_000
    for stream in (3, 5, 7):
        peer.call(stream)
        peer.data(small[:40_000], stream)
    assert peer.statuses() == [b"14"]
    assert peer.server.held_bytes == 280_000
    other, transport = peer.connect()
    peer.connection, first = other, peer.connection
    other.data_received(PREFACE + SETTINGS)
    for stream in (1, 3):
        peer.call(stream)
        peer.data(small[:40_000], stream)
    peer.transport, mine = transport, peer.transport
    assert peer.statuses() == [b"14"], "a connection with few bytes is not refused"
    other.abort()
    other.connection_lost(None)
    peer.connection, peer.transport = first, mine
    for ask in peer.handler.asks:  # it grows
        ask.respond(b"")
    for stream in (3, 5):
        peer.frame(3, 0, stream, bytes(4))
    assert len(peer.handler.asks) == 4
    assert peer.server.held_bytes == 0


def test_a_stream_ends_when_its_key_is_good_no_more():
    class Keys:
        def admit(self, right, authorization, certificate, peer, local=False):
            if authorization != f"Bearer {good}":
                raise UnauthenticatedError("this key is not known here")

    good = "one"
    peer = Peer(access=Keys())
    peer.call(1, b"/a/Many", authorization=b"Bearer one")
    peer.data(frame_message(b"first") + frame_message(b"second"))
    good = "two"
    peer.data(frame_message(b"third"))
    assert [ask.message for ask in peer.handler.asks] == [b"first", b"second"]
    assert [ask.message for ask in peer.handler.left] == [b"first", b"second"]
    assert peer.statuses() == [b"16"]


def test_a_stream_whose_answers_nobody_reads_is_not_read_either():
    peer = Peer(ahead=2)
    peer.frame(4, 0, 0, bytes([0, 4, 0, 0, 0, 0]))  # takes nothing
    peer.call(1, b"/a/Many")
    peer.data(b"".join(frame_message(b"%d" % number) for number in range(50)))
    for ask in peer.handler.asks:
        ask.respond(b"answer")
    assert len(peer.handler.asks) == 2
    peer.frame(8, 0, 1, b"\0\0\x50\0")
    for ask in peer.handler.asks:  # it grows
        ask.respond(b"answer")
    peer.data(b"", ended=True)
    assert [ask.message for ask in peer.handler.asks] == [b"%d" % number for number in range(50)]
    assert b"".join(peer.messages()) == 50 * frame_message(b"answer")
    assert peer.statuses() == [b"0"]


def test_all_messages_together_are_bounded_and_let_go_of():
    peer = Peer(bodies_bytes=300_000, free_bytes=60_000)
    large = frame_message(bytes(200_000))
    for stream in (1, 3):
        peer.call(stream)
        peer.data(large, stream, ended=True)
    assert len(peer.handler.asks) == 1, "a lone one is never refused"
    assert peer.statuses() == [b"14"]
    assert peer.server.held_bytes == 200_000
    peer.call(5)
    peer.data(large[:150_000], 5)  # half of one counts as well
    assert peer.statuses() == [b"14", b"14"]
    peer.handler.asks[0].respond(b"")
    assert peer.server.held_bytes == 0
    peer.call(7)
    peer.data(large[:150_000], 7)
    assert peer.server.held_bytes > 140_000
    peer.frame(3, 0, 7, bytes(4))
    assert peer.server.held_bytes == 0


def test_messages_of_a_stream_wait_and_their_client_with_them():
    peer = Peer(ahead=2, http2=dataclasses.replace(Http2Limits(), window_bytes=100_000))
    peer.call(path=b"/a/Many")
    for _ in range(5):
        peer.data(frame_message(bytes(15_000)))
    assert len(peer.handler.asks) == 2
    before = [kind for kind, *_ in peer.frames()].count(8)
    for place in range(5):
        peer.handler.asks[place].respond(b"%d" % place)
    assert peer.messages() == [frame_message(b"%d" % place) for place in range(5)]
    assert [kind for kind, *_ in peer.frames()].count(8) == before + 1, "now it may send more"
    peer.data(b"", ended=True)
    assert peer.statuses() == [b"0"]


def test_answers_of_a_stream_keep_its_order():
    peer = Peer()
    peer.call(path=b"/a/Many")
    peer.data(3 * frame_message(b"x"), ended=True)
    first, second, third = peer.handler.asks
    third.respond(b"3")
    second.respond(b"2")
    assert peer.messages() == []
    first.respond(b"1")
    assert b"".join(peer.messages()) == b"".join(map(frame_message, (b"1", b"2", b"3")))
    assert peer.statuses() == [b"0"]


def test_more_messages_than_may_wait_end_their_call():
    peer = Peer()
    peer.call(path=b"/a/Many")
    for _ in range(5):
        peer.data(1000 * frame_message(b""))
    assert peer.statuses() == [b"14"]
    assert len(peer.handler.left) == 16


def test_more_clients_than_allowed_are_asked_to_leave():
    peer = Peer(connections=1)
    connection, transport = peer.connect()
    connection.data_received(PREFACE + SETTINGS)
    assert transport.sent[9 + 18 + 13 + 3] == 7  # GOAWAY behind our settings
    peer.server.close()
    assert [kind for kind, *_ in peer.frames()][-1] == 7


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"grpc_timeout": b"x"}, b"3"),
        ({"grpc_encoding": b"br"}, b"12"),
    ],
)
def test_heads_that_are_wrong(headers, status):
    peer = Peer()
    peer.call(**headers)
    assert peer.statuses() == [status]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", b"3"),  # no message
        (2 * frame_message(b"x"), b"3"),  # several
        (frame_message(b"x")[:-1] + b"", b"3"),  # cut off
        (b"\2\0\0\0\0", b"3"),
        (b"\1\0\0\0\0", b"3"),  # compressed, without a word how
        (b"\0\xff\xff\xff\xff", b"8"),
    ],
)
def test_bodies_that_are_wrong(body, status):
    peer = Peer()
    peer.call()
    peer.data(body, ended=True)
    assert peer.statuses() == [status]
    assert not peer.handler.asks


def test_what_is_no_grpc_and_what_is_no_http2_is_said():
    peer = Peer()
    peer.frame(1, 5, 1, write_headers([(b":method", b"GET"), (b":path", b"/")]))
    assert peer.frames()[-1] == (1, 1, {b":status": b"415"})
    connection, transport = peer.connect()
    connection.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert transport.sent.startswith(b"HTTP/1.1 505 ")
    assert transport.closing
