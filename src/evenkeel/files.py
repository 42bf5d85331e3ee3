"""Writes files whole or not at all, and says what to do where that is impossible; reads archives of arrays."""

import errno
import os
import secrets
import shutil
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from evenkeel.arrays import Array

__all__ = ["read_arrays", "why_unwritten", "write_whole"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def read_arrays(path: Path) -> dict[str, Array]:
    """Reads the arrays of an npz file; nothing is unpickled.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, cut off, or no npz file.
    """
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is no npz file")
            with file:
                return {name: file[name] for name in file.files}
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"it is damaged or cut off: {error}") from error


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
