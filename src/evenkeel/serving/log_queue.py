"""Keeps a log that nobody reads from holding up the gateway: records go through a bounded queue to a thread."""

import atexit
import logging
import os
import queue
import sys
from contextlib import suppress
from logging.handlers import QueueHandler
from threading import Thread

__all__ = ["log_to_stderr"]

_MOST_RECORDS = 10_000
_FLUSH_S = 1.0  # for the last records when the program ends


class _Dropping(QueueHandler):
    """Puts records into the queue, and counts those for which there is no room."""

    def __init__(self, records: "queue.Queue[logging.LogRecord | None]") -> None:
        super().__init__(records)
        self.dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


def log_to_stderr(level: int = logging.WARNING) -> None:
    """Have the root logger write to stderr from a thread; records beyond 10,000 that wait are counted and dropped."""
    records: queue.Queue[logging.LogRecord | None] = queue.Queue(_MOST_RECORDS)
    handler = _Dropping(records)
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def write() -> None:
        while (record := records.get()) is not None:
            text = form.format(record)
            dropped, handler.dropped = handler.dropped, 0
            if dropped:
                text += f"\n{dropped} messages were left out"
            # Not through a stream: its lock, held while nobody reads, would hold up the end of the program.
            with suppress(OSError):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode("utf-8", "replace"))

    writer = Thread(target=write, name="evenkeel-log", daemon=True)  # one that nobody reads must not keep the program

    def flush() -> None:
        try:
            records.put(None, timeout=_FLUSH_S)
        except queue.Full:
            return
        writer.join(_FLUSH_S)

    writer.start()
    atexit.register(flush)
    logging.basicConfig(level=level, handlers=[handler])
