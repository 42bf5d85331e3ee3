"""Decides who may ask for what: by key, by client certificate, or both. The same for every front end."""

import asyncio
import base64
import binascii
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

from evenkeel.errors import ForbiddenError, UnauthenticatedError
from evenkeel.settings import FilePath, one_of, setting
from evenkeel.trust.keys import CLIENT_KEYS_VARIABLE, KeyRing, Right
from evenkeel.trust.reloaded import Reloaded
from evenkeel.trust.tls import ServerContext, ServerTls, server_contexts
from evenkeel.trust.tls_door import TlsDoor

__all__ = ["Access", "Guard", "KeysConfig"]

_log = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0
_MAX_HEADER = 2048
_MAX_NAMES = 10_000  # that are counted apart
_OTHERS = "others"
_CERTIFIED: frozenset[Right] = frozenset({"infer", "watch"})


@dataclass(frozen=True)
class KeysConfig:
    """Says which keys clients must have."""

    file: FilePath | None = setting(
        None, f"File with the keys, one a line; else the variable {CLIENT_KEYS_VARIABLE}, or none."
    )
    open: tuple[Annotated[str, one_of(("health", "watch"))], ...] = setting(
        ("health",), "What needs no key: health, and watch, which is /metrics and the live page."
    )


class Access:
    """Lets requests in, or says why not. Counts both.

    Args:
        keys: that clients send; None: they need none.
        certificates: `none`, clients show none; `required`, nobody connects without; `optional`: one counts as a key
            for inference and watching. Where there are no keys, a certificate allows everything.
        open_to_all: what needs neither: `health`, `watch`.
        clock: gives seconds.

    Attributes:
        admitted: how many requests each name has made.
        refused: how many were refused: `no key`, `wrong key`, `not allowed`.
    """

    def __init__(
        self,
        keys: KeyRing | None,
        certificates: str = "none",
        open_to_all: Collection[str] = ("health",),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys, self._certificates, self._clock = keys, certificates, clock
        self._open = frozenset(None if part == "health" else part for part in open_to_all)
        self.admitted: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._next_log_s = 0.0

    def admit(self, right: Right | None, authorization: str, certificate: str, peer: str, local: bool = False) -> str:
        """Gives the name of who asks; empty where that is not known.

        Args:
            right: that the request needs; None for health.
            authorization: the header of that name: `Bearer KEY`; for watching also `Basic`, the key as its password.
            certificate: the name in the client's certificate; empty for none.
            peer: where the request comes from, for the log.
            local: it came over a socket in the file system, which has permissions of its own and no certificates.

        Raises:
            UnauthenticatedError: who it is is not known.
            ForbiddenError: it is, but may not do this.
        """
        if right in self._open:
            return ""
        if self._keys is None:
            name, allowed = certificate or ("local" if local else ""), True
        elif authorization or self._certificates != "optional" or not certificate:
            holder = self._keys.find(_key_in(authorization, right == "watch"))
            name, allowed = ("", False) if holder is None else (holder.name, right is None or right in holder.rights)
        else:
            name, allowed = certificate, right is None or right in _CERTIFIED
        if not name:
            if not authorization:
                self._refuse("no key", peer)
                raise UnauthenticatedError(self._wanted(), _challenge(right, ""))
            self._refuse("wrong key", peer)
            raise UnauthenticatedError("this key is not known here", _challenge(right, "invalid_token"))
        if not allowed:
            self._refuse("not allowed", f"{name} at {peer}")
            message = f"{name} may not do this: it needs a key with the right to {right}"
            raise ForbiddenError(message, f'Bearer realm="evenkeel", error="insufficient_scope", scope="{right}"')
        self.admitted[name if name in self.admitted or len(self.admitted) < _MAX_NAMES else _OTHERS] += 1
        return name

    def reload(self) -> bool:
        """Looks now whether the keys have changed; tells whether there are new ones."""
        return self._keys is not None and self._keys.reload()

    def _wanted(self) -> str:
        if self._keys is None:
            return "this server wants a client certificate"
        other = ", or show a client certificate" if self._certificates == "optional" else ""
        return f"this server wants a key: send the header `Authorization: Bearer KEY`{other}"

    def _refuse(self, why: str, peer: str) -> None:
        self.refused[why] += 1
        now_s = self._clock()
        if now_s >= self._next_log_s:
            self._next_log_s = now_s + _LOG_EVERY_S
            counts = ", ".join(f"{count:,} {reason}" for reason, count in self.refused.items())
            _log.warning("a request of %s was refused: %s (so far: %s)", peer or "a client", why, counts)


class Guard:
    """Stands in front of a server's front ends: TLS, and who is let in.

    Args:
        access: says which requests are let in; None: all are.
        tls: the server's files; None: it speaks no TLS.

    Attributes:
        handshakes: how many ended how; see `TlsDoor`.
    """

    def __init__(self, access: Access | None = None, tls: ServerTls | None = None) -> None:
        self.access, self.tls = access, tls
        self.handshakes: Counter[str] = Counter()
        self._contexts: list[Reloaded[ServerContext]] = []

    def door(
        self, make: Callable[[], asyncio.BaseProtocol], protocols: Sequence[str], plain_answer: bytes = b""
    ) -> TlsDoor | None:
        """Gives TLS in front of the protocols that `make` makes; None where the server speaks none.

        Args:
            make: makes the protocol of a connection.
            protocols: their names for ALPN.
            plain_answer: for who speaks no TLS.

        Raises:
            ConfigurationError: a file of TLS cannot be used.
        """
        if self.tls is None:
            return None
        contexts = server_contexts(self.tls, protocols)
        self._contexts.append(contexts)
        return TlsDoor(contexts, make, plain_answer=plain_answer, outcomes=self.handshakes)

    @property
    def expires_s(self) -> float | None:
        """Says when the server's certificate expires, in seconds since the epoch; None where it has none."""
        return min((contexts.get().expires_s for contexts in self._contexts), default=None)

    def reload(self) -> bool:
        """Looks now whether keys or certificates have changed; tells whether there are new ones.

        They are looked at once a second anyhow while there are requests.
        """
        changed = [contexts.reload() for contexts in self._contexts]
        return any(changed) | (self.access is not None and self.access.reload())


def _challenge(right: Right | None, error: str) -> str:
    """Says how to prove who one is; to watchers in the way that has a browser ask for it."""
    if right == "watch":
        return 'Basic realm="evenkeel", charset="UTF-8"'
    return 'Bearer realm="evenkeel"' + (f', error="{error}"' if error else "")


def _key_in(authorization: str, basic: bool) -> str:
    """Gives the key in a header; empty where there is none.

    A browser sends what it was given once with every request to a server, also with those that another site has it
    make. So `Basic` is good for watching only, which changes nothing.
    """
    scheme, _, rest = authorization[:_MAX_HEADER].partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if basic and scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
