"""Decompresses HTTP bodies under a limit, and compresses them on request."""

import zlib

from evenkeel.errors import RequestError, TooLargeError, UnsupportedError

__all__ = ["compress", "decompress", "pick_encoding"]

_MAX_RATIO = 100  # of the decompressed body to the body, where that is more than ...
_FREE_BYTES = 1 << 20
_MAX_MEMBERS = 4096
_MAX_ACCEPT = 1000  # characters of an Accept-Encoding that are read
_WINDOW_BYTES = 64 << 10  # what is copied at the end of a member is no more than that
_GZIP, _ZLIB = 31, 15  # window bits by which zlib knows the two formats


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decompresses `body`; gzip may come in several members, one behind the other.

    Raises:
        RequestError: not in that format, or cut off.
        TooLargeError: decompressed it is over the limit, or far larger than what was sent; no more than that is ever
            unpacked.
        UnsupportedError: an encoding other than gzip and deflate.
    """
    bits = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": _ZLIB}.get(encoding)
    if bits is None:
        raise UnsupportedError(f"Content-Encoding {encoding[:20]!r} is not offered; send gzip, deflate or none")
    allowed = min(max_bytes, max(_MAX_RATIO * len(body), _FREE_BYTES))
    view = memoryview(body)
    parts = []
    place = size = members = 0
    inflater = zlib.decompressobj(bits)
    while place < len(body):
        window = view[place : place + _WINDOW_BYTES]
        try:
            part = inflater.decompress(window, allowed + 1 - size)
        except zlib.error as error:
            raise RequestError(f"the body is not {encoding} as its encoding says: {error}") from None
        size += len(part)
        if size > allowed:
            raise _too_large(allowed, max_bytes)
        parts.append(part)
        place += len(window) - len(inflater.unused_data)
        if inflater.eof and place < len(body):
            if not body[place] and body.count(b"\0", place) == len(body) - place:
                break  # padding, which gzip's own tools ignore
            members += 1
            if bits != _GZIP or members >= _MAX_MEMBERS:
                raise RequestError(f"{len(body) - place} bytes follow the end of the {encoding} body; expected none")
            inflater = zlib.decompressobj(bits)
    if not inflater.eof:
        raise RequestError(f"the {encoding} body is cut off")
    return b"".join(parts)


def _too_large(allowed: int, max_bytes: int) -> TooLargeError:
    if allowed == max_bytes:
        return TooLargeError(f"the decompressed body has more than {max_bytes} bytes, which is the limit")
    return TooLargeError(
        f"the decompressed body has more than {allowed} bytes, {_MAX_RATIO} times what was sent; send it as it is"
    )


def compress(body: bytes, encoding: str) -> bytes:
    """Compresses `body` as gzip or deflate."""
    packer = zlib.compressobj(1, zlib.DEFLATED, _GZIP if encoding == "gzip" else _ZLIB)
    return packer.compress(body) + packer.flush()


def pick_encoding(accept: str) -> str | None:
    """Picks the encoding, gzip or deflate, that an Accept-Encoding header prefers; None when it accepts neither."""
    best, heaviest = None, 0.0
    for entry in accept[:_MAX_ACCEPT].lower().split(","):
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
        if weight > heaviest:
            best, heaviest = name, weight
    return best
