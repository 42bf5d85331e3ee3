"""Reads and writes what gRPC puts into an HTTP/2 stream: messages behind their lengths, statuses, timeouts."""

from enum import IntEnum
from math import ceil
from urllib.parse import unquote

from evenkeel.errors import RequestError, TooLargeError

__all__ = [
    "GrpcMessageReader",
    "GrpcStatus",
    "frame_message",
    "read_status_message",
    "read_timeout_s",
    "write_status_message",
    "write_timeout",
]

_PREFIX_BYTES = 5
_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MAX_TIMEOUT_DIGITS = 8
_PLAIN = frozenset(range(0x20, 0x7F)) - {ord("%")}


class GrpcStatus(IntEnum):
    """Says how a call ended."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class GrpcMessageReader:
    """Takes the messages out of a stream's data.

    Args:
        max_bytes: of one message, as it travels.

    Attributes:
        error: why nothing is read any more: a message is too large, or begins with a wrong byte.
    """

    __slots__ = ("_max_bytes", "_rest", "_wanted", "error")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()  # of a message that is not complete
        self._wanted = 0  # its size with the prefix, once that is here
        self.error: RequestError | None = None

    @property
    def rest_bytes(self) -> int:
        """Counts the bytes of a message that is not complete."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[tuple[bytes, bool]]:
        """Gives the messages that are complete with this; each with whether it is compressed."""
        if self.error is not None:
            return []
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return []
            data = bytes(self._rest)
            self._rest.clear()
            self._wanted = 0
        found: list[tuple[bytes, bool]] = []
        position, end = 0, len(data)
        while end - position >= _PREFIX_BYTES:
            size = int.from_bytes(data[position + 1 : position + _PREFIX_BYTES])
            if data[position] > 1:
                self.error = RequestError("a gRPC message begins with neither 0 nor 1")
                return found
            if size > self._max_bytes:
                self.error = TooLargeError(f"a message has {size} bytes; at most {self._max_bytes} are taken")
                return found
            stop = position + _PREFIX_BYTES + size
            if stop > end:
                self._wanted = stop - position
                break
            found.append((data[position + _PREFIX_BYTES : stop], bool(data[position])))
            position = stop
        if position < end:
            self._rest += data[position:]
        return found


def frame_message(message: bytes) -> bytes:
    """Writes a message with its prefix, not compressed."""
    return b"\0%b%b" % (len(message).to_bytes(4), message)


def read_timeout_s(value: bytes) -> float:
    """Reads the header grpc-timeout.

    Raises:
        RequestError: it is none.
    """
    digits, unit = value[:-1], value[-1:]
    if not digits.isdigit() or len(digits) > _MAX_TIMEOUT_DIGITS or unit not in _UNITS_S:
        raise RequestError(f"header grpc-timeout must be up to 8 digits and a unit, found {value[:20]!r}")
    return int(digits) * _UNITS_S[unit]


def write_timeout(seconds: float) -> bytes:
    """Writes the header grpc-timeout, rounded up to milliseconds; above a day, to hours."""
    milliseconds = max(1, ceil(seconds * 1e3))
    return b"%dm" % milliseconds if milliseconds < 86_400_000 else b"%dH" % min(ceil(seconds / 3600), 99_999_999)


def write_status_message(text: str) -> bytes:
    """Writes the header grpc-message."""
    return b"".join(bytes([byte]) if byte in _PLAIN else b"%%%02X" % byte for byte in text.encode("utf-8", "replace"))


def read_status_message(value: bytes) -> str:
    """Reads the header grpc-message."""
    return unquote(value.decode("latin-1"), errors="replace")
