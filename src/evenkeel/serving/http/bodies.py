"""HTTP bodies: decompressed under a limit, compressed on request."""

import zlib

from evenkeel.errors import RequestError, TooLargeError, UnsupportedError

__all__ = ["compress", "decompress", "pick_encoding"]

_GZIP, _ZLIB = 31, 15  # window bits by which zlib knows the two formats


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
