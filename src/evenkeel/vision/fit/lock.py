"""Lets one process at a time work in a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evenkeel.errors import ConfigurationError

__all__ = ["locked"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes that ask for it out of `folder`; the system lets go of it whenever this one ends.

    Raises:
        ConfigurationError: another process has it, or it cannot be opened.
    """
    try:
        place = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be opened: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(
                f"{folder} is in use by another fit ({error.strerror or error}); wait for it, or give another --out"
            ) from error
        yield
    finally:
        os.close(place)
