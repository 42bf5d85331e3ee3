"""Writes what the gateways count as Prometheus text, at scrape time, so that requests pay nothing for it.

The text is written here and not by Prometheus's client, which takes 6 ms for fifteen histograms: long enough to be in
the p99 of what is served meanwhile.
"""

import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

from evenkeel.serving.front.access import Guard
from evenkeel.serving.front.request_times import RequestTimes
from evenkeel.serving.front.served import ServedModel
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.gateway.histogram import BOUNDS_S, Histogram
from evenkeel.version import __version__

__all__ = ["LossyCounts", "Metrics"]

_PREFIX = "evenkeel_"
_BOUNDS = (*(f"{bound:g}" for bound in BOUNDS_S), "+Inf")
_QUANTILES = (0.5, 0.9, 0.95, 0.99)
_STARTED_S = time.time()
_PAGE_BYTES = resource.getpagesize()

_LabelValues = tuple[str, ...]
LossyCounts = dict[tuple[str, str], Mapping[str, int]]  # model, and name of the end -> what it counts

_COUNTERS: tuple[tuple[str, str, Callable[[Gateway], float]], ...] = (
    ("items", "Items taken in.", lambda it: it.stats.items),
    ("shed", "Items refused: queues full, or no replica ready.", lambda it: it.stats.shed),
    ("failed", "Items that ended in an error.", lambda it: it.stats.failed),
    ("abandoned", "Items given up because their client went away.", lambda it: it.stats.abandoned),
    ("deadlines", "Items that reached their deadline.", lambda it: it.stats.deadlines),
    ("hedges", "Second attempts by policy.", lambda it: it.stats.hedges),
    ("hedges_won", "Hedges that answered.", lambda it: it.stats.hedges_won),
    ("hedge_budget_exhausted", "Hedges that were due but over budget.", lambda it: it.stats.budget_exhausted),
    ("cancels", "Attempts cancelled because another answered.", lambda it: it.stats.cancels),
    ("lost_attempts", "Replica tasks that ended in an error.", lambda it: it.stats.lost_attempts),
    ("retries", "Attempts that replaced lost or stalled ones.", lambda it: it.stats.retries),
    ("lost_backup_passes", "Backup tasks that ended in an error.", lambda it: it.stats.lost_passes),
    ("unsure_fills", "Fills not used because of low confidence.", lambda it: it.stats.unsure_fills),
    ("fills_over_budget", "Fills that waited because of max_approximate.", lambda it: it.stats.fills_over_budget),
    ("fills_compared", "Approximate fills whose exact reply came later.", lambda it: it.stats.fills_compared),
    ("fills_agreed", "Those of them with the same label.", lambda it: it.stats.fills_agreed),
    (
        "escalated",
        "Items that the light model of a cascade was not sure of, or not asked about.",
        lambda it: it.stats.escalated,
    ),
    ("audits", "Items that both models of a cascade answered, chosen at random.", lambda it: it.stats.audits),
    ("audits_agreed", "Those of them in which both say the same.", lambda it: it.stats.audits_agreed),
    (
        "promise_alarms",
        "Thresholds that audits showed to be wrong.",
        lambda it: 0 if it.promises is None else it.promises.alarms,
    ),
    (
        "degraded_within_promise",
        "Degraded answers that their promise leaves room for.",
        lambda it: 0 if it.promises is None else it.promises.degraded,
    ),
    ("bad_replies", "Replies of a wrong shape, or not finite.", lambda it: it.stats.bad_replies),
    ("readmissions", "Replicas taken back after good probes.", lambda it: it.stats.readmissions),
    ("probes", "Copies of items sent to ejected replicas.", lambda it: it.stats.probes),
    ("extra_passes", "Work beyond one pass an item, in replica passes.", lambda it: it.stats.extra_passes),
)
_COUNTERS_BY: tuple[tuple[str, str, str, Callable[[Gateway], Mapping[str, int]]], ...] = (
    ("answers", "source", "Answers by how they are known.", lambda it: it.stats.sources),
    ("fills", "code", "Answers taken from a spare.", lambda it: it.stats.fills),
    ("backup_passes", "code", "Groups sent to backups.", lambda it: it.stats.passes),
    ("backup_items", "code", "Items in those groups.", lambda it: it.stats.grouped),
    ("ejections", "reason", "Replicas taken out.", lambda it: it.stats.ejections),
)
_HISTOGRAMS: tuple[tuple[str, str, str, Callable[[Gateway], Mapping[str, Histogram]]], ...] = (
    (
        "item_duration_seconds",
        "source",
        "From an item's acceptance to its answer, by how that is known, or to its error.",
        lambda it: it.stats.latencies,
    ),
    (
        "queue_duration_seconds",
        "kind",
        "From sending a task to a worker until that began it.",
        lambda it: {"replica": it.stats.queue_times},
    ),
    (
        "service_duration_seconds",
        "kind",
        "A worker's time for a task.",
        lambda it: {"replica": it.stats.service_times, "backup": it.stats.pass_times},
    ),
    (
        "fill_saved_seconds",
        "kind",
        "From an approximate fill to the exact reply that came later.",
        lambda it: {"fill": it.stats.saved_times},
    ),
)


class Metrics:
    """Writes the body of `/metrics`.

    Args:
        models: that are served; each metric of a gateway has its model's name as a label.
        lossy: gives what the ends of links that lose packets count.
        responses: HTTP status -> answers sent with it.
        guard: counts whom the front ends let in.
    """

    def __init__(
        self,
        models: Iterable[ServedModel],
        lossy: Callable[[], LossyCounts] = dict,
        responses: Mapping[int, int] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._models = models
        self._guard = guard or Guard()
        self._lossy = lossy
        self._responses = {} if responses is None else responses

    def __call__(self) -> bytes:
        """Writes the metrics."""
        text = _Exposition()
        gateways = [(one.name, one.gateway) for one in self._models if isinstance(one.gateway, Gateway)]
        for name, about, value in _COUNTERS:
            text.counter(name, about, ("model",), (((model,), value(it)) for model, it in gateways))
        for name, label, about, values in _COUNTERS_BY:
            samples = (((model, key), n) for model, it in gateways for key, n in sorted(values(it).items()))
            text.counter(name, about, ("model", label), samples)
        for name, label, about, times in _HISTOGRAMS:
            found = (((model, key), one) for model, it in gateways for key, one in sorted(times(it).items()))
            text.histogram(name, about, ("model", label), found)
        text.histogram(
            "request_duration_seconds",
            "From a request's first byte to its answer, by status; 499: its client went away before.",
            ("model", "code"),
            (((one.name, str(code)), times) for one in self._models for code, times in _by_code(one.times)),
        )
        codes = (((str(code),), count) for code, count in sorted(self._responses.items()))
        text.counter("http_responses", "Answers to all HTTP requests, by status.", ("code",), codes)
        _write_guard(text, self._guard)
        ends = (((*end, what), n) for end, counts in self._lossy().items() for what, n in sorted(counts.items()))
        text.counter("lossy", "Packets and images on links that lose packets.", ("model", "end", "what"), ends)
        self._write_states(text, gateways)
        _write_process(text)
        return text.bytes()

    def _write_states(self, text: "_Exposition", gateways: list[tuple[str, Gateway]]) -> None:
        model = ("model",)
        text.gauge("ready", "1 when new items can be answered.", model, (((name,), it.ready) for name, it in gateways))
        text.gauge(
            "in_flight", "Items without an answer yet.", model, (((name,), it.in_flight) for name, it in gateways)
        )
        text.gauge(
            "promises_unshown",
            "Promises that cannot be shown now: too many answers were degraded or missing.",
            model,
            (((name,), it.promises.unshown) for name, it in gateways if it.promises is not None),
        )
        text.gauge(
            "budget_saved",
            "Share of the tokens that can be saved up which is there; 1 where there is no limit.",
            ("model", "budget"),
            (
                ((name, kind), 1.0 if budget.saved is None else budget.saved)
                for name, it in gateways
                for kind, budget in it.budgets.items()
            ),
        )
        nodes = [
            ((name, node.backend.name, kind, node.backend.address), node)
            for name, it in gateways
            for kind, group in (("replica", it.replicas.all), ("backup", it.backups))
            for node in group
        ]
        labels = ("model", "backend", "kind", "address")
        # One that is still untried is there; whether the fleet as a whole is well, readiness says.
        up = ((key, node.state in ("well", "untried")) for key, node in nodes)
        text.gauge("backend_up", "1 when a worker is there and was not ejected.", labels, up)
        waiting = ((key, len(node.open)) for key, node in nodes)
        text.gauge("backend_outstanding", "Tasks at a worker.", labels, waiting)
        text.counter("backend_tasks", "Tasks that a worker did.", labels, ((key, node.done) for key, node in nodes))
        quantiles = (
            ((name, f"{q:g}"), seconds)
            for name, it in gateways
            for q in _QUANTILES
            if (seconds := it.service_times.quantile(q)) is not None
        )
        about = "Live quantiles of the replicas' service time, on which triggers stand."
        text.gauge("service_seconds", about, ("model", "quantile"), quantiles)


def _by_code(times: RequestTimes) -> list[tuple[int, Histogram]]:
    return sorted(times.by_status.items())


def _write_guard(text: "_Exposition", guard: Guard) -> None:
    if guard.access is not None:
        admitted = (((name,), count) for name, count in sorted(guard.access.admitted.items()))
        text.counter("requests_by_key", "Requests by the name of their key or certificate.", ("key",), admitted)
        refused = (((reason,), count) for reason, count in sorted(guard.access.refused.items()))
        text.counter("refused_requests", "Requests that were not let in.", ("reason",), refused)
    ended = (((outcome,), count) for outcome, count in sorted(guard.handshakes.items()))
    text.counter("handshakes", "Handshakes of TLS with clients.", ("outcome",), ended)
    if guard.expires_s is not None:
        about = "When the certificate for clients expires, in seconds since 1970."
        text.gauge("certificate_expiry_timestamp_seconds", about, (), [((), guard.expires_s)])


def _write_process(text: "_Exposition") -> None:
    """Writes what dashboards know of any process, by the names that they know it by."""
    text.gauge("build_info", "The version that runs.", ("version",), [((__version__,), 1)])
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * _PAGE_BYTES
    plain: _LabelValues = ()
    cpu_s = time.process_time()
    text.counter("process_cpu_seconds", "Processor time of the gateway.", plain, [((), cpu_s)], prefix="")
    text.gauge("process_resident_memory_bytes", "Memory of the gateway.", plain, [((), resident)], prefix="")
    text.gauge("process_open_fds", "Open files.", plain, [((), len(os.listdir("/proc/self/fd")))], prefix="")
    text.gauge("process_start_time_seconds", "When the gateway started.", plain, [((), _STARTED_S)], prefix="")


class _Exposition:
    """Writes families of metrics one behind the other; those without samples are left out."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def bytes(self) -> bytes:
        self._lines.append("")
        return "\n".join(self._lines).encode("utf-8", "replace")

    def counter(self, name: str, *family: Any, prefix: str = _PREFIX) -> None:
        self._plain(f"{prefix}{name}_total", "counter", *family)

    def gauge(self, name: str, *family: Any, prefix: str = _PREFIX) -> None:
        self._plain(prefix + name, "gauge", *family)

    def histogram(
        self, name: str, about: str, labels: _LabelValues, samples: Iterable[tuple[_LabelValues, Histogram]]
    ) -> None:
        name = _PREFIX + name
        begun = False
        for values, times in samples:
            if not begun:
                self._begin(name, "histogram", about)
                begun = True
            inner = _labelled(labels, values)
            below = list(accumulate(times.counts))
            lines = (f'{name}_bucket{{{inner},le="{bound}"}} {n}' for bound, n in zip(_BOUNDS, below, strict=True))
            self._lines.extend(lines)
            self._lines.append(f"{name}_count{{{inner}}} {below[-1]}")
            self._lines.append(f"{name}_sum{{{inner}}} {times.sum_s!r}")

    def _plain(
        self, name: str, kind: str, about: str, labels: _LabelValues, samples: Iterable[tuple[_LabelValues, float]]
    ) -> None:
        begun = False
        for values, value in samples:
            if not begun:
                self._begin(name, kind, about)
                begun = True
            braces = f"{{{_labelled(labels, values)}}}" if labels else ""
            self._lines.append(f"{name}{braces} {float(value)!r}")

    def _begin(self, name: str, kind: str, about: str) -> None:
        self._lines.append(f"# HELP {name} {about}\n# TYPE {name} {kind}")


def _labelled(labels: _LabelValues, values: _LabelValues) -> str:
    return ",".join(f'{label}="{_escaped(value)}"' for label, value in zip(labels, values, strict=True))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
