"""Prebuilds the first lines of responses: a status line and a Date for each status, made anew once a second."""

import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus

__all__ = ["ResponseHeads"]


class ResponseHeads:
    """Keeps status lines with the date behind them.

    Args:
        wall_clock: seconds since the epoch.
    """

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._second = -1
        self._starts: dict[int, bytes] = {}

    def start(self, status: int) -> bytes:
        """Gives the beginning of a response with `status`; header lines may follow."""
        second = int(self._wall_clock())
        if second != self._second:
            self._second = second
            self._starts.clear()
        start = self._starts.get(status)
        if start is None:
            date = formatdate(second, usegmt=True)
            start = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ndate: {date}\r\n".encode()
            self._starts[status] = start
        return start
