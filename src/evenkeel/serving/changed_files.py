"""Notices that files have changed, by looking at them now and then."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

__all__ = ["Signature", "signature", "when_changed"]

Signature = tuple[tuple[str, int, int, int], ...]


def signature(paths: Sequence[Path]) -> Signature:
    """Gives what changes when one of the files is written, replaced or removed."""
    found = []
    for path in paths:
        try:
            state = path.stat()
            found.append((str(path), state.st_mtime_ns, state.st_size, state.st_ino))
        except OSError:
            found.append((str(path), 0, -1, 0))
    return tuple(found)


async def when_changed(paths: Callable[[], Sequence[Path]], every_s: float, use: Callable[[], Awaitable[bool]]) -> None:
    """Awaits `use()` whenever a file has changed and then stayed the same for one look; until cancelled.

    Args:
        paths: gives the files to look at.
        every_s: between two looks.
        use: must not raise; False: it could not be done now, and is tried again after the next look.
    """
    used = last = signature(paths())
    while True:
        await asyncio.sleep(every_s)
        now = signature(paths())
        # Where it stayed the same, nobody is at work on them any more.
        if now != used and now == last and await use():
            used = now
        last = now
