"""A load client that costs next to nothing: prebuilt requests, closed loop, one thread.

What a benchmark on two cores measures is the server and the client together, so the client does the least that is
still HTTP/1.1: it sends the same bytes again and again, reads the status and the content length, and counts what is
not 200. A server that does not say the length of its answers cannot be measured with it.
"""

import re
import select
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

__all__ = ["Connection", "Load", "drive", "request_bytes"]

_MAX_BYTES = 1 << 20  # of a response
_HEAD_END = b"\r\n\r\n"
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_TIMEOUT_S = 30.0


def request_bytes(url: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """A POST of `body` to `url`, ready to be sent."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + _HEAD_END + body


class Connection:
    """One connection to the server at `url`, one request at a time; `tls` is for https."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.socket = socket.create_connection((parts.hostname, parts.port or 80), _TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if parts.scheme == "https":
            assert tls is not None
            self.socket = tls.wrap_socket(self.socket, server_hostname=parts.hostname)
        # Of a fixed size and used again and again: fresh memory for each piece would cost more than all the rest.
        self._buffer = bytearray(_MAX_BYTES)
        self._view = memoryview(self._buffer)
        self._received_bytes = 0
        self._wanted_bytes = 0  # of the response, once its head is in

    def send(self, request: bytes) -> None:
        self._received_bytes = self._wanted_bytes = 0
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Take what has come; True when the response is complete."""
        count = self.socket.recv_into(self._view[self._received_bytes :])
        if not count:
            raise ConnectionError("the server closed the connection, or its response is too long")
        self._received_bytes += count
        if not self._wanted_bytes:
            end = self._buffer.find(_HEAD_END, 0, self._received_bytes)
            if end < 0:
                return False
            length = _CONTENT_LENGTH.search(self._buffer, 0, end)
            if length is None:
                raise ConnectionError(f"the response does not say its length: {bytes(self._buffer[:200])!r}")
            self._wanted_bytes = end + len(_HEAD_END) + int(length[1])
        return self._received_bytes >= self._wanted_bytes

    @property
    def status(self) -> int:
        return int(self._buffer[9:12])

    def head_and_body(self) -> tuple[bytes, bytes]:
        head, _, body = bytes(self._view[: self._received_bytes]).partition(_HEAD_END)
        return head, body

    def exchange(self, request: bytes) -> int:
        """Send, wait for the whole response; its status."""
        self.send(request)
        while not self.receive():
            pass
        return self.status

    def close(self) -> None:
        self.socket.close()


@dataclass(frozen=True)
class Load:
    """What a closed loop saw: latencies `[requests]`, how long it ran, and how many were not answered with 200."""

    latencies_ms: NDArray[np.float64]
    elapsed_s: float
    failed: int

    @property
    def requests(self) -> int:
        return len(self.latencies_ms)

    @property
    def rate_per_s(self) -> float:
        return self.requests / self.elapsed_s

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.latencies_ms, percent))


def drive(
    url: str,
    request: bytes,
    connections: int = 1,
    *,
    requests: int | None = None,
    seconds: float | None = None,
    tls: ssl.SSLContext | None = None,
) -> Load:
    """Send `request` over each connection as soon as its last one is answered, for a number of requests or a time.

    Over https there may be one connection only.
    """
    most = requests or 1 << 40
    opened = [Connection(url, tls) for _ in range(connections)]
    try:
        until_s = time.perf_counter() + (seconds or 1e9)
        return _one(opened[0], request, most, until_s) if connections == 1 else _many(opened, request, most, until_s)
    finally:
        for connection in opened:
            connection.close()


def _one(connection: Connection, request: bytes, most: int, until_s: float) -> Load:
    latencies_s: list[float] = []
    failed = 0
    now_s = began_s = time.perf_counter()
    while len(latencies_s) < most and now_s < until_s:
        sent_s = now_s
        failed += connection.exchange(request) != 200
        now_s = time.perf_counter()
        latencies_s.append(now_s - sent_s)
    return Load(np.array(latencies_s) * 1e3, now_s - began_s, failed)


def _many(connections: list[Connection], request: bytes, most: int, until_s: float) -> Load:
    by_number = {connection.socket.fileno(): connection for connection in connections}
    sent_s: dict[int, float] = {}
    latencies_s: list[float] = []
    failed = 0
    with select.epoll() as poll:
        began_s = time.perf_counter()
        for number, connection in by_number.items():
            poll.register(number, select.EPOLLIN)
            sent_s[number] = time.perf_counter()
            connection.send(request)
        open_requests = len(connections)
        while open_requests:
            ready = poll.poll(_TIMEOUT_S)
            if not ready:
                raise TimeoutError(f"no answer for {_TIMEOUT_S:g} s")
            for number, _ in ready:
                connection = by_number[number]
                if not connection.receive():
                    continue
                now_s = time.perf_counter()
                latencies_s.append(now_s - sent_s[number])
                failed += connection.status != 200
                if now_s < until_s and len(latencies_s) + open_requests <= most:
                    sent_s[number] = now_s
                    connection.send(request)
                else:
                    open_requests -= 1
        return Load(np.array(latencies_s) * 1e3, time.perf_counter() - began_s, failed)
