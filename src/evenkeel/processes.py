"""Ends processes in time: with the one that started them, and by a signal also while they are still starting."""

import ctypes
import os
import signal

__all__ = ["ENDING_SIGNALS", "asked_to_end", "end_by_signal", "end_with_parent", "heeded"]

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1
_asked: list[int] = []  # signals that came


def end_with_parent(parent_pid: int) -> None:
    """Makes the kernel kill this process when its parent ends, however it ends and even if this one is frozen then."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the line above
        raise SystemExit(1)


def heeded(number: signal.Signals) -> bool:
    """True unless whoever started this process has it ignore the signal, as `nohup` does with SIGHUP."""
    return signal.getsignal(number) is not signal.SIG_IGN


def end_by_signal() -> None:
    """Makes SIGTERM, SIGINT and SIGHUP end this process with exit code 0 until something else heeds them.

    Call it first: the first process of a container ignores signals that it does not handle. Whoever heeds them later
    has to ask `asked_to_end` then: raised while the collector ran an object's end, the exit was lost.
    """
    _asked.clear()

    def end(number: int, frame: object) -> None:
        _asked.append(number)
        raise SystemExit(0)

    for number in ENDING_SIGNALS:
        if heeded(number):
            signal.signal(number, end)


def asked_to_end() -> bool:
    """True if one of the signals has come since `end_by_signal`, whatever became of the exit."""
    return bool(_asked)
