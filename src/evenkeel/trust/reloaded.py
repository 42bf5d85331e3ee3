"""Keeps what was read from files, and reads it again when they change, so that keys change without a restart."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from evenkeel.errors import ConfigurationError

__all__ = ["Reloaded", "warn_if_shared"]

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
Content = TypeVar("Content", covariant=True)

_Stamp = tuple[int, int, int] | None  # when it was written, its size, its number; None: it is not there


class Reloaded(Generic[Content]):
    """Holds the value of some files.

    What cannot be used leaves the value as it was: an error in a new file is logged, once for each change of it.

    Args:
        what: it is, for the log.
        files: whose change is a reason to load again; none: it never changes.
        load: gives the value.
        clock: gives seconds; files are looked at once in `LOOK_EVERY_S` at most.

    Raises:
        ConfigurationError: by `load`, at first.
    """

    def __init__(
        self,
        what: str,
        files: Sequence[Path],
        load: Callable[[], Content],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._files, self._load, self._clock = what, tuple(files), load, clock
        self._look_at_s = clock() + LOOK_EVERY_S
        self._stamps = self._read_stamps()  # before it loads: what changes in between is seen the next time
        self._value = load()

    def get(self) -> Content:
        """Gives the value, of the files as they were a second ago or later."""
        if self._files:
            now_s = self._clock()
            if now_s >= self._look_at_s:
                self._look_at_s = now_s + LOOK_EVERY_S
                self.reload()
        return self._value

    def reload(self) -> bool:
        """Looks at the files now; tells whether there is a new value."""
        stamps = self._read_stamps()
        if stamps == self._stamps:
            return False
        self._stamps = stamps
        try:
            self._value = self._load()
        except (ConfigurationError, OSError) as error:  # a file may go away while it is read
            _log.error("%s changed and cannot be used, so what was there before stays in use: %s", self._what, error)
            return False
        _log.info("%s changed and was read again", self._what)
        return True

    def _read_stamps(self) -> list[_Stamp]:
        stamps: list[_Stamp] = []
        for file in self._files:
            try:
                found = os.stat(file)
            except OSError:
                stamps.append(None)
            else:
                stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return stamps


def warn_if_shared(file: Path) -> None:
    """Logs a warning if other users of this machine may read `file`, which holds a secret."""
    try:
        shared = os.stat(file).st_mode & 0o077
    except OSError:
        return
    if shared:
        _log.warning("%s can be read by other users of this machine; run `chmod 600` on it", file)
