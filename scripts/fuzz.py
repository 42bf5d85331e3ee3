"""Feed broken input to everything that reads what others send, for a while: requests, gRPC, worker frames, replies.

Pure Python and seeded: `python scripts/fuzz.py --seconds 60 --seed 1`. It ends with 1 at the first input that is
answered wrongly, and prints it. What must hold:

- requests: any cutting of the bytes gives the same events; where h11 reads a request, too, it is the same one, with the
  same end; the application answers everything, and never with 500.
- gRPC: any cutting gives the same frames, messages and errors; every call that is complete ends, never with INTERNAL or
  UNKNOWN; scores are right; nothing is held afterwards, and the next client is answered rightly.
- worker frames: any cutting gives the same frames, or the same error.
- remote replies, over HTTP and gRPC: outputs of the right shape, or a ProtocolError.

Neither memory nor open files grow: both are compared with what they were after a fifth of the time.
"""

import argparse
import asyncio
import gc
import logging
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h11
import numpy as np
import orjson

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from evenkeel.backends.oip.contract import Contract
from evenkeel.backends.worker.frames import FrameKind, FrameReader, encode, encode_object, encode_tensor
from evenkeel.errors import Http2Error, ProtocolError, RequestError
from evenkeel.http2.connection import PREFACE, Http2Connection, Http2Limits
from evenkeel.http2.grpc import GrpcMessageReader, frame_message
from evenkeel.http2.hpack import HeaderReader, write_headers
from evenkeel.oip import InferResponse, RequestedOutput, Tensor, TensorHead, write_request, write_response
from evenkeel.oip.grpc import (
    RepeatedCalls,
    parse_infer_request,
    parse_infer_response,
    write_infer_request,
    write_infer_response,
)
from evenkeel.oip.protobuf import write_field
from evenkeel.serving.grpc.app import GrpcApp
from evenkeel.serving.grpc.connection import GrpcLimits, GrpcServer
from evenkeel.serving.http.reader import Refusal, Request, RequestReader
from http_helpers import INFER, FakeGateway, FakeTransport, connect, make_app, make_card, read_responses, serve

Chance = random.Random

# ---- what is broken ----

_SPLICES = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b",", b";", b'"', b"{", b"}", b"[", b"]", b"0", b"-1", b"1e999",
    b"Content-Length: 3\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: y\r\n",
    b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"null", b"true",
    b"18446744073709551615", b"9223372036854775808", b'"inputs":[],', b'"shape":[0,9223372036854775808],', b"\xff",
]  # fmt: skip


def damage(chance: Chance, data: bytes) -> bytes:
    """`data` with a few places changed."""
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice((0, 0, 1, 2, 8)))
        kind = chance.randrange(4)
        new = chance.choice(_SPLICES) if kind else bytes(chance.randrange(256) for _ in range(chance.randrange(4)))
        if kind == 3 and data:
            other = chance.randrange(len(data))
            new = data[other : other + chance.randrange(30)]
        data = data[:start] + new + data[end:]
    return data


def cut(chance: Chance, data: bytes) -> list[bytes]:
    """`data` in pieces."""
    most = chance.choice((0, 1, 3, len(data)))
    edges = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(most))})
    return [data[start:end] for start, end in pairwise(edges)]


# ---- requests ----


def make_request(chance: Chance) -> bytes:
    """One request, mostly for inference."""
    tensors = [
        Tensor("images", "UINT8", (n, 4, 5, 3), np.full((n, 4, 5, 3), chance.randrange(256), np.uint8)) for n in (1, 2)
    ]
    tensors += [
        Tensor("images", "FP32", (1, 3, 4, 5), np.full((1, 3, 4, 5), chance.choice((0, 7, 0.5, -1)), np.float32)),
        Tensor("images", "BYTES", (1,), [b"GIF89a"]),
    ]
    body, length = write_request(
        [chance.choice(tensors)],
        [RequestedOutput("label")] if chance.random() < 0.3 else (),
        binary=chance.random() < 0.5,
        parameters={"exact": True, "timeout": 1000000} if chance.random() < 0.3 else None,
    )
    method = chance.choice((b"POST", b"POST", b"POST", b"GET", b"HEAD"))
    target = chance.choice((INFER, INFER, INFER, INFER + "/", "/v2", "/metrics")).encode()
    lines = [b"%b %b HTTP/1.%d" % (method, target, chance.random() < 0.9), b"Host: x"]
    if length is not None:
        lines.append(b"Inference-Header-Content-Length: %d" % length)
    if chance.random() < 0.5:
        lines.append(b"Content-Length: %d" % len(body))
        wire = body
    else:
        lines.append(b"Transfer-Encoding: chunked")
        wire = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in cut(chance, body) if part) + b"0\r\n\r\n"
    return b"\r\n".join(lines) + b"\r\n\r\n" + wire


def read_all(pieces: list[bytes]) -> list[tuple[Any, ...]]:
    """What our reader makes of a stream."""
    reader = RequestReader()
    events: list[Request | Refusal] = [event for piece in pieces for event in reader.feed(piece)]
    return [
        ("refused", event.status, event.method)
        if isinstance(event, Refusal)
        else (event.method, event.target, event.body, event.keep)
        for event in events
    ]


def read_by_h11(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """The whole requests that h11 finds in a stream, as far as it goes."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    found = []
    method = target = body = b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return found
        if isinstance(event, h11.Request):
            method, target, body = event.method, event.target, b""
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            found.append((method, target, body))
            connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return found
            connection.start_next_cycle()
        else:
            return found


def fuzz_requests(chance: Chance) -> bytes:
    """Read one stream of requests in three ways, and answer it."""
    data = damage(chance, b"".join(make_request(chance) for _ in range(chance.randrange(1, 4))))
    ours = read_all([data])
    again = read_all(cut(chance, data))
    if ours != again:
        raise Wrong(data, f"cut otherwise, it is {again} instead of {ours}")
    # One of the two may be stricter; what both read must be the same, and neither may see another request in it.
    for (method, target, body, *_), (theirs, *rest) in zip(
        [event for event in ours if event[0] != "refused"], read_by_h11(data), strict=False
    ):
        if (method, target, body) != (theirs, *rest):
            raise Wrong(data, f"we read {(method, target, body)}, h11 reads {(theirs, *rest)}")
    if not _http:
        _http.append(_HttpService())
    (service,) = _http
    methods = [event[2] if event[0] == "refused" else event[0] for event in ours]
    service.loop.run_until_complete(_answer(service, data, methods))
    return data


class _HttpService:
    """One application for all inputs, so that what one leaves behind is seen."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.gateway = FakeGateway()
        self.app = make_app(self.gateway, make_card(datatype="FP32"))

    def close(self) -> None:
        self.app.close()
        self.loop.close()


_http: list[_HttpService] = []


async def _answer(service: _HttpService, data: bytes, methods: list[bytes]) -> None:
    asked = [method.decode() for method in methods]
    app = service.app
    server = serve(app)
    connection, transport = connect(server)
    connection.data_received(data)
    found = []
    for _ in range(2000):
        found = read_responses(transport.sent.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""), asked)
        if len(found) == len(asked) or transport.closing:
            break
        await asyncio.sleep(0.0005)
    closing = transport.closing
    connection.connection_lost(None)
    await asyncio.sleep(0)
    if held := [one for one in (server.held_bytes, app.in_flight, service.gateway.in_flight) if one]:
        raise Wrong(data, f"afterwards there are still {held}")
    service.gateway.submitted.clear()
    for response in found:
        if response.status >= 500 and response.status not in (501, 505):
            raise Wrong(data, f"answered {response.status}: {response.body!r}")
    if len(found) < len(asked) and not closing:
        raise Wrong(data, f"{len(found)} answers to {len(asked)} requests")


# ---- gRPC ----

_SERVICE = b"/inference.GRPCInferenceService/"
_HTTP2_FRAMES = [
    bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + bytes(8),  # PING
    bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]),  # SETTINGS
    bytes([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 9]),  # a window of nine bytes
    bytes([0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 1, 0, 0]),  # WINDOW_UPDATE
    bytes([0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 8]),  # RST_STREAM of the first
    bytes([0, 0, 8, 7, 0, 0, 0, 0, 0]) + bytes(8),  # GOAWAY
    bytes([0, 0, 5, 2, 0, 0, 0, 0, 1]) + bytes(5),  # PRIORITY
]


def make_message(chance: Chance) -> bytes:
    """One ModelInferRequest."""
    kind = chance.randrange(4)
    shape, datatype, raw = (1, 4, 5, 3), "UINT8", [bytes([chance.randrange(256)]) * 60]
    if kind == 1:
        shape, datatype, raw = (1, 3, 4, 5), "FP32", [np.full(60, 7, np.float32).tobytes()]
    elif kind == 2:
        shape, datatype, raw = (1,), "BYTES", [b"\6\0\0\0GIF89a"]
    name = "toy" if chance.random() < 0.95 else "cat"
    parameters = {"exact": True, "timeout": 1000000, "min_confidence": 0.5} if chance.random() < 0.3 else {}
    outputs = ["scores"] if chance.random() < 0.5 else []
    message = write_infer_request(name, "", TensorHead("images", datatype, shape), outputs, parameters, {})
    if kind == 3:
        contents = write_field(5, write_field(4, bytes(chance.randrange(128) for _ in range(60))))
        head = write_field(1, b"images") + write_field(2, b"UINT8") + write_field(3, b"\1\4\5\3")
        return write_field(1, b"toy") + write_field(5, head + contents)
    return message + b"".join(write_field(7, part) for part in raw)


def make_calls(chance: Chance) -> bytes:
    """What a client sends on a connection of its own."""
    parts = [PREFACE, _HTTP2_FRAMES[1]]
    for stream in range(1, 2 * chance.randrange(1, 4), 2):
        method = chance.choice((b"ModelInfer",) * 4 + (b"ModelStreamInfer",) * 3 + (b"ModelReady", b"ServerLive"))
        fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", _SERVICE + method), (b"te", b"trailers")]
        fields.append((b"content-type", b"application/grpc"))
        if chance.random() < 0.3:
            fields.append((b"grpc-timeout", chance.choice((b"5S", b"1m", b"100n", b"x"))))
        if chance.random() < 0.1:
            fields.append((b"grpc-encoding", chance.choice((b"gzip", b"deflate", b"br"))))
        count = chance.choice((1, 1, 1, 2, 4)) if method == b"ModelStreamInfer" else 1
        body = b"".join(frame_message(make_message(chance)) for _ in range(count))
        if chance.random() < 0.05:
            body = b"\1" + body[1:]
        block = write_headers(fields)
        parts.append(_frame(1, 4, block, stream))
        pieces = [piece for piece in cut(chance, body) if piece] or [b""]
        for place, piece in enumerate(pieces):
            last = place == len(pieces) - 1 and chance.random() < 0.95
            parts.append(_frame(0, last, piece, stream))
            if chance.random() < 0.1:
                parts.append(chance.choice(_HTTP2_FRAMES))
    return b"".join(parts)


class _Heard:
    """What an HTTP/2 connection tells of the bytes that it is fed with."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.readers: dict[int, GrpcMessageReader] = {}
        self.whole: dict[int, bytes] = {}
        self.messages: dict[int, list[Any]] = {}
        self.http2 = Http2Connection(self, lambda data: None, Http2Limits(), client=False)
        for piece in pieces:
            try:
                self.http2.feed(piece)
            except Http2Error as error:
                self.events.append(("error", error.code, str(error)))

    def on_headers(self, stream: int, headers: Any, ended: bool) -> None:
        self.events.append(("headers", stream, headers, ended))

    def on_data(self, stream: int, data: bytes, ended: bool) -> None:
        reader = self.readers.setdefault(stream, GrpcMessageReader(1 << 20))
        found = reader.feed(data)
        self.events += [("message", stream, *one) for one in found]
        self.messages[stream] = self.messages.get(stream, []) + found
        self.whole[stream] = self.whole.get(stream, b"") + data
        if ended or reader.error is not None:
            self.events.append(("end", stream, str(reader.error)))
        self.http2.give_room(stream, len(data))

    def on_reset(self, stream: int, code: int) -> None:
        self.events.append(("reset", stream, code))

    def on_goaway(self, code: int) -> None: ...

    def on_room(self) -> None: ...


class _GrpcService:
    """One service for all inputs, so that what one leaves behind is seen."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.gateway = FakeGateway()
        self.http = make_app(self.gateway, make_card(datatype="FP32"))
        self.app = GrpcApp(self.http._models, max_message_bytes=1 << 20)
        self.server = GrpcServer(self.app, GrpcLimits(message_bytes=1 << 20), clock=lambda: self.loop)

    def close(self) -> None:
        self.http.close()
        self.loop.close()

    def ask(self, pieces: list[bytes]) -> tuple[dict[int, list[tuple[str, bytes]]], int, bool]:
        """What is answered, stream by stream; how many messages have no answer; whether the connection was closed."""
        return self.loop.run_until_complete(self._ask(pieces))

    async def _ask(self, pieces: list[bytes]) -> tuple[dict[int, list[tuple[str, bytes]]], int, bool]:
        connection, transport = self.server.connect(), FakeTransport()
        connection.connection_made(transport)
        for piece in pieces:
            if not transport.closing:
                connection.data_received(piece)
        for _ in range(4000):
            if not self.app.in_flight or transport.closing or self.gateway.hold:
                break
            await asyncio.sleep(0.0005 if self.gateway.in_flight == 0 else 0)
        left = self.app.in_flight
        connection.connection_lost(None)
        await asyncio.sleep(0)
        self.gateway.submitted.clear()
        return _answers(transport.sent), left, transport.closing

    def held(self) -> list[object]:
        """What should be nothing between two clients."""
        return [one for one in (self.server.held_bytes, self.app.in_flight, self.gateway.in_flight) if one] + list(
            self.server.connections
        )


def _answers(sent: bytes) -> dict[int, list[tuple[str, bytes]]]:
    found: dict[int, list[tuple[str, bytes]]] = {}
    reader = HeaderReader()
    place = 0
    while place < len(sent) and not sent.startswith(b"HTTP/1.1"):
        size, kind, stream = int.from_bytes(sent[place : place + 3]), sent[place + 3], sent[place + 5 : place + 9]
        payload = sent[place + 9 : place + 9 + size]
        if kind == 1:
            status = dict(reader.read(payload)).get(b"grpc-status", b"")
            found.setdefault(int.from_bytes(stream), []).append(("headers", status))
        elif kind == 0:
            found.setdefault(int.from_bytes(stream), []).append(("data", payload))
        place += 9 + size
    return found


_service: list[_GrpcService] = []


def close_services() -> None:
    """Lets go of the services that all inputs share; the next input has new ones."""
    for service in (*_http, *_service):
        service.close()
    _http.clear()
    _service.clear()


def _frame(kind: int, flags: int, payload: bytes, stream: int = 1) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


_CALL = write_headers(
    [(b":method", b"POST"), (b":path", _SERVICE + b"ModelInfer"), (b"content-type", b"application/grpc")]
)
_NINES = write_infer_request("toy", "", TensorHead("images", "UINT8", (1, 4, 5, 3)), ["scores"], {}, {})
_NINES += write_field(7, bytes([9]) * 60)
_VALID = PREFACE + _frame(4, 0, b"", 0) + _frame(1, 4, _CALL) + _frame(0, 1, frame_message(_NINES))


def fuzz_grpc(chance: Chance) -> bytes:
    """Read what a client sends in two ways, and answer it; then another client."""
    if not _service:
        _service.append(_GrpcService())
    (service,) = _service
    data = damage(chance, make_calls(chance))
    pieces = cut(chance, data)
    heard = _Heard([data])
    ours, again = heard.events, _Heard(pieces).events
    for stream, whole in heard.whole.items():
        if GrpcMessageReader(1 << 20).feed(whole) != heard.messages[stream]:
            raise Wrong(data, f"the messages of stream {stream} depend on its frames")
    if ours != again:
        raise Wrong(data, f"cut otherwise, it is {again} instead of {ours}")
    for event in ours:
        if event[0] == "message":
            _read_twice(data, event[2])
    service.gateway.hold = chance.random() < 0.2  # its client leaves before it is answered
    found, left, closed = service.ask(pieces)
    if left and not closed and not service.gateway.hold:
        raise Wrong(data, f"{left} messages have no answer")
    for stream, parts in found.items():
        for kind, value in parts:
            if kind == "headers" and value in (b"2", b"13"):
                raise Wrong(data, f"stream {stream} ends with status {value!r}")
    if held := service.held():
        raise Wrong(data, f"afterwards there are still {held}")
    service.gateway.hold = False
    right, _, _ = service.ask([_VALID])
    scores = b"".join(value for kind, value in right[1] if kind == "data")[-12:]
    if np.frombuffer(scores, np.float32).tolist() != [0, 9, 18] or right[1][-1] != ("headers", b"0"):
        raise Wrong(data, f"the client after it was answered {right}")
    return data


_calls = RepeatedCalls()


def _read_twice(data: bytes, message: bytes) -> None:
    """Read a message as a new one, and as one that may have come before."""
    found: list[Any] = []
    for read in (parse_infer_request, _calls.parse):
        try:
            name, version, request = read(message)
            said = [(one.name, one.datatype, one.shape, _bytes(one.data), one.parameters) for one in request.inputs]
            found.append((name, version, said, request.outputs, request.id, request.parameters))
        except RequestError as error:
            if len(str(error)) > 1000:
                raise Wrong(data, f"the error has {len(str(error))} characters") from None
            found.append(str(error))
    # NaN is not itself.
    if repr(found[0]) != repr(found[1]):
        raise Wrong(data, f"read again, {message!r} is {found[1]} instead of {found[0]}")


def _bytes(values: Any) -> Any:
    return values if isinstance(values, list) else (values.dtype, values.tobytes())


# ---- worker frames ----


def fuzz_frames(chance: Chance) -> bytes:
    """Read one stream of frames in two ways."""
    frames = [
        encode(FrameKind.PING),
        encode(FrameKind.ERROR, 3, b"what went wrong"),
        encode_object(FrameKind.HELLO, {"protocol": 1, "models": []}),
        b"".join(encode_tensor(FrameKind.TASK, 7, np.zeros((1, 4, 5, 3), np.uint8), key=5)),
        b"".join(encode_tensor(FrameKind.REPLY, 7, np.zeros((2, 3), np.float32), service_s=0.5)),
    ]
    data = damage(chance, b"".join(chance.choice(frames) for _ in range(chance.randrange(1, 6))))
    told = []
    for pieces in ([data], cut(chance, data)):
        reader = FrameReader(1 << 20)
        said: list[object] = []
        for piece in pieces:
            for frame in reader.feed(piece):
                said.append(
                    (frame.kind, frame.ticket, frame.shape, b"" if frame.payload is None else bytes(frame.payload))
                )
                if frame.dtype is not None and frame.payload is not None:
                    frame.tensor()
        told.append([*said, str(reader.error)])
    if told[0] != told[1]:
        raise Wrong(data, f"cut otherwise, it is {told[1]} instead of {told[0]}")
    return data


# ---- remote replies ----

_CONTRACT = Contract(make_card(), "images", "scores", True, False)


def fuzz_replies(chance: Chance) -> bytes:
    """Read one reply of a remote server."""
    rows = chance.randrange(1, 4)
    dtype = chance.choice((np.float32, np.float64, np.float16))
    name = {2: "FP16", 4: "FP32", 8: "FP64"}[np.dtype(dtype).itemsize]
    scores = Tensor("scores", name, (rows, 3), np.ones((rows, 3), dtype))
    response = InferResponse("toy", [scores], "1", "id")
    if chance.random() < 0.3:
        return _fuzz_message(damage(chance, write_infer_response(response)))
    body, length = write_response(response, [chance.random() < 0.5])
    data = damage(chance, body)
    if length is not None and chance.random() < 0.2:
        length += chance.choice((-1, 1, 1000))
    try:
        outputs = _CONTRACT.read(data, length, rows)
    except ProtocolError as error:
        if len(str(error)) > 1000:
            raise Wrong(data, f"the error has {len(str(error))} characters") from None
        return data
    if outputs.shape[0] != rows or outputs.dtype != np.float32 or not np.isfinite(outputs).all():
        raise Wrong(data, f"outputs {outputs.shape} {outputs.dtype}")
    return data


def _fuzz_message(data: bytes) -> bytes:
    try:
        outputs = parse_infer_response(data).outputs
    except ProtocolError as error:
        if len(str(error)) > 1000:
            raise Wrong(data, f"the error has {len(str(error))} characters") from None
        return data
    for tensor in outputs:
        count = len(tensor.data) if isinstance(tensor.data, list) else tensor.data.size
        if count != math.prod(tensor.shape):
            raise Wrong(data, f"an output of shape {tensor.shape} has {count} values")
    return data


# ---- the run ----


class Wrong(Exception):
    """An input that was answered wrongly."""

    def __init__(self, data: bytes, what: str) -> None:
        super().__init__(f"{what}\ninput: {data!r}")


TARGETS: dict[str, Callable[[Chance], bytes]] = {
    "requests": fuzz_requests,
    "grpc": fuzz_grpc,
    "frames": fuzz_frames,
    "replies": fuzz_replies,
}


_MAX_GROWTH_BYTES = 64 << 20
_MAX_FILES = 8


def _used() -> tuple[int, int]:
    """Bytes of memory and number of files that this process has."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))


def main() -> int:
    """Run the targets in turns until the time is over."""
    parser = argparse.ArgumentParser(description="Feed broken input to everything that reads what others send.")
    parser.add_argument("--seconds", type=float, default=60.0, help="How long to go on.")
    parser.add_argument("--inputs", type=int, default=sys.maxsize, help="How many, at most.")
    parser.add_argument("--seed", type=int, default=0, help="The first input's number; each has its own.")
    parser.add_argument("--target", choices=sorted(TARGETS), help="Run this one alone.")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    names = [given.target] if given.target else list(TARGETS)
    began_s = time.monotonic()
    done = dict.fromkeys(names, 0)
    seed = given.seed
    before: tuple[int, int] | None = None
    while time.monotonic() < began_s + given.seconds and sum(done.values()) < given.inputs:
        share = max((time.monotonic() - began_s) / given.seconds, sum(done.values()) / given.inputs)
        if before is None and share > 0.2:
            before = _used()
        for name in names:
            try:
                TARGETS[name](random.Random(f"{name}-{seed}"))
            except Exception as error:
                print(f"{name}, seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
                print(f"again: python scripts/fuzz.py --target {name} --seed {seed} --seconds 1", file=sys.stderr)
                return 1
            done[name] += 1
        seed += 1
    if before is not None:
        (memory, files), now = before, _used()
        if now[0] > memory + _MAX_GROWTH_BYTES or now[1] > files + _MAX_FILES:
            print(f"memory {memory:,} -> {now[0]:,} bytes, open files {files} -> {now[1]}", file=sys.stderr)
            return 1
    print(orjson.dumps({"inputs": done, "next_seed": seed}).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
