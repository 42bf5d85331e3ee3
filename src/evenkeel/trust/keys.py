"""Reads the keys that clients of a server must have, and finds whose key one is.

One key a line, with an optional name before it and what it allows behind it; `#` begins a comment:

    alice   sha256:5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8
    bob     9b74c9897bac770ffc029102a200c5de        infer,watch
    deploy  sha256:...                              infer,watch,manage

A key may be written as the SHA-256 of it, so that the file does not hold what it takes to use it. No salt is needed:
keys are random, 16 characters at least. Two keys may have one name, so that one can be replaced while both are valid.
"""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from evenkeel.errors import ConfigurationError
from evenkeel.trust.reloaded import Reloaded, warn_if_shared

__all__ = ["CLIENT_KEYS_VARIABLE", "KeyHolder", "KeyRing", "Right"]

CLIENT_KEYS_VARIABLE = "EVENKEEL_CLIENT_KEYS"
Right = Literal["infer", "watch", "manage"]

_RIGHTS: tuple[Right, ...] = get_args(Right)
_USUAL_RIGHTS: frozenset[Right] = frozenset({"infer", "watch"})
_MIN_KEY = 16
_MAX_KEY = 1024
_MAX_KEYS = 10_000
_MAX_FILE_BYTES = 4 << 20
_HASHED = "sha256:"
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
# What RFC 6750 lets a bearer token be.
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")


@dataclass(frozen=True)
class KeyHolder:
    """Names whose key it is, and what it allows."""

    name: str
    rights: frozenset[Right] = _USUAL_RIGHTS


@dataclass(frozen=True)
class _Holders:
    """Has the holders of all keys by the hashes of their SHA-256, and of those seen so far by the hashes themselves."""

    all: dict[bytes, KeyHolder]
    used: dict[bytes, KeyHolder]


class KeyRing:
    """Knows the keys of a file, or of an environment variable, and reads the file again when it changes.

    Args:
        file: with the keys; None: they are in the variable.
        variable: its name; what it holds is written as a file is, where a `;` may end a line.
        clock: gives seconds.

    Raises:
        ConfigurationError: there is no key, or a line cannot be understood. No message shows a key.
    """

    def __init__(
        self,
        file: Path | None = None,
        variable: str = CLIENT_KEYS_VARIABLE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._secret = secrets.token_bytes(32)
        self._file, self._variable = file, variable
        self.where = f"variable {variable}" if file is None else f"key file {file}"
        self._holders = Reloaded(self.where, [] if file is None else [file], self._load, clock)

    def find(self, key: str) -> KeyHolder | None:
        """Gives whose key it is; None if it is nobody's.

        The time that it takes says nothing of the keys: they are found by their hash with a secret of this process, so
        that no client can choose what is compared with what is stored.
        """
        holders = self._holders.get()
        if len(key) > _MAX_KEY:
            return None
        content = key.encode("utf-8", "replace")
        blinded = self._blinded(content)
        found = holders.used.get(blinded)
        if found is None:
            found = holders.all.get(self._blinded(hashlib.sha256(content).digest()))
            if found is not None:
                holders.used[blinded] = found  # the next time it costs one hash less
        return found

    def reload(self) -> bool:
        """Looks now whether the file has changed; tells whether there are new keys."""
        return self._holders.reload()

    def __len__(self) -> int:
        """Counts the keys."""
        return len(self._holders.get().all)

    def _blinded(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=32, key=self._secret).digest()

    def _load(self) -> "_Holders":
        text = self._read_variable() if self._file is None else self._read(self._file)
        holders: dict[bytes, KeyHolder] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if words:
                digest, holder = _read_line(words, f"{self.where}, line {number}", number)
                blinded = self._blinded(digest)
                if blinded in holders:
                    raise ConfigurationError(f"{self.where}, line {number}: this key is there twice")
                holders[blinded] = holder
        if not holders:
            raise ConfigurationError(f"{self.where} holds no key; make one with `openssl rand -hex 32`")
        if len(holders) > _MAX_KEYS:
            raise ConfigurationError(f"{self.where}: at most {_MAX_KEYS:,} keys are taken, found {len(holders):,}")
        return _Holders(holders, {})

    def _read_variable(self) -> str:
        return os.environ.get(self._variable, "").replace(";", "\n")

    def _read(self, file: Path) -> str:
        try:
            with file.open("rb") as opened:
                content = opened.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigurationError(f"{self.where} cannot be read: {error.strerror or error}") from error
        if len(content) > _MAX_FILE_BYTES:
            raise ConfigurationError(f"{self.where}: is longer than {_MAX_FILE_BYTES:,} bytes")
        warn_if_shared(file)
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ConfigurationError(f"{self.where} is no text") from None


def _read_line(words: list[str], where: str, number: int) -> tuple[bytes, KeyHolder]:
    """Reads `[name] key [rights]`; its messages never show a word, since any may be a key."""
    rights = _USUAL_RIGHTS
    if len(words) > 1 and set(words[-1].split(",")) <= set(_RIGHTS):
        rights = frozenset(right for right in _RIGHTS if right in words[-1].split(","))
        words = words[:-1]
    if len(words) > 2:
        raise ConfigurationError(
            f"{where}: expected a name, a key and what it allows (of {', '.join(_RIGHTS)}, joined by commas), "
            f"found {len(words)} words"
        )
    name, key = words if len(words) == 2 else (f"line-{number}", words[0])
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{where}: a name has 1 to 64 letters, digits and signs of _ . @ -")
    if key.startswith(_HASHED):
        digits = key.removeprefix(_HASHED)
        if not re.fullmatch(r"[0-9A-Fa-f]{64}", digits):
            raise ConfigurationError(f"{where}: behind {_HASHED} 64 hexadecimal digits are expected")
        return bytes.fromhex(digits), KeyHolder(name, rights)
    if not _MIN_KEY <= len(key) <= _MAX_KEY or not _KEY.fullmatch(key):
        raise ConfigurationError(
            f"{where}: a key has {_MIN_KEY} to {_MAX_KEY} letters, digits and signs of . _ ~ + / -; "
            "make one with `openssl rand -hex 32`"
        )
    return hashlib.sha256(key.encode()).digest(), KeyHolder(name, rights)
