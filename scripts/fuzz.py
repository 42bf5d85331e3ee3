"""Feed broken input to everything that reads what others send, for a while: requests, worker frames, remote replies.

Pure Python and seeded: `python scripts/fuzz.py --seconds 60 --seed 1`. It ends with 1 at the first input that is
answered wrongly, and prints it. What must hold:

- requests: any cutting of the bytes gives the same events; where h11 reads a request, too, it is the same one, with the
  same end; the application answers everything, and never with 500.
- worker frames: any cutting gives the same frames, or the same error.
- remote replies: outputs of the right shape, or a ProtocolError.
"""

import argparse
import asyncio
import logging
import random
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
from evenkeel.errors import ProtocolError
from evenkeel.oip import InferResponse, RequestedOutput, Tensor, write_request, write_response
from evenkeel.serving.http.reader import Refusal, Request, RequestReader
from http_helpers import INFER, FakeGateway, connect, make_app, make_card, read_responses, serve

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
    asyncio.run(_answer(data, [event[2] if event[0] == "refused" else event[0] for event in ours]))
    return data


async def _answer(data: bytes, methods: list[bytes]) -> None:
    asked = [method.decode() for method in methods]
    app = make_app(FakeGateway(), make_card(datatype="FP32"))
    connection, transport = connect(serve(app))
    connection.data_received(data)
    found = []
    for _ in range(2000):
        found = read_responses(transport.sent.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""), asked)
        if len(found) == len(asked) or transport.closing:
            break
        await asyncio.sleep(0.0005)
    closing = transport.closing
    connection.connection_lost(None)
    app.close()
    for response in found:
        if response.status >= 500 and response.status not in (501, 505):
            raise Wrong(data, f"answered {response.status}: {response.body!r}")
    if len(found) < len(asked) and not closing:
        raise Wrong(data, f"{len(found)} answers to {len(asked)} requests")


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
    body, length = write_response(InferResponse("toy", [scores], "1", "id"), [chance.random() < 0.5])
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


# ---- the run ----


class Wrong(Exception):
    """An input that was answered wrongly."""

    def __init__(self, data: bytes, what: str) -> None:
        super().__init__(f"{what}\ninput: {data!r}")


TARGETS: dict[str, Callable[[Chance], bytes]] = {
    "requests": fuzz_requests,
    "frames": fuzz_frames,
    "replies": fuzz_replies,
}


def main() -> int:
    """Run the targets in turns until the time is over."""
    parser = argparse.ArgumentParser(description="Feed broken input to everything that reads what others send.")
    parser.add_argument("--seconds", type=float, default=60.0, help="How long to go on.")
    parser.add_argument("--seed", type=int, default=0, help="The first input's number; each has its own.")
    parser.add_argument("--target", choices=sorted(TARGETS), help="Run this one alone.")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    names = [given.target] if given.target else list(TARGETS)
    until_s = time.monotonic() + given.seconds
    done = dict.fromkeys(names, 0)
    seed = given.seed
    while time.monotonic() < until_s:
        for name in names:
            try:
                TARGETS[name](random.Random(f"{name}-{seed}"))
            except Exception as error:
                print(f"{name}, seed {seed}: {type(error).__name__}: {error}", file=sys.stderr)
                print(f"again: python scripts/fuzz.py --target {name} --seed {seed} --seconds 1", file=sys.stderr)
                return 1
            done[name] += 1
        seed += 1
    print(orjson.dumps({"inputs": done, "next_seed": seed}).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
