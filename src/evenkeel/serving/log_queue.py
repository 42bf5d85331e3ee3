"""Keeps the log from holding up the gateway: records go through a bounded queue to a thread, few of them alike."""

import atexit
import logging
import os
import queue
import sys
from contextlib import suppress
from logging.handlers import QueueHandler
from threading import Thread

__all__ = ["FewAlike", "log_to_stderr"]

_MAX_RECORDS = 10_000
_MAX_ALIKE = 20  # from one line of the program ...
_ALIKE_S = 10.0  # ... in this time
_FLUSH_S = 1.0  # for the last records when the program ends


class FewAlike(QueueHandler):
    """Puts records into a queue, formatted; counts those for which there is no room, or that are one too many alike."""

    def __init__(self, records: "queue.Queue[logging.LogRecord | None]") -> None:
        super().__init__(records)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.dropped = 0
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}  # place -> since when, and how many since

    def enqueue(self, record: logging.LogRecord) -> None:
        """Takes a record that `prepare` has formatted."""
        place = record.pathname, record.lineno
        since_s, count = self._seen.get(place, (record.created, 0))
        if record.created - since_s >= _ALIKE_S:
            if count > _MAX_ALIKE:
                record.msg += f" (and {count - _MAX_ALIKE:,} more like this)"
            since_s, count = record.created, 0
        self._seen[place] = since_s, count + 1
        if count >= _MAX_ALIKE:
            return
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


def log_to_stderr(level: int = logging.WARNING) -> None:
    """Has the root logger write to stderr from a thread; records beyond 10,000 that wait are counted and dropped."""
    records: queue.Queue[logging.LogRecord | None] = queue.Queue(_MAX_RECORDS)
    handler = FewAlike(records)

    def write() -> None:
        while (record := records.get()) is not None:
            text = record.getMessage()
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
