"""Reads the path of a request, and says which right it needs: from one place, so that no spelling evades a right."""

from contextlib import suppress
from functools import lru_cache
from urllib.parse import unquote

import httptools

from evenkeel.trust.keys import Right

__all__ = ["path_of", "right_for"]

_HEALTH = frozenset({"/v2/health/live", "/v2/health/ready"})


def path_of(target: bytes) -> str:
    """Gives the path in the target of a request, without what is behind a `?` and without a `/` at its end."""
    if not target.startswith(b"/"):
        # Clients send whole URLs to proxies.
        with suppress(httptools.HttpParserInvalidURLError):
            target = httptools.parse_url(target).path or b"/"
    return unquote(target.partition(b"?")[0].decode("latin-1")).rstrip("/") or "/"


@lru_cache(256)
def right_for(target: bytes) -> Right | None:
    """Gives the right that is needed to ask for the target; None for health."""
    path = path_of(target)
    if path in _HEALTH:
        return None
    if not path.startswith("/v2"):
        return "watch"  # the live page, /metrics
    if path.startswith(("/v2/repository/", "/v2/fleet")) and path != "/v2/repository/index":
        return "manage"
    return "infer"
