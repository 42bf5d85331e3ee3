"""HTTP bodies: read under a limit and a time limit, decompressed under the same limit, compressed on request."""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from evenkeel.errors import RequestError, SlowRequestError, TooLargeError, UnsupportedError
from evenkeel.serving.sweeper import Sweeper

__all__ = ["ClientGoneError", "Message", "Receive", "Send", "compress", "decompress", "pick_encoding", "read_body"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_GZIP, _ZLIB = 31, 15  # window bits by which zlib knows the two formats


class ClientGoneError(Exception):
    """The client went away; there is nobody to answer."""


async def read_body(receive: Receive, most_bytes: int, patience: Sweeper) -> bytes:
    """The whole body of a request.

    Args:
        receive: the ASGI channel.
        most_bytes: the limit; checked while reading, so that no more than that is ever kept.
        patience: its period is the time that the whole body may take.

    Raises:
        TooLargeError: over the limit.
        SlowRequestError: it did not come in time.
        ClientGoneError: the client went away.
    """
    task = asyncio.current_task()
    assert task is not None
    late = False

    def give_up() -> None:
        nonlocal late
        late = True
        task.cancel()

    patience.add(give_up)
    try:
        return await _read_all(receive, most_bytes)
    except asyncio.CancelledError:
        if late and not task.uncancel():
            raise SlowRequestError(
                "the whole body did not come in time; send it faster, or in smaller requests"
            ) from None
        raise
    finally:
        patience.remove(give_up)


async def _read_all(receive: Receive, most_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        part: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(part)
        if size <= most_bytes:
            if not more:
                return b"".join([*parts, part]) if parts else part
            parts.append(part)
        # Over the limit nothing is kept, but as much again is read: a client in the middle of sending sees the answer
        # only when it can finish.
        elif not more or size > 2 * most_bytes:
            raise TooLargeError(f"the body has more than {most_bytes} bytes, the most that are taken")
        else:
            parts.clear()


def decompress(body: bytes, encoding: str, most_bytes: int) -> bytes:
    """`body` without its Content-Encoding.

    Raises:
        RequestError: not in that format, or cut off.
        TooLargeError: decompressed it is over the limit; no more than the limit is ever unpacked.
        UnsupportedError: an encoding other than gzip and deflate.
    """
    bits = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": _ZLIB}.get(encoding)
    if bits is None:
        raise UnsupportedError(f"Content-Encoding {encoding!r} is not offered; send gzip, deflate or none")
    inflater = zlib.decompressobj(bits)
    try:
        plain = inflater.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not {encoding} as its Content-Encoding says: {error}") from None
    if len(plain) > most_bytes:
        raise TooLargeError(f"the decompressed body has more than {most_bytes} bytes, the most that are taken")
    if not inflater.eof:
        raise RequestError(f"the {encoding} body is cut off")
    if inflater.unused_data:
        raise RequestError(f"{len(inflater.unused_data)} bytes follow the end of the {encoding} body; expected none")
    return plain


def compress(body: bytes, encoding: str) -> bytes:
    """`body` as gzip or deflate."""
    packer = zlib.compressobj(1, zlib.DEFLATED, _GZIP if encoding == "gzip" else _ZLIB)
    return packer.compress(body) + packer.flush()


def pick_encoding(accept: str) -> str | None:
    """The encoding, gzip or deflate, that an Accept-Encoding header prefers; None when it accepts neither."""
    best, most = None, 0.0
    for entry in accept.lower().split(","):
        name, _, rest = entry.partition(";")
        name = name.strip()
        if name not in ("gzip", "deflate"):
            continue
        weight = 1.0
        key, _, value = rest.strip().partition("=")
        if key.strip() == "q":
            try:
                weight = float(value)
            except ValueError:
                continue
        if weight > most:
            best, most = name, weight
    return best
