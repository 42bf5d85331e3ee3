"""The numbers of docs/security.md are those of the code."""

from pathlib import Path

import pytest

from evenkeel.backends.lossy import packets
from evenkeel.backends.lossy.server import ServerLimits
from evenkeel.backends.oip import contract, wire
from evenkeel.backends.worker import frames, key, server as worker
from evenkeel.http2 import connection as http2
from evenkeel.http2.connection import Http2Limits
from evenkeel.http_client import reply
from evenkeel.oip import message, protobuf, requests, tensors, types
from evenkeel.serving import tracing
from evenkeel.serving.config import ServeConfig
from evenkeel.serving.front import access, shares
from evenkeel.serving.grpc import connection as calls
from evenkeel.serving.grpc.connection import GrpcLimits
from evenkeel.serving.http import app, bodies, connection, reader, server
from evenkeel.serving.live import feed
from evenkeel.trust import keys, tls_door

PAGE = (Path(__file__).parents[1] / "docs" / "security.md").read_text(encoding="utf-8")
KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("row", "said", "meant"),
    [
        ("its body, compressed", "64 MiB", ServeConfig().max_body_bytes == 64 * MIB),
        ("what a body unpacks to", "1 MiB, or 100 times", (bodies._FREE_BYTES, bodies._MAX_RATIO) == (MIB, 100)),
        ("members of a gzip", "4096", bodies._MAX_MEMBERS == 4096),
        ("its head; its target", "64 KiB; 8 KiB", reader.ReadLimits().head_bytes == 8 * 8 * KIB),
        ("its head; its target", "64 KiB; 8 KiB", reader.ReadLimits().target_bytes == 8 * KIB),
        ("framing of a body", "16 bytes", reader._FRAMING_SHARE == 16),
        ("time for its head", "20 s; 30 s", connection.HttpLimits().head_timeout_s == 20),
        ("time for its head", "20 s; 30 s", connection.HttpLimits().body_timeout_s == 30),
        ("tensors", "64", message.MAX_TENSORS == 64),
        ("values in JSON of more than 64 KiB", "20,000", message._MAX_VALUES == 20_000),
        ("values in JSON of more than 64 KiB", "20,000", message._SHORT_BYTES == 64 * KIB),
        ("elements of a BYTES", "65,536", tensors._MAX_BYTES_ELEMENTS == 65_536),
        ("dimensions of a tensor", "16", tensors._MAX_DIMENSIONS == 16),
        ("`id`", "4,096", requests.MAX_ID == 4096),
        ("input shown", "60 characters", types._MAX_SHOWN == 60),
        ("input shown", "500 of an error", app._MAX_SHOWN == 500),
        ("connections", "10,000", ServeConfig().max_connections == 10_000),
        ("connections", "less 128", server._RESERVE == 128),
        ("further connections that get", "32", connection._MAX_SENT_AWAY == 32),
        ("bodies that are here", "256 MiB", ServeConfig().max_bodies_bytes == 256 * MIB),
        ("bodies that are here", "up to 64 KiB", connection._FREE_BYTES == 64 * KIB),
        ("image files that wait", "1 GiB", ServeConfig().decode_memory_bytes == 1 << 30),
        ("items at the least-loaded", "64", ServeConfig().max_outstanding == 64),
        ("of those places", "a quarter", shares._OPEN_SHARE == 0.75),
        ("of those places", "half of it for", shares._HEEDED_SHARE == shares._TURNS_SHARE == 0.125),
        ("requests that one connection", "16, or 256 KiB", connection._MAX_AHEAD == 16),
        ("requests that one connection", "16, or 256 KiB", connection._MAX_AHEAD_BYTES == 256 * KIB),
        ("idle connection", "75 s", connection.HttpLimits().keep_alive_s == 75),
        ("client that does not read", "30 s", connection.HttpLimits().write_timeout_s == 30),
        ("viewers of the live page", "16; 256", (feed._MAX_VIEWERS, feed._MAX_NODES) == (16, 256)),
        ("traces", "128 characters; 128", (tracing._MAX_PARENT, tracing._MAX_EVENTS) == (128, 128)),
        ("traces", "2,048", tracing._QUEUE == 2048),
        ("connections | 1,000", "1,000", GrpcLimits().connections == 1000),
        ("calls at once on one", "128", Http2Limits().streams == 128),
        ("headers of a call", "16 KiB", Http2Limits().header_bytes == 16 * KIB),
        ("bytes of a call", "1 MiB; 8 MiB", Http2Limits().window_bytes == MIB),
        ("bytes of a call", "1 MiB; 8 MiB", Http2Limits().connection_bytes == 8 * MIB),
        ("messages of a stream", "16; 4,096", (GrpcLimits().ahead, calls._MAX_UNREAD) == (16, 4096)),
        ("frames that do nothing", "1,000", http2._SPARE_FRAMES == 1000),
        ("calls that a client gives up", "1,000", http2._SPARE_RESETS == 1000),
        ("fields of a message", "10,000", protobuf._MAX_FIELDS == 10_000),
        ("reply of a remote", "1 MiB and 64 bytes", (contract._OTHER_BYTES, contract._VALUE_BYTES) == (MIB, 64)),
        ("reply of a remote", "16 MiB", contract._MAX_REPLY_BYTES == 16 * MIB),
        ("its metadata", "1 MiB", wire.MAX_WORD_BYTES == MIB),
        ("head of its reply", "64 KiB; 16 bytes", (reply._MAX_HEAD_BYTES, reply._FRAMING_SHARE) == (64 * KIB, 16)),
        ("frame of a worker", "256 MiB; 1 MiB", frames.MAX_PAYLOAD_BYTES == 256 * MIB),
        ("frame of a worker", "256 MiB; 1 MiB", frames.MAX_TEXT_BYTES == MIB),
        ("lines of the log about refused", "10 s", access._LOG_EVERY_S == tls_door._LOG_EVERY_S == 10),
        ("handshake of TLS", "64 KiB", tls_door._MAX_HANDSHAKE_BYTES == 64 * KIB),
        ("handshakes that are under way", "512", tls_door.MAX_HANDSHAKES == 512),
        ("client keys; their file", "10,000; 4 MiB", (keys._MAX_KEYS, keys._MAX_FILE_BYTES) == (10_000, 4 * MIB)),
        ("who has yet to prove", "64, with 5 s", (worker._MAX_STRANGERS, worker._PROVE_S) == (64, 5)),
        ("who has yet to prove", "4,096 bytes", key.UNPROVEN_BYTES == 4096),
        ("packet of an image", "1,200", packets.MAX_PAYLOAD == 1200),
        ("packets of a session", "8 MB/s", ServerLimits().bytes_per_s == 8e6),
        ("packets of a session", "2 MB", ServerLimits().burst_bytes == 2e6),
        ("images of a session", "32; 64", (ServerLimits().images, ServerLimits().sessions) == (32, 64)),
    ],
)
def test_each_bound_is_what_the_page_says(row, said, meant):
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row}")][:1]
    assert said in line
    assert meant
