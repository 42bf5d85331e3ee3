"""Replies are cut out of bytes: whatever the cuts, whatever the bytes, and never without bounds."""

import itertools
import random

import pytest

from evenkeel.errors import ProtocolError
from evenkeel.http_client.reply import _MAX_HEAD_BYTES, HttpReply, ReplyReader

OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = OK + b"Content-Length: 5\r\nRetry-After: 7\r\n\r\nhello"
CHUNKS = OK + b"Transfer-Encoding: Chunked\r\n\r\n2\r\nhe\r\n3;a=b\r\nllo\r\n0\r\nRetry-After: 8\r\n\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nRetry-After: 1\r\n\r\n" + LENGTH
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"
OLD = b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"
OLD_KEPT = b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello"
CLOSES = OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello"
TO_THE_END = OK + b"\r\nhello"
H2_OFFERED = OK + b"Upgrade: h2c\r\nConnection: upgrade\r\nContent-Length: 5\r\n\r\nhello"


def feed(data: bytes, cuts=(), reader: ReplyReader | None = None, max_bytes: int = 1000) -> tuple[HttpReply, bool]:
    reader = reader or ReplyReader([b"retry-after"])
    reader.expect(max_bytes)
    places = [0, *cuts, len(data)]
    for begin, end in itertools.pairwise(places):
        assert reader.begun == (begin > 0)
        reply = reader.feed(data[begin:end])
        assert (reply is not None) == (end == len(data))
    return reply, reader.keep


def feed_all(reader: ReplyReader, pieces) -> None:
    for piece in pieces:
        assert reader.feed(piece) is None


@pytest.mark.parametrize(
    ("data", "status", "body", "keep"),
    [
        (LENGTH, 200, b"hello", True),
        (CHUNKS, 200, b"hello", True),
        (INTERIM, 200, b"hello", True),
        (EMPTY, 204, b"", True),
        (OLD, 200, b"hello", False),
        (OLD_KEPT, 200, b"hello", True),
        (CLOSES, 200, b"hello", False),
        (H2_OFFERED, 200, b"hello", True),
    ],
)
def test_a_reply_is_the_same_however_it_is_cut(data, status, body, keep):
    cuts = [[], list(range(1, len(data))), *([place] for place in range(1, len(data)))]
    for places in cuts:
        reply, kept = feed(data, places)
        assert (reply.status, reply.body, kept) == (status, body, keep)
        assert reply.reason in (b"OK", b"No Content")


def test_one_connection_has_many_replies_and_none_has_a_line_of_another():
    reader = ReplyReader([b"retry-after"])
    for data, after in [(CHUNKS, None), (LENGTH, "7"), (INTERIM, "7"), (EMPTY, None)] * 3:
        reply, keep = feed(data, reader=reader)
        assert keep
        assert reply.header(b"retry-after") == after


def test_a_reply_may_last_as_long_as_its_connection():
    reader = ReplyReader()
    reader.expect(1000)
    assert reader.feed(TO_THE_END) is None
    reply = reader.end()
    assert (reply.status, reply.body, reader.keep) == (200, b"hello", False)


@pytest.mark.parametrize("data", [LENGTH, CHUNKS, INTERIM])
def test_a_reply_that_is_cut_off_is_none(data):
    for end in range(len(data)):
        reader = ReplyReader()
        reader.expect(1000)
        assert end == 0 or reader.feed(data[:end]) is None
        assert reader.end() is None


@pytest.mark.parametrize("more", [b"x", LENGTH, b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"\0\0"])
@pytest.mark.parametrize("data", [LENGTH, CHUNKS, EMPTY])
def test_what_follows_a_reply_ends_the_connection_and_is_not_taken_for_one(data, more):
    reader = ReplyReader()
    reader.expect(1000)
    reply = reader.feed(data + more)
    assert reply.status in (200, 204)
    assert reply.body == (b"" if data is EMPTY else b"hello")
    assert not reader.keep


def test_another_protocol_is_the_last_reply():
    for more in (b"", b"\x01\x02"):
        reader = ReplyReader()
        reader.expect(1000)
        switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
        assert reader.feed(switch + more).status == 101
        assert not reader.keep


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP/1.1"),
        (b"\x15\x03\x01\x00\x02\x02", "not HTTP/1.1"),
        (b"HTTP/1.1 abc\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/2 200\r\n\r\n", "not HTTP/1.1"),
        (OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", "not HTTP/1.1"),
        (OK + b"Content-Length: -5\r\n\r\n", "not HTTP/1.1"),
        (OK + b"Content-Length: 99999999999999999999999\r\n\r\n", "not HTTP/1.1"),
        (OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", "not HTTP/1.1"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "not HTTP/1.1"),
        (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "other than chunked"),
        (OK + b"Transfer-Encoding: gzip\r\n\r\nhello", "other than chunked"),
        (OK + b"Content-Length: 1001\r\n\r\n", "more than 1000 bytes"),
        (OK + b"\r\n" + b"x" * 1001, "more than 1000 bytes"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"3e9\r\n" + b"x" * 1001, "more than 1000 bytes"),
    ],
)
def test_what_is_no_reply_or_too_long_is_an_error(data, message):
    for step in (1, len(data)):
        reader = ReplyReader()
        reader.expect(1000)
        with pytest.raises(ProtocolError, match=message):
            feed_all(reader, (data[start : start + step] for start in range(0, len(data), step)))


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (OK, b"x: 1\r\n"),
        (OK + b"x", b"xxxx"),
        (OK + b"x: ", b"xxxx"),
        (b"HTTP/1.1 200 O", b"OOOO"),
        (b"", b"\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"xxxx"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"x: 1\r\n"),
    ],
)
def test_a_head_or_framing_without_an_end_is_an_error(start, more):
    reader = ReplyReader([b"x"])
    reader.expect(1 << 30)
    with pytest.raises(ProtocolError, match="more than 65536 bytes"):
        feed_all(reader, [start, *[more] * (2 * _MAX_HEAD_BYTES // len(more))])
    reader = ReplyReader([b"x"])
    reader.expect(1 << 30)
    if start == OK:  # all at once
        with pytest.raises(ProtocolError, match="more than 65536 bytes"):
            reader.feed(OK + more * _MAX_HEAD_BYTES + b"Content-Length: 0\r\n\r\n")


def test_a_body_in_tiny_pieces_takes_no_more_memory_than_its_bytes():
    reader = ReplyReader()
    reader.expect(1 << 20)
    reader.feed(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(20):
        assert reader.feed(b"1\r\nx\r\n" * 1000) is None
    assert isinstance(reader._parts, bytearray)
    assert reader.feed(b"0\r\n\r\n").body == b"x" * 20_000


REPLIES = [LENGTH, CHUNKS, INTERIM, EMPTY, OLD, TO_THE_END]
PIECES = [*REPLIES, b"\r\n", b"0\r\n", b": ", b"\0", b"chunked", b"HTTP/1.1 ", b"7"]


@pytest.mark.parametrize("seed", range(20))
def test_garbage_is_a_reply_or_a_protocol_error_and_what_it_is_hangs_on_no_cut(seed):
    random_ = random.Random(seed)

    def damage() -> bytes:
        data = bytearray(random_.choice(REPLIES))
        for _ in range(random_.randrange(4)):
            place = random_.randrange(len(data) + 1)
            data[place : place + random_.randrange(3)] = random_.choice([random_.choice(PIECES), random_.randbytes(2)])
        return bytes(data)

    def read(data: bytes, step: int):
        reader = ReplyReader([b"retry-after"])
        reader.expect(1000)
        try:
            for start in range(0, len(data), step):
                reply = reader.feed(data[start : start + step])
                if reply is not None:
                    return reply.status, reply.body, reply.headers
            reply = reader.end()
        except ProtocolError:
            return "wrong"
        return None if reply is None else (reply.status, reply.body, reply.headers)

    kinds = set()
    for _ in range(300):
        data = damage()
        found = read(data, len(data) or 1)
        assert read(data, 1) == found
        kinds.add(type(found))
    assert {tuple, str} <= kinds
