"""Reads a worker's address: `unix:/path`, `tcp://host:port`, or `fd:N`, one connection that is already open."""

import re
from dataclasses import dataclass
from typing import Literal

from evenkeel.errors import ConfigurationError
from evenkeel.text_values import without_password

__all__ = ["Address", "parse_address"]

_MAX_UNIX_PATH_BYTES = 107  # sockaddr_un.sun_path, less its final zero


@dataclass(frozen=True, slots=True)
class Address:
    """Holds a parsed address; `path` belongs to unix, `host` and `port` to tcp, `number` to fd."""

    kind: Literal["unix", "tcp", "fd"]
    path: str = ""
    host: str = ""
    port: int = 0
    number: int = -1

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        if self.kind == "fd":
            return f"fd:{self.number}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


def parse_address(text: str) -> Address:
    """Parses the address that `text` names; a tcp address without a host means the loopback one.

    Raises:
        ConfigurationError: it names none.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path or len(path.encode()) > _MAX_UNIX_PATH_BYTES:
            raise ConfigurationError(f"address {text!r}: a Unix socket's path has 1 to {_MAX_UNIX_PATH_BYTES} bytes")
        return Address("unix", path=path)
    if match := re.fullmatch(r"fd:(\d{1,9})", text):
        return Address("fd", number=int(match[1]))
    if (match := re.fullmatch(r"tcp://(\[[^\]]+\]|[^:/]*):(\d{1,5})/?", text)) and int(match[2]) < 65536:
        return Address("tcp", host=match[1].strip("[]") or "127.0.0.1", port=int(match[2]))
    raise ConfigurationError(f"address {without_password(text)!r}: expected unix:/path or tcp://host:port")
