"""Turns requests into the rows of `evenkeel bench serving`, and rows into the page that people read."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from evenkeel.figures.estimates import Estimate, mean, quantile, rate, sd, share
from evenkeel.figures.records import RequestRecord
from evenkeel.figures.tables import Column, Page, Row

__all__ = ["FILLS", "count_sources", "measured", "name", "page_of", "settings", "summarise"]

FILLS = frozenset({"collage", "decoded", "edge"})  # sources of answers that a spare gave

_POLICY = Column("policy", "policy")
_DELAY = Column("delay", "delay")
_LOAD = Column("load", "load")
_RATE = Column("rate_per_s", "rate", "/s")
_COLUMNS = (
    Column("mean_ms", "mean", "ms"),
    Column("sd_ms", "sd", "ms"),
    Column("p50_ms", "p50", "ms"),
    Column("p95_ms", "p95", "ms"),
    Column("p99_ms", "p99", "ms"),
    Column("p999_ms", "p99.9", "ms"),
    Column("extra_load", "extra load", "%", 100.0, apart=True),
    Column("filled", "filled", "%", 100.0),
    Column("fill_accuracy", "fills right", "%", 100.0),
    Column("accuracy", "all right", "%", 100.0),
)
_MAX_APPROXIMATE = Column("max_approximate", "approximate, at most", "%", 100.0)
_FRONTIER = (
    Column("approximate", "approximate", "%", 100.0),
    Column("ideal_p99_ms", "p99, clairvoyant", "ms"),  # which spends no more, knows every draw and never waits
)
_FAILED = Column("failed", "failed", "%", 100.0)


def count_sources(requests: Iterable[RequestRecord]) -> dict[str, int]:
    """Counts the requests that were answered from each source; those without an answer count as `failed`."""
    return dict(Counter(request.source if request.answered else "failed" for request in requests))


def summarise(
    requests: Sequence[RequestRecord],
    *,
    policy: str,
    delay: str,
    load: float | None,
    rate_per_s: float | None,
    extra_tasks: float,
    primary_tasks: float,
    exact_fills: int = 0,
) -> dict[str, Any]:
    """Gives the row of figures for one run of a policy, with the keys that every `bench serving` has.

    Latencies are of the requests that were answered; `failed` is the share of the others, to be read beside them.
    Accuracies are of the answers whose truth is known. A figure or bound that the sample is too small for is None.

    Args:
        requests: all requests of the run.
        policy: its name.
        delay: the law of task times, as text.
        load: share of the replicas' time that the requests ask for, where it is known.
        rate_per_s: how many requests a second were meant to be sent.
        extra_tasks: tasks beyond the primary ones (hedges, replicas, passes of backups), from the gateway's counters.
        primary_tasks: tasks sent for the items themselves.
        exact_fills: answers that a backup gave by a pass of the user's own model; they count as filled, and as exact.
    """
    answered = [request for request in requests if request.answered]
    latencies_ms = [request.latency_ms for request in answered]
    filled = [request for request in answered if request.source in FILLS]
    figures: dict[str, Estimate] = {
        "mean_ms": mean(latencies_ms),
        "sd_ms": sd(latencies_ms),
        "p50_ms": quantile(latencies_ms, 0.5),
        "p95_ms": quantile(latencies_ms, 0.95),
        "p99_ms": quantile(latencies_ms, 0.99),
        "p999_ms": quantile(latencies_ms, 0.999),
        "extra_load": rate(extra_tasks, primary_tasks),
        "filled": share(min(len(filled) + exact_fills, len(answered)), len(answered)),
        "fill_accuracy": _accuracy(filled),
        "accuracy": _accuracy(answered),
        "failed": share(len(requests) - len(answered), len(requests)),
    }
    row: dict[str, Any] = {
        "policy": policy,
        "delay": delay,
        "load": load,
        "rate_per_s": rate_per_s,
        "requests": len(requests),
    }
    for name, estimate in figures.items():
        row[name] = _known(estimate.value)
        row[f"{name}_low"] = _known(estimate.low)
        row[f"{name}_high"] = _known(estimate.high)
    return row


def page_of(rows: Sequence[Row]) -> Page:
    """Gives the table: a line for each policy and load, named by whatever differs between the rows."""
    labels = [_POLICY, *(column for column in (_DELAY, _LOAD) if _differs(rows, column))]
    if _LOAD not in labels and _differs(rows, _RATE):  # a load says the rate
        labels.append(_RATE)
    if any(row.get("max_approximate") is not None for row in rows):
        labels.append(_MAX_APPROXIMATE)
        return Page(rows, labels, [*_FRONTIER, *measured(rows)])
    return Page(rows, labels, measured(rows))


def measured(rows: Sequence[Row]) -> list[Column]:
    """Gives the columns that the rows need: `failed` only when something failed."""
    return [*_COLUMNS, *([_FAILED] if any(row.get("failed") for row in rows) else [])]


def name(row: Row, rows: Sequence[Row]) -> str:
    """Gives what a row is called among `rows`: its policy, and whatever else of its settings differs between them."""
    parts = [str(row["policy"])]
    parts += [text for key, text in settings(row).items() if len({str(other.get(key)) for other in rows}) > 1]
    return ", ".join(parts)


def settings(row: Row) -> dict[str, str]:
    """Gives the delay, load and rate of a row as text, where they are known."""
    texts = {}
    if row.get("delay"):
        texts["delay"] = str(row["delay"])
    if row.get("load") is not None:
        texts["load"] = f"load {row['load']:g}"
    if row.get("rate_per_s") is not None:
        texts["rate_per_s"] = f"{row['rate_per_s']:.4g}/s"
    return texts


def _differs(rows: Sequence[Row], column: Column) -> bool:
    return len({row.get(column.key) for row in rows}) > 1


def _accuracy(requests: Sequence[RequestRecord]) -> Estimate:
    known = [request for request in requests if request.truth is not None]
    return share(sum(request.label == request.truth for request in known), len(known))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
