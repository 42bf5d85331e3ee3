"""The frames' law: however a stream is cut, the same frames; a wrong stream is a ProtocolError, never a hang."""

import itertools
import re
import struct

import numpy as np
import pytest
from hypothesis import given, strategies as st

from evenkeel.backends.worker.frames import (
    MAX_PAYLOAD_BYTES,
    NO_SLOT,
    VERSION,
    ErrorReason,
    Frame,
    FrameKind,
    FrameReader,
    encode,
    encode_error,
    encode_object,
    encode_tensor,
)
from evenkeel.errors import BackendError, ProtocolError

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"]
HEADER = struct.Struct("<2sBBQQdHBBIQ6I")
# Fields of the header by place, to write wrong ones.
MAGIC, VERSION_AT, KIND, TICKET, KEY, SERVICE, MODEL, DTYPE, AXES, SLOT, LENGTH, DIMS = range(12)

tensors = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 100, shape).astype(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 4), min_size=1, max_size=6),
    st.integers(0, 99),
)
frames = st.one_of(
    st.builds(
        lambda tensor, ticket, key, model: b"".join(
            encode_tensor(FrameKind.TASK, ticket, tensor, key=key, model=model)
        ),
        tensors,
        st.integers(0, 2**64 - 1),
        st.integers(-(2**63), 2**64 - 1),
        st.integers(0, 2**16 - 1),
    ),
    st.builds(
        lambda tensor, ticket, service_s: b"".join(encode_tensor(FrameKind.REPLY, ticket, tensor, service_s=service_s)),
        tensors,
        st.integers(0, 2**64 - 1),
        st.floats(0, 1e9),
    ),
    st.builds(
        lambda ticket, slot: b"".join(encode_tensor(FrameKind.TASK, ticket, np.zeros((2, 3), np.float32), slot=slot)),
        st.integers(1, 100),
        st.integers(0, 100),
    ),
    st.builds(lambda text, ticket: encode(FrameKind.ERROR, ticket, text.encode()), st.text(), st.integers(0, 9)),
    st.builds(encode_error, st.integers(0, 9), st.text(), st.sampled_from(ErrorReason)),
    st.builds(
        lambda kind: encode(kind, 1),
        st.sampled_from([FrameKind.PING, FrameKind.PONG, FrameKind.CANCEL, FrameKind.GOODBYE]),
    ),
)


def summary(frame: Frame) -> tuple:
    payload = None if frame.payload is None else bytes(frame.payload)
    dtype = None if frame.dtype is None else frame.dtype.str
    return (
        frame.kind, frame.ticket, frame.key, frame.service_s, frame.model, dtype, frame.shape, frame.slot, payload,
    )  # fmt: skip


def error_of(stream: bytes, *limits: int) -> str:
    """How `stream` breaks the rules."""
    reader = FrameReader(*limits)
    reader.feed(stream)
    return str(reader.error)


def changed(place: int, value: object, frame: bytes | None = None) -> bytes:
    """A frame (a small task, if none is given) with one field of its header replaced."""
    frame = frame or b"".join(encode_tensor(FrameKind.TASK, 1, np.zeros((2, 3), np.float32)))
    fields = list(HEADER.unpack_from(frame))
    fields[place] = value
    return HEADER.pack(*fields) + frame[HEADER.size :]


@given(st.lists(frames, max_size=5), st.lists(st.integers(0, 4000), max_size=10))
def test_any_split_of_the_stream_gives_the_same_frames(parts, cuts):
    stream = b"".join(parts)
    whole = [summary(frame) for frame in FrameReader().feed(stream)]
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    reader, pieces = FrameReader(), []
    for start, end in itertools.pairwise(places):
        pieces += reader.feed(stream[start:end])
    assert [summary(frame) for frame in pieces] == whole
    assert len(whole) == len(parts)


@given(tensors, st.integers(-(2**63), 2**63 - 1))
def test_a_tensor_comes_back_as_it_was_sent(tensor, key):
    [frame] = FrameReader().feed(b"".join(encode_tensor(FrameKind.TASK, 7, tensor, key=key, model=3)))
    read = frame.tensor()
    assert (frame.ticket, frame.key, frame.model) == (7, key % 2**64, 3)
    assert read.dtype == tensor.dtype
    np.testing.assert_array_equal(read, tensor)
    assert not read.flags.writeable


@pytest.mark.parametrize("size_bytes", [1, 40_000, 70_000, 1_000_000])
def test_large_payloads_byte_by_chunk(size_bytes):
    tensor = np.arange(size_bytes, dtype=np.uint64).astype(np.uint8)
    stream = b"".join(encode_tensor(FrameKind.REPLY, 1, tensor, service_s=0.5)) * 2 + encode(FrameKind.PONG)
    reader, read = FrameReader(), []
    for start in range(0, len(stream), 1777):
        read += reader.feed(stream[start : start + 1777])
    assert [frame.kind for frame in read] == [FrameKind.REPLY, FrameKind.REPLY, FrameKind.PONG]
    np.testing.assert_array_equal(read[0].tensor(), tensor)
    np.testing.assert_array_equal(read[1].tensor(), tensor)
    assert read[1].service_s == 0.5


def test_a_large_payload_is_received_where_it_stays():
    tensor = np.arange(200_000, dtype=np.uint8)
    header, payload = encode_tensor(FrameKind.TASK, 1, tensor)
    reader = FrameReader()
    assert reader.feed(header) == []
    room = reader.buffer()
    assert len(room) == tensor.nbytes
    room[:] = payload
    [frame] = reader.advance(tensor.nbytes)
    assert np.shares_memory(frame.tensor(), np.frombuffer(room, np.uint8))


def test_a_large_tensor_is_not_copied_to_be_sent():
    tensor = np.zeros((3, 224, 224), np.uint8)
    _, payload = encode_tensor(FrameKind.TASK, 1, tensor)
    assert np.shares_memory(np.frombuffer(payload, np.uint8), tensor)


def test_a_tensor_that_is_not_contiguous_or_big_endian_arrives_right():
    tensor = np.arange(60_000, dtype=">f4").reshape(200, 300).T
    [frame] = FrameReader().feed(b"".join(encode_tensor(FrameKind.TASK, 1, tensor)))
    np.testing.assert_array_equal(frame.tensor(), tensor)


@given(st.lists(frames, min_size=1, max_size=4), st.data())
def test_flipped_bytes_give_a_protocol_error_or_frames_but_nothing_else(parts, data):
    stream = bytearray(b"".join(parts))
    for _ in range(data.draw(st.integers(1, 5))):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(stream)))
    whole, pieces = FrameReader(), FrameReader()
    frames_of_whole = whole.feed(stream)
    frames_of_pieces = [*pieces.feed(stream[:cut]), *pieces.feed(stream[cut:])]
    assert list(map(summary, frames_of_whole)) == list(map(summary, frames_of_pieces))
    assert str(whole.error) == str(pieces.error)
    for frame in frames_of_whole:
        if frame.payload is not None and frame.dtype is not None:
            frame.tensor()
    if whole.error is not None:
        assert whole.feed(encode(FrameKind.PING)) == []


@given(st.binary(min_size=HEADER.size, max_size=300))
def test_noise_is_refused(noise):
    assert "does not speak evenkeel" in error_of(b"X" + noise)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (MAGIC, b"GE", "does not speak evenkeel"),
        (VERSION_AT, VERSION + 1, f"speaks worker protocol {VERSION + 1}, this side {VERSION}"),
        (KIND, 0, "unknown frame kind 0"),
        (KIND, 99, "unknown frame kind 99"),
        (SERVICE, float("nan"), "service time nan"),
        (SERVICE, -1.0, "service time -1"),
        (SERVICE, float("inf"), "service time inf"),
        (DTYPE, 0, "unknown dtype code 0"),
        (DTYPE, 200, "unknown dtype code 200"),
        (AXES, 0, "0 axes"),
        (AXES, 7, "7 axes"),
        (AXES, 1, "1 axes"),  # a dimension beyond the last axis
        (DIMS, 0, r"dimensions \[0, 3"),
        (DIMS, 4, "needs 48"),
        (LENGTH, 23, "23 bytes; its shape"),
        (LENGTH, 2**63, "needs 24"),
    ],
)
def test_a_wrong_header_is_refused_by_name(place, value, says):
    assert re.search(says, error_of(changed(place, value)))


def test_nothing_is_allocated_for_a_payload_over_the_limit():
    huge = HEADER.pack(b"EK", VERSION, FrameKind.TASK, 1, 0, 0.0, 0, 1, 1, NO_SLOT, MAX_PAYLOAD_BYTES + 1, MAX_PAYLOAD_BYTES + 1, *[0] * 5)  # fmt: skip  # noqa: E501
    assert re.search(f"at most {MAX_PAYLOAD_BYTES} are", error_of(huge))
    assert re.search("at most 10 are", error_of(changed(TICKET, 2), 10))


def test_dimensions_cannot_overflow_into_a_length_that_fits():
    fields = [b"EK", VERSION, FrameKind.TASK, 1, 0, 0.0, 0, 10, 4, NO_SLOT, 0, 2**31, 2**31, 2, 1, 0, 0]
    assert re.search("needs", error_of(HEADER.pack(*fields)))


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (changed(LENGTH, 5, encode(FrameKind.PING)), "PING frame of 5 bytes; at most 0 are"),
        (changed(LENGTH, 2**21, encode(FrameKind.HELLO)), "HELLO frame of 2097152 bytes"),
        (changed(SLOT, 3, encode(FrameKind.CANCEL)), "CANCEL frame that announces a tensor"),
        (changed(DTYPE, 1, encode(FrameKind.ERROR)), "ERROR frame that announces a tensor"),
        (changed(KIND, int(FrameKind.REPLY), changed(SLOT, 3)), "REPLY frame in shared memory"),
    ],
)
def test_only_tasks_and_replies_carry_tensors(frame, says):
    assert re.search(says, error_of(frame))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (np.array([None]), "dtype object"),
        (np.zeros(3, np.complex64), "dtype complex64"),
        (np.zeros(3, bool), "dtype bool"),
        (np.float32(1.0), "shape"),
        (np.zeros((2, 0)), r"shape \(2, 0\)"),
        (np.zeros((1,) * 7), "shape"),
    ],
)
def test_a_tensor_that_cannot_travel_is_refused(tensor, says):
    with pytest.raises(BackendError, match=says):
        encode_tensor(FrameKind.TASK, 1, np.asarray(tensor))


def test_an_object_comes_back_and_what_is_none_is_refused():
    [frame] = FrameReader().feed(encode_object(FrameKind.HELLO, {"a": [1, "é"]}))
    assert frame.object() == {"a": [1, "é"]}
    for wrong in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"a": "\\ud800"}', b'{"a": NaN}'):
        [frame] = FrameReader().feed(encode(FrameKind.HELLO, payload=wrong))
        with pytest.raises(ProtocolError, match="HELLO frame is not"):
            frame.object()


def test_an_error_of_a_worker_that_knows_no_reasons_is_a_failure():
    (frame,) = FrameReader().feed(encode(FrameKind.ERROR, 7, b"out of memory"))
    assert (frame.model, frame.text()) == (ErrorReason.FAILED, "out of memory")
