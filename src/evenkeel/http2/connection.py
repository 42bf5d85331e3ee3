"""Is one end of an HTTP/2 connection, without I/O: frames, streams, flow control (RFC 9113).

It is fed with what arrived and calls its user's `Http2Events`; what is to be sent it hands to `write` at once. Pushes
are refused and priorities ignored: gRPC uses neither. What a peer could make it keep, or do for nothing, is bounded.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Protocol

from evenkeel.errors import Http2Error
from evenkeel.http2.hpack import ENHANCE_YOUR_CALM, HeaderReader, Headers

__all__ = [
    "CANCEL",
    "ENHANCE_YOUR_CALM",
    "NO_ERROR",
    "PREFACE",
    "REFUSED_STREAM",
    "Http2Connection",
    "Http2Events",
    "Http2Limits",
]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL = 5, 6, 7, 8

_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    range(10)
)
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_ENABLE_PUSH, _MAX_STREAMS, _INITIAL_WINDOW, _MAX_FRAME, _MAX_HEADERS = 2, 3, 4, 5, 6

_head = Struct(">IBI")  # length and type in one; flags; stream
_setting = Struct(">HI")
_number = Struct(">I")
_HEAD_BYTES = 9
_FRAME_BYTES = 16384  # the largest frame, as long as nobody says otherwise; we do not
_DEFAULT_WINDOW = 65535
_MAX_WINDOW = (1 << 31) - 1
_MAX_PEER_FRAME = 1 << 18  # however large a frame the peer would take
_MAX_SETTINGS = 32  # in one frame; each may change the window of every stream
_SPARE_FRAMES = 1000  # without use, before the peer is asked to be calm; each useful one allows ten more
_SPARE_RESETS = 1000  # and streams that the peer gives up; each that was answered allows four more


@dataclass(frozen=True, slots=True)
class Http2Limits:
    """Bounds what one peer may use up.

    Attributes:
        streams: that the peer may have open at once.
        header_bytes: of one stream's headers, as they travel and as they are read.
        window_bytes: of one stream that may come before its reader asks for more.
        connection_bytes: the same, of all streams together; given back as it comes.
    """

    streams: int = 128
    header_bytes: int = 16 << 10
    window_bytes: int = 1 << 20
    connection_bytes: int = 8 << 20


class Http2Events(Protocol):
    """Hears what the peer does. May call the connection meanwhile."""

    def on_headers(self, stream: int, headers: Headers, ended: bool) -> object:
        """Hears of headers; the first of a server's stream open it."""

    def on_data(self, stream: int, data: bytes, ended: bool) -> object:
        """Hears of data, after which `give_room` is due as soon as more may come."""

    def on_reset(self, stream: int, code: int) -> object:
        """Hears that a stream is over before its end, or was never begun (REFUSED_STREAM)."""

    def on_goaway(self, code: int) -> object:
        """Hears that the peer takes no further streams."""

    def on_room(self, stream: int) -> object:
        """Hears that nothing of a stream waits for the peer's room any more: it has been sent, or was given up."""


class _Http2Stream:
    __slots__ = ("ending", "owed", "queue", "receiving", "room", "sending", "trailers", "window")

    def __init__(self, window: int, room: int) -> None:
        self.window = window  # bytes that the peer takes
        self.room = room  # bytes that we take
        self.owed = 0  # of those, given back but not said yet
        self.receiving = self.sending = True
        self.queue: deque[memoryview] | None = None  # what waits for the peer's room
        self.ending = False  # it ends behind the queue
        self.trailers = b""  # with this block; empty for none


class Http2Connection:
    """One end of a connection.

    Args:
        events: hears what the peer does.
        write: sends bytes.
        limits: of what the peer may use up.
        client: this end opens streams; otherwise the peer does.

    Attributes:
        over: nothing is read or sent any more.
        settled: the peer has said its settings, and so speaks HTTP/2.
        peer_streams: how many streams the peer takes at once.
    """

    def __init__(
        self, events: Http2Events, write: Callable[[bytes], object], limits: Http2Limits, *, client: bool
    ) -> None:
        self._events = events
        self._write = write
        self._client = client
        self._limits = limits
        self._headers = HeaderReader(limits.header_bytes)
        self._streams: dict[int, _Http2Stream] = {}
        self._rest = b""
        self._preface = not client  # it is to come
        self.settled = False
        self._next = 1  # stream that we open
        self._last = 0  # stream that the peer opened
        self._leaving = False  # no further streams are taken
        self._block: list[bytes] | None = None  # of a header block that goes on
        self._block_bytes = self._block_stream = self._block_flags = 0
        self._window = _DEFAULT_WINDOW
        self._first_window = _DEFAULT_WINDOW  # of the peer's streams
        self._peer_frame = _FRAME_BYTES
        self._room = limits.connection_bytes
        self._owed = 0
        self._blocked: dict[int, _Http2Stream] = {}
        self._spare = _SPARE_FRAMES
        self._spare_resets = _SPARE_RESETS
        self.over = False
        self.peer_streams = 100 if client else 0  # until it says
        self._greeted = False
        if client:  # a server waits whether it is HTTP/2 that comes
            self._greet()

    def _greet(self) -> None:
        """Says the settings, if that was not done before."""
        if self._greeted:
            return
        self._greeted = True
        limits = self._limits
        settings = [(_INITIAL_WINDOW, limits.window_bytes), (_MAX_HEADERS, limits.header_bytes)]
        settings.append((_ENABLE_PUSH, 0) if self._client else (_MAX_STREAMS, limits.streams))
        said = _frame(_SETTINGS, 0, 0, b"".join(_setting.pack(*setting) for setting in settings))
        room = _frame(_WINDOW_UPDATE, 0, 0, _number.pack(limits.connection_bytes - _DEFAULT_WINDOW))
        self._write((PREFACE if self._client else b"") + said + room)

    @property
    def open_streams(self) -> int:
        """Counts the streams that are not over."""
        return len(self._streams)

    @property
    def used_up(self) -> bool:
        """Tells whether this end can open no further streams: their numbers have an end."""
        return self._next > _MAX_WINDOW

    @property
    def blocked(self) -> bool:
        """Tells whether something waits for the peer's room."""
        return bool(self._blocked)

    @property
    def longest_blocked(self) -> int:
        """Gives the stream that has waited longest for the peer's room; 0 if none waits."""
        return next(iter(self._blocked), 0)

    def is_blocked(self, stream: int) -> bool:
        """Tells whether something of a stream waits for the peer's room."""
        return stream in self._blocked

    # ---- what comes ----

    def feed(self, data: bytes) -> None:
        """Reads what arrived.

        Raises:
            Http2Error: the peer broke a rule. It has been sent the reason, and the connection is over.
        """
        if self.over:
            return
        try:
            self._feed(data)
        except Http2Error as error:
            if not self._preface:  # otherwise it is something else that comes
                self.leave(error.code, str(error))
            self.over = True
            raise

    def _feed(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        position, size = 0, len(data)
        if self._preface:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise Http2Error(PROTOCOL_ERROR, "this port speaks HTTP/2 (gRPC) and nothing else")
            if size < len(PREFACE):
                self._rest = data
                return
            self._preface = False
            position = len(PREFACE)
            self._greet()
        while size - position >= _HEAD_BYTES and not self.over:
            head, flags, stream = _head.unpack_from(data, position)
            length, kind = head >> 8, head & 0xFF
            if length > _FRAME_BYTES:
                raise Http2Error(FRAME_SIZE_ERROR, f"a frame has {length} bytes; at most {_FRAME_BYTES} are taken")
            start = position + _HEAD_BYTES
            if start + length > size:
                break
            position = start + length
            stream &= _MAX_WINDOW
            if not self.settled and (kind != _SETTINGS or flags & _ACK):
                raise Http2Error(PROTOCOL_ERROR, "the first frame must be SETTINGS")
            if self._block is not None and (kind != _CONTINUATION or stream != self._block_stream):
                raise Http2Error(PROTOCOL_ERROR, "a header block was not finished")
            if kind == _DATA:
                self._on_data(stream, flags, data[start:position])
            elif kind == _HEADERS:
                self._on_headers(stream, flags, data[start:position])
            else:
                self._on_other(kind, stream, flags, data[start:position])
        self._rest = data[position:] if position < size else b""

    def _on_data(self, stream: int, flags: int, payload: bytes) -> None:
        size = len(payload)
        self._room -= size
        if self._room < 0:
            raise Http2Error(FLOW_CONTROL_ERROR, "more data came than there was room for")
        self._owed += size
        if 2 * self._owed > self._limits.connection_bytes:
            self._write(_frame(_WINDOW_UPDATE, 0, 0, _number.pack(self._owed)))
            self._room += self._owed
            self._owed = 0
        if flags & _PADDED:
            payload = _unpadded(payload)
        one = self._streams.get(stream)
        if one is None or not one.receiving:
            if one is not None or self._is_idle(stream):
                raise Http2Error(STREAM_CLOSED, "data came for a stream that is not open")
            self._waste()  # of a stream that was given up here while it was on its way
            return
        one.room -= size
        if one.room < 0:
            raise Http2Error(FLOW_CONTROL_ERROR, "more data came for a stream than there was room for")
        one.owed += size - len(payload)
        ended = bool(flags & _END_STREAM)
        if not payload and not ended:
            self._waste()
            return
        self._spare += 10
        if ended:
            one.receiving = False
            self._drop_if_over(stream, one)
        self._events.on_data(stream, payload, ended)

    def give_room(self, stream: int, size: int) -> None:
        """Lets the peer send `size` more bytes of a stream, as that many have been read."""
        one = self._streams.get(stream)
        if one is None or not one.receiving or self.over:
            return
        one.owed += size
        if 2 * one.owed > self._limits.window_bytes:
            self._write(_frame(_WINDOW_UPDATE, 0, stream, _number.pack(one.owed)))
            one.room += one.owed
            one.owed = 0

    def _on_headers(self, stream: int, flags: int, payload: bytes) -> None:
        if flags & _PADDED:
            payload = _unpadded(payload)
        if flags & _HAS_PRIORITY:
            if len(payload) < 5:
                raise Http2Error(FRAME_SIZE_ERROR, "a HEADERS frame is too short")
            payload = payload[5:]
        if flags & _END_HEADERS:
            self._on_block(stream, flags, payload)
        else:
            self._block, self._block_stream, self._block_flags = [payload], stream, flags
            self._block_bytes = len(payload)

    def _on_continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise Http2Error(PROTOCOL_ERROR, "a CONTINUATION frame continues nothing")
        self._waste()
        self._block.append(payload)
        self._block_bytes += len(payload)
        if self._block_bytes > self._limits.header_bytes:
            raise Http2Error(ENHANCE_YOUR_CALM, f"a header block has more than {self._limits.header_bytes} bytes")
        if flags & _END_HEADERS:
            block, self._block = b"".join(self._block), None
            self._on_block(self._block_stream, self._block_flags, block)

    def _on_block(self, stream: int, flags: int, block: bytes) -> None:
        headers = self._headers.read(block)  # in any case: it changes the table
        ended = bool(flags & _END_STREAM)
        one = self._streams.get(stream)
        if one is None:
            if not stream or self._client or not stream & 1:
                if not stream or self._is_idle(stream):
                    raise Http2Error(PROTOCOL_ERROR, "headers came for a stream that is not open")
                self._waste()
                return
            if stream <= self._last:
                self._waste()
                return
            self._last = stream
            if self._leaving or len(self._streams) >= self._limits.streams:
                self._waste()
                self._write(_frame(_RST_STREAM, 0, stream, _number.pack(REFUSED_STREAM)))
                return
            one = self._streams[stream] = _Http2Stream(self._first_window, self._limits.window_bytes)
        elif not one.receiving:
            raise Http2Error(STREAM_CLOSED, "headers came for a stream that had ended")
        elif not self._client and not ended:
            raise Http2Error(PROTOCOL_ERROR, "trailers must end their stream")
        self._spare += 10
        if ended:
            one.receiving = False
            self._drop_if_over(stream, one)
        self._events.on_headers(stream, headers, ended)

    def _on_other(self, kind: int, stream: int, flags: int, payload: bytes) -> None:
        if kind == _WINDOW_UPDATE:
            self._on_window_update(stream, payload)
        elif kind == _RST_STREAM:
            self._on_rst_stream(stream, payload)
        elif kind == _SETTINGS:
            self._on_settings(stream, flags, payload)
        elif kind == _PING:
            if len(payload) != 8:
                raise Http2Error(FRAME_SIZE_ERROR, "a PING frame must have 8 bytes")
            if stream:
                raise Http2Error(PROTOCOL_ERROR, "a PING frame belongs to no stream")
            self._waste()
            if not flags & _ACK:
                self._write(_frame(_PING, _ACK, 0, payload))
        elif kind == _GOAWAY:
            self._on_goaway(stream, payload)
        elif kind == _CONTINUATION:
            self._on_continuation(flags, payload)
        elif kind == _PUSH_PROMISE:
            raise Http2Error(PROTOCOL_ERROR, "nothing may be pushed")
        elif kind == _PRIORITY and len(payload) != 5:
            raise Http2Error(FRAME_SIZE_ERROR, "a PRIORITY frame must have 5 bytes")
        else:  # PRIORITY, and what nobody knows yet
            self._waste()

    def _on_window_update(self, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Http2Error(FRAME_SIZE_ERROR, "a WINDOW_UPDATE frame must have 4 bytes")
        more = _number.unpack(payload)[0] & _MAX_WINDOW
        if not more:
            raise Http2Error(PROTOCOL_ERROR, "a WINDOW_UPDATE frame must add something")
        self._waste()
        if not stream:
            self._window += more
            if self._window > _MAX_WINDOW:
                raise Http2Error(FLOW_CONTROL_ERROR, "the connection's window is too large")
            if self._blocked:
                self._send_blocked()
            return
        one = self._streams.get(stream)
        if one is None:
            if self._is_idle(stream):
                raise Http2Error(PROTOCOL_ERROR, "a WINDOW_UPDATE frame names a stream that was never opened")
            return
        one.window += more
        if one.window > _MAX_WINDOW:
            raise Http2Error(FLOW_CONTROL_ERROR, "a stream's window is too large")
        if stream in self._blocked:
            self._send_blocked()

    def _on_rst_stream(self, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Http2Error(FRAME_SIZE_ERROR, "a RST_STREAM frame must have 4 bytes")
        if not stream or self._is_idle(stream):
            raise Http2Error(PROTOCOL_ERROR, "a RST_STREAM frame names a stream that was never opened")
        self._waste()
        if self._streams.pop(stream, None) is None:
            return
        waited = self._blocked.pop(stream, None) is not None
        if not self._client:
            self._spare_resets -= 1
            if self._spare_resets < 0:
                raise Http2Error(ENHANCE_YOUR_CALM, "too many requests are given up")
        self._events.on_reset(stream, _number.unpack(payload)[0])
        if waited:
            self._events.on_room(stream)

    def _on_settings(self, stream: int, flags: int, payload: bytes) -> None:
        if stream:
            raise Http2Error(PROTOCOL_ERROR, "a SETTINGS frame belongs to no stream")
        if len(payload) % _setting.size or (flags & _ACK and payload):
            raise Http2Error(FRAME_SIZE_ERROR, "a SETTINGS frame has a wrong length")
        if len(payload) > _MAX_SETTINGS * _setting.size:
            raise Http2Error(ENHANCE_YOUR_CALM, f"a SETTINGS frame has more than {_MAX_SETTINGS} settings")
        self._waste()
        if flags & _ACK:
            return
        if not self.settled and self._client:
            self.peer_streams = _MAX_WINDOW  # unless it says otherwise now
        self.settled = True
        for name, value in _setting.iter_unpack(payload):
            if name == _INITIAL_WINDOW:
                self._on_first_window(value)
            elif name == _MAX_FRAME:
                if not _FRAME_BYTES <= value < 1 << 24:
                    raise Http2Error(PROTOCOL_ERROR, "a setting for the size of frames is out of range")
                self._peer_frame = min(value, _MAX_PEER_FRAME)
            elif name == _ENABLE_PUSH and value > 1:
                raise Http2Error(PROTOCOL_ERROR, "a setting for pushes is neither 0 nor 1")
            elif name == _MAX_STREAMS:
                self.peer_streams = value
        self._write(_frame(_SETTINGS, _ACK, 0, b""))
        if self._blocked:
            self._send_blocked()

    def _on_first_window(self, value: int) -> None:
        if value > _MAX_WINDOW:
            raise Http2Error(FLOW_CONTROL_ERROR, "a setting for the window of streams is too large")
        more = value - self._first_window
        self._first_window = value
        for one in self._streams.values():
            one.window += more
            if one.window > _MAX_WINDOW:
                raise Http2Error(FLOW_CONTROL_ERROR, "a stream's window is too large")

    def _on_goaway(self, stream: int, payload: bytes) -> None:
        if len(payload) < 8:
            raise Http2Error(FRAME_SIZE_ERROR, "a GOAWAY frame must have at least 8 bytes")
        if stream:
            raise Http2Error(PROTOCOL_ERROR, "a GOAWAY frame belongs to no stream")
        self._waste()
        last = _number.unpack_from(payload)[0] & _MAX_WINDOW
        if self._client:
            self._events.on_goaway(_number.unpack_from(payload, 4)[0])
            for late in [number for number in self._streams if number > last]:
                self._streams.pop(late, None)
                waited = self._blocked.pop(late, None) is not None
                self._events.on_reset(late, REFUSED_STREAM)
                if waited:
                    self._events.on_room(late)

    def _is_idle(self, stream: int) -> bool:
        """Tells whether a stream was never opened."""
        if self._client:
            return not stream & 1 or stream >= self._next
        return not stream & 1 or stream > self._last

    def _waste(self) -> None:
        """Counts a frame that brings nothing by itself, so that they cannot come without end."""
        self._spare -= 1
        if self._spare < 0:
            raise Http2Error(ENHANCE_YOUR_CALM, "too many frames do nothing")
        self._spare = min(self._spare, 10 * _SPARE_FRAMES)

    # ---- what goes ----

    def open(self, block: bytes, data: bytes, ended: bool = True) -> int:
        """Opens a stream with these headers and data; gives its number."""
        stream = self._next
        self._next += 2
        one = self._streams[stream] = _Http2Stream(self._first_window, self._limits.window_bytes)
        self._send(stream, one, block, data, b"", ended)
        return stream

    def send(self, stream: int, block: bytes, data: bytes, trailers: bytes = b"") -> None:
        """Sends data of a stream, as far as the peer has room; the rest follows.

        Args:
            stream: that the peer opened; nothing happens if it is over.
            block: of headers to go before; may be empty.
            data: may be empty.
            trailers: block that ends the stream; empty if more follows.
        """
        one = self._streams.get(stream)
        if one is not None and one.sending and not self.over:
            self._send(stream, one, block, data, trailers, False)

    def _send(self, stream: int, one: _Http2Stream, block: bytes, data: bytes, trailers: bytes, ended: bool) -> None:
        parts = []
        if block:
            parts += _header_frames(stream, block, _END_STREAM if ended and not data else 0)
        size = len(data)
        if one.queue is not None or size > one.window or size > self._window or size > self._peer_frame:
            if one.queue is None:
                one.queue = deque()
            if size:
                one.queue.append(memoryview(data))
            one.trailers, one.ending = trailers, ended or bool(trailers)
            if parts:
                self._write(b"".join(parts))
            self._blocked[stream] = one
            self._send_blocked()
            return
        if size:
            one.window -= size
            self._window -= size
            self._spare += 2  # the peer will say that it has room again
            parts += (_head.pack(size << 8 | _DATA, _END_STREAM if ended else 0, stream), data)
        if trailers:
            parts += _header_frames(stream, trailers, _END_STREAM)
        self._write(b"".join(parts))
        if trailers or ended:
            self._sent_all(stream, one)

    def _send_blocked(self) -> None:
        parts: list[bytes | memoryview] = []
        sent, free = [], []
        for stream, one in list(self._blocked.items()):
            queue = one.queue
            assert queue is not None
            while queue:
                piece = queue[0]
                size = min(len(piece), one.window, self._window, self._peer_frame)
                if size <= 0:
                    break
                one.window -= size
                self._window -= size
                self._spare += 2
                last = size == len(piece)
                if last:
                    queue.popleft()
                else:
                    queue[0] = piece[size:]
                ends = one.ending and not one.trailers and not queue
                parts += (_head.pack(size << 8 | _DATA, _END_STREAM if ends else 0, stream), piece[:size])
            if not queue:
                del self._blocked[stream]
                one.queue = None
                free.append(stream)
                if one.trailers:
                    parts += _header_frames(stream, one.trailers, _END_STREAM)
                if one.ending:
                    sent.append((stream, one))
        if parts:
            self._write(b"".join(parts))
        for stream, one in sent:
            self._sent_all(stream, one)
        for stream in free:
            self._events.on_room(stream)

    def _sent_all(self, stream: int, one: _Http2Stream) -> None:
        one.sending = False
        if not self._client:
            self._spare_resets = min(self._spare_resets + 4, 10 * _SPARE_RESETS)
            if one.receiving:
                # It was answered before it had all come; what is still on its way is not wanted.
                del self._streams[stream]
                self._write(_frame(_RST_STREAM, 0, stream, _number.pack(NO_ERROR)))
        self._drop_if_over(stream, one)

    def _drop_if_over(self, stream: int, one: _Http2Stream) -> None:
        if not one.receiving and not one.sending:
            self._streams.pop(stream, None)

    def reset(self, stream: int, code: int) -> None:
        """Gives a stream up; nothing is heard of it any more."""
        if self._streams.pop(stream, None) is not None and not self.over:
            waited = self._blocked.pop(stream, None) is not None
            self._write(_frame(_RST_STREAM, 0, stream, _number.pack(code)))
            if waited:
                self._events.on_room(stream)

    def leave(self, code: int = NO_ERROR, why: str = "", *, soon: bool = False) -> None:
        """Says that no further streams are taken; those that are open go on.

        Args:
            code: the reason.
            why: the reason in words.
            soon: further streams are taken until it is said again without.
        """
        if self.over:
            return
        self._greet()
        self._leaving = not soon
        last = _MAX_WINDOW if soon else self._last
        self._write(_frame(_GOAWAY, 0, 0, _number.pack(last) + _number.pack(code) + why.encode()[:200]))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _head.pack(len(payload) << 8 | kind, flags, stream) + payload


def _header_frames(stream: int, block: bytes, flags: int) -> list[bytes]:
    if len(block) <= _FRAME_BYTES:
        return [_head.pack(len(block) << 8 | _HEADERS, flags | _END_HEADERS, stream), block]
    frames = [_frame(_HEADERS, flags, stream, block[:_FRAME_BYTES])]
    for start in range(_FRAME_BYTES, len(block), _FRAME_BYTES):
        last = start + _FRAME_BYTES >= len(block)
        frames.append(_frame(_CONTINUATION, _END_HEADERS if last else 0, stream, block[start : start + _FRAME_BYTES]))
    return frames


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise Http2Error(PROTOCOL_ERROR, "a frame has more padding than bytes")
    return payload[1 : len(payload) - payload[0]]
