"""Writes the log to stderr from a thread, one line a record, so that it neither holds up the program nor can be forged.

Records go through a bounded queue, few of them alike. Rotation and retention are the platform's. A record may carry
context: `_log.warning("... is late", extra={"backend": name})` has the field `backend`.
"""

import atexit
import copy
import json
import logging
import os
import queue
import sys
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from threading import Thread
from typing import Any, Literal

__all__ = ["FORMATS", "FewAlike", "LineFormatter", "LogFormat", "log_to_stderr"]

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = ("text", "json")

_MAX_RECORDS = 10_000
_MAX_ALIKE = 20  # from one line of the program ...
_ALIKE_S = 10.0  # ... in this time
_FLUSH_S = 1.0  # for the last records when the program ends
# What every record has; the rest is context.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LineFormatter(logging.Formatter):
    r"""Gives a record as one line: time in UTC, level, logger, message, and the traceback if there is one.

    As JSON it has the record's context too, as fields of their own.

    Whatever a client put into a message cannot begin another line or steer a terminal: as text, characters that cannot
    be printed stand as `\n` or `\x1b`; as JSON, all that is not ASCII is escaped.

    Args:
        form: how it is written.
    """

    def __init__(self, form: LogFormat = "text") -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        """Writes the line."""
        moment = datetime.fromtimestamp(record.created, UTC)
        fields: dict[str, Any] = {
            "time": f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        context = {name: value for name, value in vars(record).items() if name not in _STANDARD | fields.keys()}
        trace = record.exc_text or (self.formatException(record.exc_info) if record.exc_info else "")
        if self._form == "json":
            return json.dumps({**fields, **context, **({"traceback": trace} if trace else {})}, default=str)
        line = "{time} {level} {logger}: {message}".format(**fields)  # which says all that people need
        return _on_one_line(f"{line}\n{trace}" if trace else line)


def _on_one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


class FewAlike(QueueHandler):
    """Puts records into a queue; counts those for which there is no room, or that are one too many alike."""

    def __init__(self, records: "queue.Queue[logging.LogRecord | None]") -> None:
        super().__init__(records)
        self.dropped = 0
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}  # place -> since when, and how many since

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Gives a copy whose text depends on nothing that may change before it is written."""
        record = copy.copy(record)
        record.msg = record.getMessage()
        record.args = None
        if record.exc_info:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Takes a record that was prepared."""
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


def log_to_stderr(form: LogFormat = "text", level: int = logging.WARNING) -> None:
    """Has the root logger write to stderr from a thread; records beyond 10,000 that wait are counted and dropped."""
    records: queue.Queue[logging.LogRecord | None] = queue.Queue(_MAX_RECORDS)
    handler = FewAlike(records)
    formatter = LineFormatter(form)

    def write() -> None:
        while (record := records.get()) is not None:
            lines = [formatter.format(record)]
            dropped, handler.dropped = handler.dropped, 0
            if dropped:
                fields = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
                text = f"{dropped} messages were left out"
                lines.append(formatter.format(logging.makeLogRecord({**fields, "msg": text, "dropped": dropped})))
            text = "".join(f"{line}\n" for line in lines)
            # Not through a stream: its lock, held while nobody reads, would hold up the end of the program.
            with suppress(OSError):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode("utf-8", "replace"))

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
