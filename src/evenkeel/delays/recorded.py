"""Reads recorded service times: CSV, Parquet, NumPy, text, or a histogram of Prometheus's, in a file or at a server."""

import csv
import math
import re
import ssl
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from evenkeel.delays.laws import Delay, draw_bits
from evenkeel.errors import ConfigurationError
from evenkeel.text_values import without_password

__all__ = ["ENOUGH", "RecordedTimes", "read_latencies"]

ENOUGH = 500  # samples: with fewer, a p99 rests on less than five of them
_UNITS = {"s": 1.0, "seconds": 1.0, "ms": 1e-3, "milliseconds": 1e-3, "us": 1e-6, "microseconds": 1e-6}
_LONGEST_S = 3600.0
_MAX_BYTES = 1 << 30
_FETCH_S = 10.0
_DRAWN = 20_000  # samples that stand for a histogram
_BUCKET = re.compile(r"^([a-zA-Z_:][\w:]*)_bucket\{(.*)\}\s+(\S+)", re.MULTILINE)
_EDGE = re.compile(r'le="([^"]+)"')


@dataclass(frozen=True)
class RecordedTimes(Delay):
    """Draws times from a record, each as likely as any other, independently for each key."""

    seconds: "array[float]"
    seed: int = 0
    _mean_s: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_mean_s", math.fsum(self.seconds) / len(self.seconds))

    def draw(self, key: int, worker: int, now_s: float) -> float:
        """Gives a time of the record, chosen by the key."""
        return self.seconds[draw_bits(self.seed, key) % len(self.seconds)]

    @property
    def mean_s(self) -> float:
        """Gives the mean of the record."""
        return self._mean_s


def read_latencies(
    source: str,
    column: str = "",
    unit: str = "",
    *,
    headers: Mapping[str, str] | None = None,
    context: ssl.SSLContext | None = None,
) -> RecordedTimes:
    """Reads service times, in the order in which they stand.

    Args:
        source: a file (`.csv`, `.parquet`, `.npy`, `.npz`, or text: a number a line, or Prometheus's exposition), or
            `http://...` of a server's metrics.
        column: of a table, or name of the histogram; "": the only one there is.
        unit: s, ms or us; "": as the column's or the metric's name ends in, such as `latency_ms`.
        headers: that a server is sent.
        context: of TLS; None: the system's authorities.

    Raises:
        ConfigurationError: it cannot be read, says no unit, has gaps, negative or absurd values, or too few of them.
    """
    if unit and unit not in _UNITS:
        raise ConfigurationError(f"unit: expected s, ms or us, found {unit!r}")
    if source.startswith(("http://", "https://")):
        values, name = _histogram(_fetched(source, headers or {}, context), without_password(source), column)
    else:
        values, name = _values(source, column)
    factor = _UNITS.get(unit) or _unit_in(name)
    if factor is None:
        raise ConfigurationError(
            f"latencies {source}: nothing says in which unit they are; name the column as in latency_ms, or give --unit"
        )
    _check(source, values, factor)
    return RecordedTimes(array("d", (values * factor).tolist()))


def _check(source: str, values: NDArray[np.float64], factor: float) -> None:
    where = f"latencies {source}"
    if len(values) < ENOUGH:
        raise ConfigurationError(f"{where}: {len(values)} values are too few to plan from; {ENOUGH} are needed")
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if len(bad):
        raise ConfigurationError(
            f"{where}: value {bad[0] + 1} is {values[bad[0]]:g}; {len(bad)} values are gaps or negative. "
            "Leave out the requests that were not answered"
        )
    longest_s = float(values.max()) * factor
    if longest_s > _LONGEST_S:
        raise ConfigurationError(f"{where}: one took {longest_s:,.0f} s; is the unit right?")
    if longest_s <= 0:
        raise ConfigurationError(f"{where}: all values are 0")


def _values(source: str, column: str) -> tuple[NDArray[np.float64], str]:
    """Gives the numbers, and the name of what they are."""
    path = Path(source)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigurationError(f"latencies {source}: larger than {_MAX_BYTES >> 20} MiB")
        if path.suffix == ".parquet":
            return _parquet(path, column)
        if path.suffix in (".npy", ".npz"):
            return _numpy(path, column)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ConfigurationError(f"latencies {source}: cannot be read: {error}") from error
    if path.suffix == ".csv":
        return _table(text, source, column)
    if _BUCKET.search(text):
        return _histogram(text, source, column)
    return _numbers(text.split(), source), path.stem


def _unit_in(name: str) -> float | None:
    ending = re.split(r"[\W_]+", name.casefold().removesuffix("_bucket"))[-1]
    return _UNITS.get(ending)


def _numbers(words: list[str], source: str) -> NDArray[np.float64]:
    try:
        return np.array([float(word) if word else math.nan for word in words], np.float64)
    except ValueError as error:
        raise ConfigurationError(f"latencies {source}: {error}") from error


def _one(names: list[str], column: str, source: str) -> str:
    if column in names:
        return column
    if column:
        raise ConfigurationError(f"latencies {source}: has no {column!r}; there are {', '.join(names[:20])}")
    likely = [name for name in names if _unit_in(name) is not None] if len(names) > 1 else names
    if len(likely) != 1:
        raise ConfigurationError(f"latencies {source}: say which with --column: {', '.join(names[:20]) or 'none'}")
    return likely[0]


def _table(text: str, source: str, column: str) -> tuple[NDArray[np.float64], str]:
    rows = list(csv.reader(text.splitlines()))
    if not rows:
        raise ConfigurationError(f"latencies {source}: is empty")
    name = _one(rows[0], column, source)
    place = rows[0].index(name)
    return _numbers([row[place].strip() if len(row) > place else "" for row in rows[1:] if row], source), name


def _parquet(path: Path, column: str) -> tuple[NDArray[np.float64], str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigurationError(f"latencies {path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    names = [
        field.name for field in parquet.read_schema(path) if str(field.type) in ("double", "float", "int64", "int32")
    ]
    name = _one(names, column, str(path))
    return parquet.read_table(path, columns=[name])[name].to_numpy().astype(np.float64), name


def _numpy(path: Path, column: str) -> tuple[NDArray[np.float64], str]:
    loaded = np.load(path, allow_pickle=False)
    name = path.stem
    if isinstance(loaded, np.lib.npyio.NpzFile):
        with loaded:
            name = _one(list(loaded.files), column, str(path))
            loaded = loaded[name]
    return np.asarray(loaded, np.float64).ravel(), name


def _fetched(url: str, headers: Mapping[str, str], context: ssl.SSLContext | None) -> str:
    try:
        with urlopen(Request(url, headers=dict(headers)), timeout=_FETCH_S, context=context) as response:
            return str(response.read(64 << 20).decode("utf-8"))
    except (URLError, OSError, ValueError) as error:
        raise ConfigurationError(f"latencies {without_password(url)}: cannot be read: {error}") from error


def _histogram(text: str, source: str, column: str) -> tuple[NDArray[np.float64], str]:
    """Draws times that have the histogram's quantiles: evenly on a logarithmic scale inside each bucket."""
    found: dict[str, dict[float, float]] = {}
    for name, labels, value in _BUCKET.findall(text):
        edge = _EDGE.search(labels)
        if edge:
            counts = found.setdefault(name, {})
            counts[float(edge[1])] = counts.get(float(edge[1]), 0.0) + float(value)  # over all other labels
    if not found:
        raise ConfigurationError(f"latencies {source}: holds no histogram of Prometheus's")
    name = _one(list(found), column, source)
    edges = sorted(found[name])
    below = [found[name][edge] for edge in edges]
    if len(edges) < 2 or not math.isinf(edges[-1]) or below != sorted(below):
        raise ConfigurationError(f"latencies {source}: the buckets of {name} are no cumulative counts up to +Inf")
    total = below[-1]
    if total < ENOUGH:
        raise ConfigurationError(
            f"latencies {source}: {total:.0f} values are too few to plan from; {ENOUGH} are needed"
        )
    places = (np.arange(_DRAWN) + 0.5) / _DRAWN * total
    highs = np.array([*edges[:-1], edges[-2]])  # what is beyond the last edge is taken to be at it
    lows = np.array([edges[0] / 2, *edges[:-1]])
    bucket = np.searchsorted(below, places, side="left")
    start = np.concatenate([[0.0], below[:-1]])[bucket]
    inside = (places - start) / np.maximum(np.array(below)[bucket] - start, 1e-12)
    low, high = np.maximum(lows[bucket], 1e-9), np.maximum(highs[bucket], 1e-9)
    return low * (high / low) ** inside, name
