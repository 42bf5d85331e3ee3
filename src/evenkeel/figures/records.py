"""Keeps a measurement: one JSON line per event, and the document around rows of figures."""

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from evenkeel.errors import ConfigurationError, EvenkeelError
from evenkeel.files import why_unwritten
from evenkeel.version import __version__

__all__ = [
    "RecordWriter",
    "RequestRecord",
    "commit",
    "json_document",
    "machine",
    "read_records",
    "read_requests",
]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """Holds one request as its sender saw it. Times are seconds on the sender's clock, since the experiment began.

    Latency counts from the intended time, not from the time at which the sender came round to it: otherwise a server
    that holds up its senders would look faster than it is (coordinated omission).
    """

    number: int
    intended_s: float
    sent_s: float
    done_s: float
    status: int  # of HTTP; 0 when no answer came
    source: str = ""  # how the answer is known; empty without one
    confidence: float | None = None
    label: int | None = None  # the class that was answered
    truth: int | None = None
    error: str | None = None

    @property
    def latency_ms(self) -> float:
        """Gives the milliseconds from the intended time to the answer."""
        return (self.done_s - self.intended_s) * 1e3

    @property
    def answered(self) -> bool:
        """True if an answer came."""
        return self.status == 200 and self.error is None

    def as_event(self) -> dict[str, Any]:
        """Gives all fields and the latency, for a JSON line."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"latency_ms": self.latency_ms}


class RecordWriter:
    """Writes one JSON line per event to a file, for use in a `with` block; leaving it flushes and closes.

    Raises:
        ConfigurationError: the file cannot be opened.
        EvenkeelError: a line cannot be written, e.g. because the disk is full.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            self._file: BufferedWriter = self._path.open("wb")
        except OSError as error:
            raise ConfigurationError(
                f"records cannot be written to {path}: {error.strerror or error}; choose another file"
            ) from error

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except EvenkeelError:
            if error is None:  # else the error of the block is the one to report
                raise

    def write(self, event: Mapping[str, Any] | RequestRecord) -> None:
        """Adds one line. Lines are buffered until `flush` or `close`; NaN becomes null."""
        if isinstance(event, RequestRecord):
            event = event.as_event()
        try:
            line = orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        except TypeError as error:
            raise EvenkeelError(f"an event cannot be written as JSON: {error}") from error
        try:
            self._file.write(line)
        except OSError as error:
            raise self._unwritten(error) from error

    def flush(self) -> None:
        """Hands all lines to the operating system."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Flushes and closes; more than once does nothing."""
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> EvenkeelError:
        return EvenkeelError(
            f"records could not be written to {self._path}: {why_unwritten(error)}; "
            "what was written so far may end in the middle of a line"
        )


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Reads the events of a file that `RecordWriter` wrote, one by one.

    Raises:
        ConfigurationError: the file cannot be read, or a line is not a JSON object (the message names the line).
    """
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    event = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise ConfigurationError(f"{path}, line {number} is not JSON: {error}") from error
                if not isinstance(event, dict):
                    raise ConfigurationError(f"{path}, line {number} must be a JSON object")
                yield event
    except OSError as error:
        raise ConfigurationError(f"records {path} cannot be read: {error.strerror or error}") from error


def read_requests(path: str | Path) -> list[RequestRecord]:
    """Reads the requests of a file that holds nothing else.

    Raises:
        ConfigurationError: as `read_records`, or a line lacks a field, has an unknown one, or one of a wrong type.
    """
    requests = []
    for number, event in enumerate(read_records(path), start=1):
        event.pop("latency_ms", None)
        try:
            request = RequestRecord(**event)
        except TypeError as error:
            reason = str(error).partition(") ")[2] or str(error)
            raise ConfigurationError(f"{path}, line {number} is not a request: {reason}") from error
        for name in ("number", "intended_s", "sent_s", "done_s", "status"):
            value = getattr(request, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigurationError(f"{path}, line {number}: field {name!r} must be a number, found {value!r}")
        requests.append(request)
    return requests


def json_document(arguments: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Makes what `--json` writes: the rows, and all that is needed to get them again."""
    return {
        "evenkeel": __version__,
        "commit": commit(),
        "machine": machine(),
        "arguments": dict(arguments),
        "rows": [dict(row) for row in rows],
    }


def machine() -> dict[str, Any]:
    """Describes what figures depend on: processor, cores, memory, versions. Names neither machine nor folders."""
    release = re.match(r"[\d.]*", platform.release())
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": f"{platform.system()} {release[0] if release else ''} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "onnxruntime": _version("onnxruntime"),
    }


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """Gives the git commit of `folder`'s code, with `-dirty` behind it when files differ; None outside a checkout."""
    git = ["git", "-C", str(folder)]
    try:
        # An installed package may lie in a folder that some other repository ignores: then it has no commit.
        tracked = subprocess.run([*git, "ls-files", "."], capture_output=True, timeout=5, check=True)
        if not tracked.stdout:
            return None
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            timeout=5,
            check=True,
            text=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
