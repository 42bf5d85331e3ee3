"""Messages, statuses and timeouts of gRPC."""

from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import RequestError, TooLargeError
from evenkeel.http2.grpc import (
    GrpcMessageReader,
    frame_message,
    read_status_message,
    read_timeout_s,
    write_status_message,
    write_timeout,
)


@given(st.lists(st.binary(max_size=50), max_size=5), st.data())
def test_messages_come_out_however_they_are_cut(messages, data):
    wire = b"".join(map(frame_message, messages))
    edges = sorted([0, len(wire), *data.draw(st.lists(st.integers(0, len(wire)), max_size=5))])
    reader = GrpcMessageReader(50)
    found = [message for start, end in pairwise(edges) for message in reader.feed(wire[start:end])]
    assert found == [(message, False) for message in messages]
    assert reader.rest_bytes == 0
    assert reader.error is None


def test_what_is_too_large_or_no_message_is_refused_behind_what_was_right():
    reader = GrpcMessageReader(10)
    assert reader.feed(frame_message(b"a") + b"\x00\x00\x00\x00\x0b") == [(b"a", False)]
    assert isinstance(reader.error, TooLargeError)
    assert reader.feed(b"more") == []
    reader = GrpcMessageReader(10)
    assert reader.feed(b"\x01\x00\x00\x00\x01z\x02\x00\x00\x00\x00") == [(b"z", True)]
    assert isinstance(reader.error, RequestError)


@pytest.mark.parametrize(
    ("value", "seconds"), [(b"30S", 30), (b"5m", 0.005), (b"100u", 1e-4), (b"7n", 7e-9), (b"2M", 120), (b"1H", 3600)]
)
def test_timeouts(value, seconds):
    assert read_timeout_s(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", [b"", b"5", b"S", b"-1S", b"123456789S", b"1.5S", b"5s", b"5\xffS"])
def test_what_is_no_timeout(value):
    with pytest.raises(RequestError, match="grpc-timeout"):
        read_timeout_s(value)


@given(st.floats(1e-6, 1e7))
def test_a_timeout_is_never_written_shorter(seconds):
    assert seconds <= read_timeout_s(write_timeout(seconds)) <= seconds * 1.05 + 0.001


@given(st.text(max_size=50))
def test_any_text_passes_as_a_status_message(text):
    written = write_status_message(text)
    assert all(0x20 <= byte < 0x7F for byte in written)
    assert read_status_message(written) == text.encode("utf-8", "replace").decode()
