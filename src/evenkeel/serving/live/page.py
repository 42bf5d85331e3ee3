"""Gives the live page: one file without anything from elsewhere, and headers by which a browser sees to that."""

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

__all__ = ["live_page"]

# Whatever a name or an address holds, no script runs but the page's own, and nothing is loaded from or sent elsewhere.
_POLICY = (
    "default-src 'none'; script-src %s; style-src %s; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def live_page() -> tuple[bytes, bytes]:
    """Reads the page; gives the header lines that belong to it, and its body."""
    body = files(__package__).joinpath("live.html").read_bytes()
    policy = _POLICY % (_hash(b"script", body), _hash(b"style", body))
    lines = (
        "content-type: text/html; charset=utf-8",
        f"content-security-policy: {policy}",
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
        "cache-control: no-cache",
    )
    return "".join(f"{line}\r\n" for line in lines).encode(), body


def _hash(tag: bytes, body: bytes) -> str:
    """Gives the source expression that allows what stands in the page's only element of that kind."""
    (text,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
    return f"'sha256-{b64encode(sha256(text).digest()).decode()}'"
