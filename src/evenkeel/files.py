"""Writes files whole or not at all, and says what to do where that is impossible."""

import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

__all__ = ["why_unwritten", "write_whole"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file beside `path`, and gives it that name once it is whole: what was there before stays until then.

    What is no ordinary file, like a pipe, and a file in a folder where no other can be made are written directly.

    Raises:
        OSError: it cannot be written; nothing unfinished is left.
    """
    path = Path(path)
    there = path.exists()
    if there and not (path.is_file() and os.access(path.parent, os.W_OK)):
        path.write_bytes(content)
        return
    path = path.resolve()  # where it is a link, it stays one
    unfinished = path.with_name(f".evenkeel-{secrets.token_hex(8)}.part")
    try:
        unfinished.write_bytes(content)
        if there:
            shutil.copymode(path, unfinished)
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def why_unwritten(error: OSError) -> str:
    """Says in words why a file could not be written, and what to do where the disk is full."""
    why = error.strerror or str(error)
    return f"{why}; free some space and try again" if error.errno in _FULL else why
