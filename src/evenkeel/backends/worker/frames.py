"""Encodes and decodes the worker protocol's frames, without sockets: one fixed header, then the payload.

The header (little endian) holds magic `EK`, protocol version, kind, ticket, key, service time, model number, dtype
code, axes, shared-memory slot, payload length and six dimensions (unused ones are 0). A tensor's payload is its bytes
in C order; a slot other than `NO_SLOT` says that those bytes lie in shared memory and do not follow. An ERROR frame has
its reason in place of the model number: peers that know no reasons read and write FAILED. Nothing is pickled.

Law: however a stream is cut into pieces, `FrameReader` gives the same frames, up to the first that breaks the rules;
then it holds a ProtocolError and gives nothing more.
"""

import json
import math
import struct
import sys
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import orjson

from evenkeel.arrays import Array
from evenkeel.errors import BackendError, ProtocolError

__all__ = [
    "MAX_PAYLOAD_BYTES",
    "NO_SLOT",
    "VERSION",
    "ErrorReason",
    "Frame",
    "FrameKind",
    "FrameReader",
    "encode",
    "encode_error",
    "encode_object",
    "encode_tensor",
]

VERSION = 1
MAX_PAYLOAD_BYTES = 256 << 20  # of a tensor; a peer that announces more is cut off before anything is allocated
MAX_TEXT_BYTES = 1 << 20  # of a frame that carries text or JSON
MAX_AXES = 6
_MAX_ERROR_BYTES = 4096
NO_SLOT = 0xFFFFFFFF

_MAGIC = b"EK"
_HEADER = struct.Struct("<2sBBQQdHBBIQ6I")
_KEY_MASK = 2**64 - 1  # delays hash a key modulo this
_STAGING_BYTES = 64 << 10
_JOIN_BELOW_BYTES = 32 << 10  # one copy is cheaper than a second buffer in the transport below about this size

if sys.byteorder != "little":  # pragma: no cover - tensors travel as they lie in memory
    raise ImportError("evenkeel workers need a little-endian machine")

# Codes are part of the protocol: add at the end, never renumber. Zero means "no tensor". No bool: a byte that is
# neither 0 nor 1 would be undefined behaviour in numpy.
_DTYPES = ("", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8")
_DTYPE_BY_CODE = (None, *(np.dtype(text) for text in _DTYPES[1:]))
_CODE_BY_TEXT = {text: code for code, text in enumerate(_DTYPES) if text}


class FrameKind(IntEnum):
    """Names the kinds of frames."""

    HELLO = 1  # worker -> client, first frame: JSON, who it is and which models it holds
    SHARE = 2  # client -> worker: JSON, a shared memory it may read tasks from
    SHARED = 3  # worker -> client: JSON, whether it could open that memory
    TASK = 4  # client -> worker: tensor
    CANCEL = 5  # client -> worker: give the ticket up
    REPLY = 6  # worker -> client: tensor and service time
    CANCELLED = 7  # worker -> client: the ticket was given up before it began
    ERROR = 8  # worker -> client: text and reason; ticket 0 means the connection itself
    PING = 9  # client -> worker
    PONG = 10  # worker -> client
    GOODBYE = 11  # worker -> client: finishes what it holds, takes nothing new
    CHALLENGE = 12  # worker -> client, first frame where a key is shared: JSON, a random text
    PROOF = 13  # both ways: JSON, that the sender holds the key (`key.py`)


class ErrorReason(IntEnum):
    """Names the reasons of an ERROR frame; it stands in the place of the model number."""

    FAILED = 0  # the task could not be done, or whatever a later version may mean
    NO_ROOM = 1  # the task was not taken, since the queue is full or the worker ends; another worker may take it


_WITH_TENSOR = frozenset({FrameKind.TASK, FrameKind.REPLY})
_WITH_TEXT = frozenset(
    {FrameKind.HELLO, FrameKind.SHARE, FrameKind.SHARED, FrameKind.ERROR, FrameKind.CHALLENGE, FrameKind.PROOF}
)
_KINDS = {int(kind): kind for kind in FrameKind}


@dataclass(slots=True)
class Frame:
    """Holds one frame as read: what the header said, and the payload where one followed.

    `payload` is read-only: bytes, or an array of uint8 for a long one. For a tensor in shared memory it is None, and
    `dtype`, `shape`, `slot` and `size_bytes` say what lies there.
    """

    kind: FrameKind
    ticket: int
    key: int
    service_s: float
    model: int
    dtype: "np.dtype[Any] | None"
    shape: tuple[int, ...]
    slot: int
    size_bytes: int
    payload: "bytes | Array | None" = None

    def tensor(self) -> Array:
        """Gives the payload as a read-only array of `shape`; a view, not a copy."""
        if self.payload is None or self.dtype is None:
            raise ProtocolError(f"a {self.kind.name} frame without the tensor it should carry")
        return np.frombuffer(self.payload, self.dtype).reshape(self.shape)

    def text(self) -> str:
        """Gives the payload as text; what is not UTF-8 is shown as question marks."""
        return "" if self.payload is None else bytes(self.payload).decode("utf-8", "replace")

    def object(self) -> dict[str, Any]:
        """Reads the payload as a JSON object.

        Raises:
            ProtocolError: it is none.
        """
        try:
            # Not json: that lets through half of a surrogate pair, a text that cannot be written anywhere.
            value = orjson.loads(self.text())
        except orjson.JSONDecodeError as error:
            raise ProtocolError(f"the payload of a {self.kind.name} frame is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ProtocolError(f"the payload of a {self.kind.name} frame is not a JSON object")
        return value


class FrameReader:
    """Cuts a byte stream into frames; long payloads are received where they will stay.

    Use: read into `buffer()`, then `advance(count)` gives the frames that this completed; then look at `error`. Each
    byte is moved at most twice, whatever the pieces.
    """

    def __init__(self, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self.max_payload_bytes = max_payload_bytes  # may be changed between two frames
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._filled = 0
        self._frame: Frame | None = None  # whose payload is on its way
        self._payload = np.empty(0, np.uint8)
        self._payload_view = memoryview(b"")
        self._received = 0
        self._error: ProtocolError | None = None

    @property
    def error(self) -> ProtocolError | None:
        """Gives the error that broke the stream, after the frames given so far; None while it keeps the rules."""
        return self._error

    def buffer(self) -> memoryview:
        """Gives the memory for the next bytes of the stream; it is never empty."""
        if self._frame is not None:
            return self._payload_view[self._received :]
        return self._staging[self._filled :]

    def advance(self, count: int) -> list[Frame]:
        """Gives the frames completed by the `count` bytes that were put into `buffer()`; none after an error."""
        frames: list[Frame] = []
        if self._error is None:
            try:
                self._advance(count, frames)
            except ProtocolError as error:
                self._error = error.with_traceback(None)  # which would keep alive whatever is on the stack
        return frames

    def feed(self, data: "bytes | bytearray | memoryview") -> list[Frame]:
        """Gives the frames completed by `data`, the next piece of the stream; the slow twin of buffer-and-advance."""
        frames = []
        rest = memoryview(data)
        while rest and self._error is None:
            room = self.buffer()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            frames += self.advance(count)
            rest = rest[count:]
        return frames

    def _advance(self, count: int, frames: list[Frame]) -> None:
        if self._frame is not None:
            self._received += count
            if self._received < len(self._payload_view):
                return
            frame, self._frame = self._frame, None
            self._payload.flags.writeable = False
            frame.payload = self._payload
            self._payload, self._payload_view = np.empty(0, np.uint8), memoryview(b"")
            frames.append(frame)
            return
        self._filled += count
        start, end = 0, self._filled
        while end - start >= _HEADER.size:
            frame, following = self._parse_header(start)
            start += _HEADER.size
            if following > end - start:
                self._expect_payload(frame, following, self._staging[start:end])
                start = end
                break
            if following:
                frame.payload = bytes(self._staging[start : start + following])
                start += following
            frames.append(frame)
        rest = end - start  # less than a header
        if rest and start:
            self._staging[:rest] = bytes(self._staging[start:end])
        self._filled = rest

    def _expect_payload(self, frame: Frame, size_bytes: int, head: memoryview) -> None:
        self._frame = frame
        self._payload = np.empty(size_bytes, np.uint8)
        self._payload_view = self._payload.data
        self._payload_view[: len(head)] = head
        self._received = len(head)

    def _parse_header(self, start: int) -> tuple[Frame, int]:
        fields = _HEADER.unpack_from(self._staging, start)
        magic, version, number, ticket, key, service_s, model, code, axes, slot, size_bytes, *dims = fields
        if magic != _MAGIC:
            raise ProtocolError("the peer does not speak evenkeel's worker protocol; check the address")
        if version != VERSION:
            raise ProtocolError(
                f"the peer speaks worker protocol {version}, this side {VERSION}; install the same evenkeel on both"
            )
        kind = _KINDS.get(number)
        if kind is None:
            raise ProtocolError(f"unknown frame kind {number}")
        if not 0.0 <= service_s < math.inf:
            raise ProtocolError(f"a {kind.name} frame with service time {service_s}")
        if kind in _WITH_TENSOR:
            dtype, shape = self._check_tensor(kind, code, axes, dims, slot, size_bytes)
            frame = Frame(kind, ticket, key, service_s, model, dtype, shape, slot, size_bytes)
            return frame, size_bytes if slot == NO_SLOT else 0
        if code or axes or any(dims) or slot != NO_SLOT:
            raise ProtocolError(f"a {kind.name} frame that announces a tensor")
        max_bytes = min(MAX_TEXT_BYTES, self.max_payload_bytes) if kind in _WITH_TEXT else 0
        if size_bytes > max_bytes:
            raise ProtocolError(f"a {kind.name} frame of {size_bytes} bytes; at most {max_bytes} are allowed")
        return Frame(kind, ticket, key, service_s, model, None, (), slot, size_bytes), size_bytes

    def _check_tensor(
        self, kind: FrameKind, code: int, axes: int, dims: list[int], slot: int, size_bytes: int
    ) -> "tuple[np.dtype[Any], tuple[int, ...]]":
        dtype = _DTYPE_BY_CODE[code] if code < len(_DTYPE_BY_CODE) else None
        if dtype is None:
            raise ProtocolError(f"a {kind.name} frame with unknown dtype code {code}")
        if not 1 <= axes <= MAX_AXES or any(dims[axes:]) or 0 in dims[:axes]:
            raise ProtocolError(f"a {kind.name} frame with {axes} axes and dimensions {dims}")
        shape = tuple(dims[:axes])
        expected = math.prod(shape) * dtype.itemsize
        if size_bytes != expected:
            raise ProtocolError(f"a {kind.name} frame of {size_bytes} bytes; its shape {shape} needs {expected}")
        if size_bytes > self.max_payload_bytes:
            raise ProtocolError(
                f"a {kind.name} frame of {size_bytes} bytes; at most {self.max_payload_bytes} are allowed"
            )
        if slot != NO_SLOT and kind is not FrameKind.TASK:
            raise ProtocolError(f"a {kind.name} frame in shared memory; only tasks may be")
        return dtype, shape


def encode(kind: FrameKind, ticket: int = 0, payload: bytes = b"") -> bytes:
    """Encodes a frame without a tensor."""
    return _header(kind, ticket, size_bytes=len(payload)) + payload


def encode_error(ticket: int, message: str, reason: ErrorReason = ErrorReason.FAILED) -> bytes:
    """Encodes an ERROR frame."""
    payload = message.encode("utf-8", "replace")[:_MAX_ERROR_BYTES]
    return _header(FrameKind.ERROR, ticket, model=reason, size_bytes=len(payload)) + payload


def encode_object(kind: FrameKind, value: dict[str, Any]) -> bytes:
    """Encodes a frame whose payload is a JSON object."""
    return encode(kind, payload=json.dumps(value, separators=(",", ":")).encode())


def encode_tensor(
    kind: FrameKind,
    ticket: int,
    tensor: Array,
    *,
    key: int = 0,
    model: int = 0,
    service_s: float = 0.0,
    slot: int = NO_SLOT,
) -> "list[bytes | memoryview]":
    """Encodes a frame with a tensor, in one piece or two; with a slot, the header alone.

    The second piece is the tensor's own memory where that is contiguous: leave it unchanged until it is sent.

    Raises:
        BackendError: the tensor cannot travel: unknown dtype, empty, no axis or more than six.
    """
    text = tensor.dtype.str
    if text.startswith(">"):
        tensor = tensor.astype(tensor.dtype.newbyteorder("<"))
        text = tensor.dtype.str
    code = _CODE_BY_TEXT.get(text)
    if code is None:
        known = ", ".join(str(dtype) for dtype in _DTYPE_BY_CODE[1:])
        raise BackendError(f"a tensor of dtype {tensor.dtype} cannot be sent; use one of {known}")
    if not 1 <= tensor.ndim <= MAX_AXES or not tensor.size or max(tensor.shape) > 0xFFFFFFFF:
        raise BackendError(f"a tensor of shape {tensor.shape} cannot be sent; use 1 to {MAX_AXES} axes, none empty")
    header = _header(kind, ticket, key, service_s, model, code, tensor.shape, slot, tensor.nbytes)
    if slot != NO_SLOT:
        return [header]
    if tensor.nbytes < _JOIN_BELOW_BYTES:
        return [header + tensor.tobytes()]
    return [header, np.ascontiguousarray(tensor).data.cast("B")]


def _header(
    kind: FrameKind,
    ticket: int,
    key: int = 0,
    service_s: float = 0.0,
    model: int = 0,
    code: int = 0,
    shape: tuple[int, ...] = (),
    slot: int = NO_SLOT,
    size_bytes: int = 0,
) -> bytes:
    dims = (*shape, *(0,) * (MAX_AXES - len(shape)))
    return _HEADER.pack(
        _MAGIC, VERSION, kind, ticket, key & _KEY_MASK, service_s, model, code, len(shape), slot, size_bytes, *dims
    )
