"""Holds what a client sends with each request to be let in, and keeps it out of every message."""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from evenkeel.errors import ConfigurationError
from evenkeel.settings import FieldError, FilePath, Form, setting
from evenkeel.trust.reloaded import Reloaded, warn_if_shared

__all__ = ["Credentials", "CredentialsConfig", "SecretHeaders"]

_MAX_FILE_BYTES = 64 << 10
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e\t]*[\x21-\x7e])?")
_BEARER = re.compile(r"[\x21-\x7e]+")
# The client writes these itself; a second one would leave the end of a request, or its meaning, in doubt.
_OUR_OWN = frozenset({
    "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host",
    "inference-header-content-length", "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip


class SecretHeaders(Mapping[str, str]):
    """Holds headers, and shows their names alone."""

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        self._given = dict(given or {})

    def __getitem__(self, name: str) -> str:
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def __hash__(self) -> int:
        return hash(tuple(self._given.items()))

    def __repr__(self) -> str:
        return f"SecretHeaders({', '.join(self._given)})"


def _read_headers(raw: Any, plain: Any, folder: Path) -> SecretHeaders:
    if not isinstance(raw, Mapping):
        raise ConfigurationError("expected names of headers with a text each")
    for name, value in raw.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise FieldError((str(name)[:60],), "expected a text")
    return SecretHeaders(raw)


_HEADERS = Form(_read_headers, schema={"type": "object", "additionalProperties": {"type": "string"}})


@dataclass(frozen=True)
class CredentialsConfig:
    """Says what remote servers are sent with each request to be let in."""

    headers: Annotated[SecretHeaders | None, _HEADERS] = setting(None, "Further headers, by their names.")
    bearer_file: FilePath | None = setting(None, "File with the key that is sent as `Authorization: Bearer`.")
    bearer_variable: str = setting("", "Environment variable with that key.")

    def load(self) -> "Credentials":
        """Gives what is sent.

        Raises:
            ConfigurationError: as `Credentials`.
        """
        return Credentials(self.headers, bearer_file=self.bearer_file, bearer_variable=self.bearer_variable)


class Credentials:
    """Writes header lines, with a bearer key from a text, a file or an environment variable.

    Args:
        headers: further headers.
        bearer: the key itself.
        bearer_file: holds the key; it is read again when it changes.
        bearer_variable: holds the key.
        clock: gives seconds.

    Raises:
        ConfigurationError: a header or a key cannot be sent, or a key is not there. No message shows a value.
    """

    def __init__(
        self,
        headers: Mapping[str, str] | None = None,
        bearer: str = "",
        bearer_file: Path | None = None,
        bearer_variable: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._headers = dict(headers or {})
        self._bearer, self._file, self._variable = bearer, bearer_file, bearer_variable
        sources = [bool(one) for one in (bearer, bearer_file, bearer_variable)]
        if sum(sources) > 1:
            raise ConfigurationError("bearer: give the key itself, a file or a variable, but one of them only")
        if any(sources) and any(name.lower() == "authorization" for name in self._headers):
            raise ConfigurationError("headers: Authorization and a bearer key exclude each other")
        files = [] if bearer_file is None else [bearer_file]
        self._lines = Reloaded(f"bearer file {bearer_file}", files, self._load, clock)

    def __bool__(self) -> bool:
        """True if there is anything to send."""
        return bool(self._lines.get())

    def __repr__(self) -> str:
        return "Credentials(...)"

    def lines(self) -> bytes:
        """Gives the header lines, each with its line end."""
        return self._lines.get()

    def _load(self) -> bytes:
        lines = "".join(f"{name}: {value}\r\n" for name, value in _checked(self._headers))
        key = self._key()
        return (lines + (f"authorization: Bearer {key}\r\n" if key else "")).encode("ascii")

    def _key(self) -> str:
        if self._file is not None:
            where = f"bearer file {self._file}"
            try:
                with self._file.open("rb") as opened:
                    key = opened.read(_MAX_FILE_BYTES).decode("latin-1").strip()
            except OSError as error:
                raise ConfigurationError(f"{where} cannot be read: {error.strerror or error}") from error
            warn_if_shared(self._file)
        elif self._variable:
            where = f"variable {self._variable}"
            key = os.environ.get(self._variable, "").strip()
        else:
            where, key = "bearer", self._bearer
            if not key:
                return ""
        if not _BEARER.fullmatch(key):
            raise ConfigurationError(f"{where}: expected one key without white space, of ASCII characters")
        return key


def _checked(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    for name, value in headers.items():
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"headers: {name[:60]!r} is no name of a header")
        if name.lower() in _OUR_OWN:
            raise ConfigurationError(f"headers: {name} is written by the client itself")
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise ConfigurationError(f"headers.{name}: expected a text of one line, of ASCII characters")
    return list(headers.items())
