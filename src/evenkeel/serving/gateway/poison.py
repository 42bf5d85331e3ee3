"""Remembers for a while the items that broke workers, so that a client that sends one again breaks no more."""

import hashlib

from evenkeel.arrays import Array

__all__ = ["PoisonMemory"]

_KEPT_S = 60.0
_MAX_KEPT = 256


class PoisonMemory:
    """Holds digests of items, each for a minute; the oldest goes when there are too many."""

    def __init__(self) -> None:
        self._until_s: dict[bytes, float] = {}

    def add(self, item: Array, now_s: float) -> None:
        """Remembers an item from now on."""
        digest = _digest(item)
        self._until_s.pop(digest, None)
        self._until_s[digest] = now_s + _KEPT_S
        if len(self._until_s) > _MAX_KEPT:
            del self._until_s[next(iter(self._until_s))]

    def holds_any(self, now_s: float) -> bool:
        """True while an item is remembered."""
        while self._until_s and next(iter(self._until_s.values())) <= now_s:
            del self._until_s[next(iter(self._until_s))]
        return bool(self._until_s)

    def holds(self, item: Array, now_s: float) -> bool:
        """True for an item that is remembered. Costs nothing while none is."""
        return self.holds_any(now_s) and _digest(item) in self._until_s


def _digest(item: Array) -> bytes:
    shape = f"{item.dtype.str}{item.shape}".encode()
    return hashlib.blake2b(item.tobytes(), digest_size=16, key=shape[:64]).digest()
