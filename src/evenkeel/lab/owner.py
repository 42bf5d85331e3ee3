"""Names network namespaces after the process that made them, and finds that process by the name.

A process is its number and the moment it began, since numbers are used again. No file has to be kept, so nothing can
be lost with a crash.
"""

import os
import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from evenkeel.errors import LabError

__all__ = ["NamespaceOwner", "new_label", "owner_of"]

_PREFIX = "evenkeel-lab-"
_NAME = re.compile(re.escape(_PREFIX) + r"(\d+)-(\d+)-\d+-(?:switch|host\d+)")
_serials = count()


@dataclass(frozen=True)
class NamespaceOwner:
    """Identifies the process that made a lab."""

    pid: int
    started: int  # clock ticks since boot

    def lives(self) -> bool:
        """True while that very process still runs."""
        return _started(self.pid) == self.started


def new_label() -> str:
    """Makes the text with which the names of this process's next lab begin."""
    pid = os.getpid()
    return f"{_PREFIX}{pid}-{_started(pid)}-{next(_serials)}"


def owner_of(namespace: str) -> NamespaceOwner | None:
    """Finds out who made a network namespace; None if it is not a lab's."""
    found = _NAME.fullmatch(namespace)
    return NamespaceOwner(int(found[1]), int(found[2])) if found else None


def _started(pid: int) -> int | None:
    """Reads when a process began; None if there is none, or only what is left of one that ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise LabError(f"process {pid} cannot be looked at: {error.strerror}") from error
    fields = text.rpartition(")")[2].split()  # its own name may hold blanks and brackets
    return None if fields[0] in "ZX" else int(fields[19])
