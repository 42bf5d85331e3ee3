"""The processes that a benchmark started: what processor time they took, and that none of them outlives it."""

import ctypes
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["adopt_orphans", "cpu_s", "descendants", "end_all"]

_PR_SET_CHILD_SUBREAPER = 36
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def adopt_orphans() -> None:
    """Have processes whose parent ended become children of this one, so that no descendant is ever lost sight of."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Ids of all living processes below `pid`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        fields = _stat(int(entry.name)) if entry.name.isdigit() else None
        if fields is not None and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found[1:]


def cpu_s(pids: Iterable[int]) -> float:
    """Seconds of processor time, user and system, that these processes have taken so far."""
    # Fields 14 and 15 of /proc/PID/stat; `_stat` begins at field 3.
    stats = [fields for fields in map(_stat, pids) if fields is not None]
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / _TICKS_PER_S


def end_all(patience_s: float = 15.0) -> None:
    """End every descendant of this process: politely, then by force; returns when all are gone."""
    for number, limit_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, patience_s)):
        for pid in descendants(os.getpid()):
            _signal(pid, number)
        until_s = time.monotonic() + limit_s
        while time.monotonic() < until_s:
            _reap()
            if not descendants(os.getpid()):
                return
            time.sleep(0.05)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()
