"""Encodes and decodes what coordinator and devices say to each other, without sockets.

A message has a kind, fields (JSON) and named arrays. On the wire (little endian) stand magic `EC`, protocol version,
the length of the head and that of the arrays; then the head (JSON: kind, fields, names, types and shapes of the
arrays); then the arrays' bytes, one after another. Nothing is pickled, and nothing is allocated before its length is
checked.

Law: however a stream is cut into pieces, `MessageReader` gives the same messages, up to the first that breaks the
rules; then it holds a ProtocolError and gives nothing more.
"""

import math
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from evenkeel.arrays import Array
from evenkeel.errors import ProtocolError

__all__ = ["MAX_ARRAY_BYTES", "DeviceMessage", "MessageReader", "encode", "size_bytes"]

VERSION = 1
MAX_HEAD_BYTES = 1 << 20
MAX_ARRAY_BYTES = 2 << 30  # of all arrays of a message
MAX_ARRAYS = 4096
MAX_AXES = 2

_MAGIC = b"EC"
_PREFIX = struct.Struct("<2sHIQ")
_STAGING_BYTES = 64 << 10
_DTYPES = frozenset({"<f4", "<f8", "<i4", "<i8"})

if sys.byteorder != "little":  # pragma: no cover - arrays travel as they lie in memory
    raise ImportError("evenkeel's devices need a little-endian machine")


@dataclass(frozen=True, slots=True)
class DeviceMessage:
    """Holds one message: what it is, small fields, and arrays by name."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)

    def array(self, name: str, *shape: int) -> Array:
        """Gives an array of exactly that shape, with finite numbers alone.

        Raises:
            ProtocolError: there is none, or it is something else.
        """
        found = self.arrays.get(name)
        if found is None:
            raise ProtocolError(f"a {self.kind} message without the array {name}")
        if found.shape != shape:
            raise ProtocolError(f"array {name} of a {self.kind} message has shape {found.shape}; expected {shape}")
        # The sum of squares is quicker, and finite only if all numbers are; that of large numbers overflows.
        if found.dtype.kind == "f" and not math.isfinite(np.vdot(found, found)) and not np.isfinite(found).all():
            raise ProtocolError(f"array {name} of a {self.kind} message has numbers that are not finite")
        return found

    def whole(self, name: str, least: int = 0) -> int:
        """Gives a field that is a whole number of at least `least`.

        Raises:
            ProtocolError: it is not there, or something else.
        """
        found = self.fields.get(name)
        if type(found) is not int or found < least:
            raise ProtocolError(f"field {name} of a {self.kind} message is {found!r}; expected a number from {least}")
        return found

    def text(self, name: str) -> str:
        """Gives a field that is a text.

        Raises:
            ProtocolError: it is not there, or something else.
        """
        found = self.fields.get(name)
        if not isinstance(found, str):
            raise ProtocolError(f"field {name} of a {self.kind} message is {found!r}; expected a text")
        return found


def encode(message: DeviceMessage) -> "list[bytes | memoryview]":
    """Gives the bytes of a message, in one piece or a few; leave the arrays unchanged until they are sent."""
    head = _head(message)
    arrays = [np.ascontiguousarray(value) for value in message.arrays.values()]
    first = _PREFIX.pack(_MAGIC, VERSION, len(head), sum(value.nbytes for value in arrays)) + head
    return [first, *(value.data.cast("B") for value in arrays if value.nbytes)]


def size_bytes(message: DeviceMessage) -> int:
    """Counts the bytes of a message on the wire."""
    return _PREFIX.size + len(_head(message)) + sum(value.nbytes for value in message.arrays.values())


def _head(message: DeviceMessage) -> bytes:
    arrays = [[name, value.dtype.str, value.shape] for name, value in message.arrays.items()]
    return orjson.dumps({"kind": message.kind, "fields": message.fields, "arrays": arrays})


class MessageReader:
    """Cuts a byte stream into messages.

    Use: read into `buffer()`, then `advance(count)` gives the messages that this completed; then look at `error`.

    Attributes:
        max_array_bytes: longest arrays of a message; may be changed between two messages.
    """

    def __init__(self, max_array_bytes: int = MAX_ARRAY_BYTES) -> None:
        self.max_array_bytes = max_array_bytes
        self.error: ProtocolError | None = None
        self._staging = bytearray()
        self._buffer = memoryview(bytearray(_STAGING_BYTES))
        self._head: tuple[int, int] | None = None  # lengths of the message that is on its way
        self._message: tuple[str, dict[str, Any], list[tuple[str, np.dtype[Any], tuple[int, ...]]]] | None = None
        self._payload = np.empty(0, np.uint8)
        self._received = 0

    def buffer(self) -> memoryview:
        """Gives the memory for the next bytes of the stream; it is never empty."""
        if self._message is not None:
            return self._payload.data[self._received :]
        return self._buffer

    def advance(self, count: int) -> list[DeviceMessage]:
        """Gives the messages completed by the `count` bytes that were put into `buffer()`; none after an error."""
        messages: list[DeviceMessage] = []
        if self.error is None:
            try:
                if self._message is not None:
                    self._received += count
                else:
                    self._staging += self._buffer[:count]
                while self._step(messages):
                    pass
            except ProtocolError as error:
                self.error = error.with_traceback(None)  # which would keep alive whatever is on the stack
        return messages

    def feed(self, data: bytes) -> list[DeviceMessage]:
        """Gives the messages completed by `data`; the slow twin of buffer-and-advance."""
        messages = []
        rest = memoryview(data)
        while rest and self.error is None:
            room = self.buffer()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            messages += self.advance(count)
            rest = rest[count:]
        return messages

    def _step(self, messages: list[DeviceMessage]) -> bool:
        """Takes the next part of a message, if it is there."""
        if self._message is None:
            if self._head is None:
                if len(self._staging) < _PREFIX.size:
                    return False
                self._head = self._check_prefix()
                del self._staging[: _PREFIX.size]
            length, total = self._head
            if len(self._staging) < length:
                return False
            self._message = _read_head(bytes(self._staging[:length]), total)
            del self._staging[:length]
            self._payload = np.empty(total, np.uint8)
            self._received = min(total, len(self._staging))
            self._payload[: self._received] = np.frombuffer(self._staging, np.uint8, self._received)
            del self._staging[: self._received]
        if self._received < len(self._payload):
            return False
        kind, fields, arrays = self._message
        views, place = {}, 0
        for name, dtype, shape in arrays:
            length = math.prod(shape) * dtype.itemsize
            views[name] = self._payload[place : place + length].view(dtype).reshape(shape)
            views[name].flags.writeable = False
            place += length
        messages.append(DeviceMessage(kind, fields, views))
        self._head = self._message = None
        self._payload = np.empty(0, np.uint8)
        return bool(self._staging)

    def _check_prefix(self) -> tuple[int, int]:
        magic, version, head, total = _PREFIX.unpack_from(self._staging)
        if magic != _MAGIC:
            raise ProtocolError("the peer does not speak evenkeel's device protocol; check the address")
        if version != VERSION:
            raise ProtocolError(
                f"the peer speaks device protocol {version}, this side {VERSION}; install the same evenkeel on both"
            )
        if head > MAX_HEAD_BYTES or total > self.max_array_bytes:
            raise ProtocolError(
                f"a message of {head} and {total} bytes; "
                f"at most {MAX_HEAD_BYTES} and {self.max_array_bytes} are allowed"
            )
        return head, total


def _read_head(
    data: bytes, total: int
) -> "tuple[str, dict[str, Any], list[tuple[str, np.dtype[Any], tuple[int, ...]]]]":
    try:
        head = orjson.loads(data)
        kind, fields, listed = head["kind"], head["fields"], head["arrays"]
        if not isinstance(kind, str) or not isinstance(fields, dict) or len(listed) > MAX_ARRAYS:
            raise ValueError("kind, fields or arrays are not what they should be")
        arrays = []
        for name, dtype, shape in listed:
            fits = (
                isinstance(name, str)
                and dtype in _DTYPES
                and 1 <= len(shape) <= MAX_AXES
                and all(type(each) is int and 0 <= each < 1 << 40 for each in shape)
            )
            if not fits:
                raise ValueError(f"array {name!r} of {dtype!r} and shape {shape!r}")
            arrays.append((name, np.dtype(dtype), tuple(shape)))
        if len({name for name, _, _ in arrays}) < len(arrays):
            raise ValueError("two arrays of one name")
        if sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in arrays) != total:
            raise ValueError(f"arrays that do not fill {total} bytes")
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the head of a message cannot be understood: {error}") from error
    return kind, fields, arrays
