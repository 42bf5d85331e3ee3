"""The reader alone: bytes in, events out, however the bytes are cut."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import evenkeel.serving.http.reader as reader_module
from evenkeel.serving.http.reader import ReadLimits, Refusal, Request, RequestReader
from http_helpers import request_bytes

LIMITS = ReadLimits(head_bytes=400, target_bytes=60, body_bytes=100)


def told(event: Request | Refusal) -> tuple[object, ...]:
    if isinstance(event, Refusal):
        return event.status, event.message, event.method
    return event.method, event.target, event.headers, event.body, event.keep


def read(data: bytes, cuts: list[int] = [], limits: ReadLimits = LIMITS) -> tuple[list[tuple[object, ...]], str]:  # noqa: B006
    """What the events say, and the state in the end."""
    reader = RequestReader(limits, (b"x-kept",))
    events = []
    for start, end in pairwise([0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]):
        events += reader.feed(data[start:end])
    return [told(event) for event in events], reader.state


HEADERS = st.lists(
    st.sampled_from(
        [
            ("X-Kept", "a"),
            ("X-Kept", "b"),
            ("X-Long", "y" * 300),
            ("Host", "z"),
            ("Connection", "close"),
            ("Connection", "keep-alive"),
            ("Connection", "Upgrade"),
            ("Upgrade", "h2c"),
            ("Expect", "100-continue"),
            ("Content-Length", "2"),
            ("Transfer-Encoding", "chunked"),
            ("Transfer-Encoding", "gzip"),
        ]
    ),
    max_size=4,
    unique=True,
)
REQUESTS = st.builds(
    lambda method, target, body, headers: request_bytes(target, body, method=method, headers=dict(headers)),
    st.sampled_from(["GET", "POST", "HEAD", "CONNECT"]),
    st.sampled_from(["/", "/v2", "/" + "a" * 100]),
    st.binary(max_size=120) | st.lists(st.binary(min_size=1, max_size=60), max_size=3),
    HEADERS,
)
STREAMS = st.lists(REQUESTS | st.binary(max_size=30), min_size=1, max_size=5).map(b"".join)


@given(STREAMS, st.lists(st.integers(0, 2000), max_size=30))
def test_any_cutting_gives_the_same_events(stream, cuts):
    assert read(stream, cuts) == read(stream)


@given(STREAMS)
def test_byte_by_byte_gives_the_same_events(stream):
    assert read(stream, list(range(len(stream)))) == read(stream)


@pytest.mark.parametrize(
    ("data", "state"),
    [
        (b"", "idle"),
        (b"\r\n", "idle"),
        (b"G", "head"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", "head"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "idle"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nx", "body"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nxy", "idle"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\nxy", "over"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\nx", "body"),
        (b"nonsense\r\n", "over"),
    ],
)
def test_each_state_is_reached_as_the_table_says(data, state):
    assert read(data)[1] == state


def test_a_request_that_takes_too_long_is_refused_by_what_is_missing():
    reader = RequestReader(LIMITS)
    assert reader.feed(b"GET / HT") == []
    assert reader.refuse_late() == Refusal(408, "the head of the request did not come in time")
    assert reader.feed(b"TP/1.1\r\nHost: x\r\n\r\n") == []
    reader = RequestReader(LIMITS)
    assert reader.feed(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nx") == []
    assert reader.refuse_late().message.startswith("the whole body did not come in time")


def test_the_reader_keeps_no_request_that_it_gave():
    reader = RequestReader(LIMITS)
    (request,) = reader.feed(request_bytes("/", b"x" * 50))
    assert isinstance(request, Request)
    assert reader._request is not request


def test_the_reader_does_no_input_or_output():
    tree = ast.parse(Path(reader_module.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {"asyncio", "socket", "time", "threading", "uvloop"}
